"""Generation: what a token is drawn from, and that the cache changes nothing but the speed."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import filled, small_config

from chargpt.config import AttentionType
from chargpt.generate import generate, sample_token
from chargpt.model import GPT

VOCAB, CONTEXT = 29, 8
PROBABILITIES = np.array([0.05, 0.3, 0.5, 0.15])  # not in order, so that ranks and indices differ
LOGITS = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32)) + 3.0


@functools.cache
def make(mha_type: AttentionType, *overrides: str) -> GPT:
    """Weights so large that the next token depends on the whole context, and no two logits tie."""
    config = small_config(f"model.mha_type={mha_type.name}", *overrides)
    build = functools.partial(GPT, config.model, VOCAB, CONTEXT)
    return filled(eqx.filter_eval_shape(build, key=jax.random.key(0)), 0.7)


ONE_LAYER = "model.num_layers=1"  # half as long to compile, where depth is not the question


def prompt_of(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, VOCAB, length).astype(np.int32)


def keys_of(samples: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), samples)


def text(model: GPT, prompt: np.ndarray, num_tokens: int, **settings) -> np.ndarray:
    settings = {"max_seq_len": CONTEXT, "keys": keys_of(1)} | settings
    return np.concatenate(list(generate(model, prompt, num_tokens, **settings)), axis=1)


# --- one token


def draw(logits: jax.Array, draws: int = 4000, temperature: float = 1.0, **settings) -> np.ndarray:
    """How often each token came out."""
    pick = functools.partial(sample_token, temperature=temperature, **settings)
    drawn = jax.jit(jax.vmap(pick, (None, 0)))(logits, keys_of(draws))
    return np.bincount(drawn, minlength=logits.size)


def assert_frequencies(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Exactly the support, and a chi-square that fair draws exceed once in ten thousand times."""
    probabilities = probabilities / probabilities.sum()
    possible = probabilities > 0
    np.testing.assert_array_equal(counts > 0, possible)
    expected = counts.sum() * probabilities[possible]
    degrees = possible.sum() - 1
    assert ((counts[possible] - expected) ** 2 / expected).sum() <= degrees + 5 * np.sqrt(
        2 * degrees
    ) + 5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_frequencies_are_those_of_the_softmax_at_the_temperature(temperature, dtype):
    logits = LOGITS.astype(dtype)
    probabilities = np.exp(np.asarray(logits.astype(jnp.float32)) / temperature)
    assert_frequencies(draw(logits, temperature=temperature), probabilities)


def test_temperature_zero_takes_the_most_likely_token_whatever_the_key():
    np.testing.assert_array_equal(draw(LOGITS, temperature=0.0) > 0, [False, False, True, False])
    np.testing.assert_array_equal(
        draw(LOGITS, temperature=0.0, top_k=3, top_p=0.1) > 0, [False, False, True, False]
    )


@pytest.mark.parametrize(
    "top_k, kept",
    [
        (1, [2]),
        (2, [1, 2]),
        (3, [1, 2, 3]),
        (4, [0, 1, 2, 3]),
        (100, [0, 1, 2, 3]),
        (None, [0, 1, 2, 3]),
    ],
)
def test_top_k_keeps_the_k_most_likely_tokens_and_their_proportions(top_k, kept):
    assert_frequencies(
        draw(LOGITS, top_k=top_k), np.where(np.isin(range(4), kept), PROBABILITIES, 0)
    )


@pytest.mark.parametrize(
    "top_p, kept",
    [
        (1e-6, [2]),
        (0.45, [2]),
        (0.55, [1, 2]),
        (0.75, [1, 2]),
        (0.85, [1, 2, 3]),
        (0.97, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
        (None, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_p_and_their_proportions(top_p, kept):
    assert_frequencies(
        draw(LOGITS, top_p=top_p), np.where(np.isin(range(4), kept), PROBABILITIES, 0)
    )


def test_top_k_comes_before_top_p():
    """0.5 of all is 0.625 of the best two: after top_k = 2 one token reaches p = 0.6, else two."""
    np.testing.assert_array_equal(draw(LOGITS, top_p=0.6) > 0, [False, True, True, False])
    np.testing.assert_array_equal(draw(LOGITS, top_k=2, top_p=0.6) > 0, [False, False, True, False])


def test_temperature_comes_before_top_p():
    """Heated, the best token is less likely, and the same p takes more tokens to reach."""
    np.testing.assert_array_equal(
        draw(LOGITS, top_p=0.45, temperature=5.0) > 0, [False, True, True, False]
    )


def test_top_k_keeps_exactly_k_of_tokens_that_tie():
    assert (draw(jnp.zeros(6), top_k=2) > 0).sum() == 2
    assert (draw(jnp.zeros(6), top_p=0.49) > 0).sum() == 3


# --- a text


@eqx.filter_jit
def next_token(
    model: GPT, window: jax.Array, length: jax.Array, index: jax.Array, temperature: float
) -> jax.Array:
    key = jax.random.fold_in(keys_of(1)[0], index)
    return sample_token(model(window)[length - 1], key, temperature)


def text_without_cache(
    model: GPT,
    prompt: np.ndarray,
    num_tokens: int,
    context: int = CONTEXT,
    temperature: float = 0.0,
) -> np.ndarray:
    """The rule of generate(): a full window is cut to its last half, read again from position 0."""
    keep = max(1, context // 2)
    window = list(prompt)
    made = []
    for index in range(num_tokens):
        if len(window) >= context:
            window = window[-keep:]
        # What follows the window is not seen: the model is causal
        padded = jnp.asarray(window + [0] * (context - len(window)), jnp.int32)
        places = jnp.asarray(len(window)), jnp.asarray(index)
        made.append(int(next_token(model, padded, *places, temperature)))
        window.append(made[-1])
    return np.array(made)


def check_text(model: GPT, prompt_len: int, temperature: float = 0.0) -> None:
    """The text with the cache equals the text without."""
    prompt, num_tokens = prompt_of(prompt_len), 3 * CONTEXT + 3
    expected = text_without_cache(model, prompt, num_tokens, temperature=temperature)
    assert len(set(expected)) > 2, "a text of one token proves nothing"
    found = text(model, prompt, num_tokens, temperature=temperature)[0]
    np.testing.assert_array_equal(found, expected)


def test_text_with_the_cache_equals_text_without(mha_type):
    """Drawn far from greedily, so that the texts of all models are of many tokens."""
    check_text(make(mha_type), CONTEXT - 1, temperature=10.0)


@pytest.mark.parametrize("kind", ["standard", "gqa", "mqa", "selective", "mla", "equinox"])
def test_greedy_text_with_the_cache_equals_greedy_text_without(kind):
    check_text(make(AttentionType[kind]), CONTEXT - 1)


@pytest.mark.parametrize("prompt_len", [1, CONTEXT + 5], ids=["one", "longer"])
def test_greedy_text_equals_whatever_the_length_of_the_prompt(prompt_len):
    check_text(make(AttentionType.mla), prompt_len)


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.rope=false", "model.learned_positions=true"),
        ("model.norm_position=post",),
        ("model.window=3", "model.window_pattern=LG", "model.sink=zero", "model.num_experts=4"),
        ("model.ngram=3",),
    ],
)
def test_greedy_text_with_the_cache_equals_greedy_text_without_in_other_models(overrides):
    check_text(make(AttentionType.standard, *overrides), 3)


@pytest.mark.parametrize("context", [1, 2, 3])
def test_the_smallest_contexts_slide_too(context):
    model, prompt = make(AttentionType.standard), prompt_of(2)
    expected = text_without_cache(model, prompt, 7, context)
    np.testing.assert_array_equal(
        text(model, prompt, 7, temperature=0.0, max_seq_len=context)[0], expected
    )


@pytest.mark.parametrize("num_tokens", [0, 1, 4, 5, 9, 17])
def test_pieces_add_up_to_exactly_the_tokens_that_were_asked_for(num_tokens):
    pieces = list(
        generate(
            make(AttentionType.gqa, ONE_LAYER),
            prompt_of(4),
            num_tokens,
            max_seq_len=CONTEXT,
            keys=keys_of(3),
        )
    )
    assert all(piece.shape[0] == 3 and piece.shape[1] > 0 for piece in pieces)
    assert sum(piece.shape[1] for piece in pieces) == num_tokens
    assert all(piece.min() >= 0 and piece.max() < VOCAB for piece in pieces)


def test_the_same_keys_make_the_same_text_and_others_another():
    model, prompt = make(AttentionType.mqa, ONE_LAYER), prompt_of(4)
    first = text(model, prompt, 20, keys=keys_of(3))
    np.testing.assert_array_equal(text(model, prompt, 20, keys=keys_of(3)), first)
    assert not np.array_equal(text(model, prompt, 20, keys=keys_of(3, seed=1)), first)
    assert len({tuple(sample) for sample in first}) == 3


def test_a_text_depends_neither_on_its_length_nor_on_the_size_of_its_pieces():
    model, prompt = make(AttentionType.mqa, ONE_LAYER), prompt_of(2)
    whole = text(model, prompt, 20, temperature=3.0)
    assert len(set(whole[0])) > 5
    np.testing.assert_array_equal(text(model, prompt, 6, temperature=3.0), whole[:, :6])
    for size in (1, 2, 4):
        np.testing.assert_array_equal(
            text(model, prompt, 20, temperature=3.0, tokens_per_piece=size), whole
        )


def test_pieces_are_no_larger_than_asked_so_that_text_can_be_shown_while_it_is_made():
    pieces = generate(
        make(AttentionType.mqa, ONE_LAYER),
        prompt_of(2),
        9,
        max_seq_len=32,
        keys=keys_of(1),
        tokens_per_piece=3,
    )
    assert [piece.shape[1] for piece in pieces] == [1, 3, 3, 2]


def test_samples_of_a_batch_equal_samples_made_alone(mha_type):
    model, keys = make(mha_type, ONE_LAYER), keys_of(3)
    settings = {"temperature": 3.0}  # far from greedy
    together = text(model, prompt_of(4), 7, keys=keys, **settings)
    alone = [text(model, prompt_of(4), 7, keys=keys[i : i + 1], **settings)[0] for i in range(3)]
    np.testing.assert_array_equal(together, alone)
    assert len({tuple(sample) for sample in together}) == 3


def test_text_is_drawn_from_the_models_own_distribution():
    """Two tokens jointly: P(a) P(b | a) of the forward pass. A key used twice would show."""
    model, prompt, kept = make(AttentionType.standard, ONE_LAYER), prompt_of(3), 3
    temperature = 5.0
    drawn = text(model, prompt, 2, keys=keys_of(6000), temperature=temperature, top_k=kept)

    def distribution(tokens):
        logits = np.asarray(model(jnp.asarray(tokens))[-1]) / temperature
        return np.where(logits >= np.sort(logits)[-kept], np.exp(logits - logits.max()), 0)

    joint = np.zeros((VOCAB, VOCAB))
    first = distribution(prompt) / distribution(prompt).sum()
    for token in np.flatnonzero(first):
        second = distribution([*prompt, token])
        joint[token] = first[token] * second / second.sum()
    counts = np.bincount(drawn[:, 0] * VOCAB + drawn[:, 1], minlength=VOCAB**2)
    assert (joint > 0).sum() == kept**2
    assert joint[joint > 0].min() * 6000 > 5, "too rare to count"
    assert_frequencies(counts, joint.ravel())


def test_draws_after_a_slide_are_independent_of_those_before():
    """Uniform logits: whatever is correlated comes from the keys."""
    model = make(AttentionType.standard, ONE_LAYER)
    model = eqx.tree_at(lambda m: m.head.weight, model, replace_fn=jnp.zeros_like)
    samples = text(model, prompt_of(4), 12, keys=keys_of(2000))
    for i in range(12):
        assert_frequencies(np.bincount(samples[:, i], minlength=VOCAB), np.ones(VOCAB))
        for j in range(i):
            agree = (samples[:, i] == samples[:, j]).mean()
            assert abs(agree - 1 / VOCAB) < 5 * np.sqrt(1 / VOCAB / 2000), (i, j)


def test_a_models_blocks_in_arrays_of_their_own_compute_the_same(mha_type):
    """What decoding uses: bit for bit the stacked model, unstacked once and not at every token."""
    model = make(mha_type, ONE_LAYER)
    tokens = jnp.asarray(prompt_of(CONTEXT))
    unstacked = model.unstack()
    logits = [
        eqx.filter_jit(m.decode)(tokens, m.init_cache(CONTEXT), 0)[0]
        for m in (model, unstacked, unstacked.unstack())
    ]
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[0], logits[2])


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt is empty"):
        next(
            generate(
                make(AttentionType.standard, ONE_LAYER),
                prompt_of(0),
                4,
                max_seq_len=CONTEXT,
                keys=keys_of(1),
            )
        )
