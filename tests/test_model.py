"""The model: every option against its formula, decoding, initialisation, dropout, its weights."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from conftest import filled, layer_of, small_config

from chargpt.attention import AbstractAttention, GroupedQueryAttention
from chargpt.config import Activation, AttentionType, ModelConfig
from chargpt.costs import count_parameters
from chargpt.errors import ConfigError
from chargpt.model import (
    GPT,
    Block,
    FeedForward,
    drop,
    init_weights,
    make_norm,
    sum_rows,
    take_rows,
)

VOCAB, SEQ_LEN = 11, 9
TOKENS = jnp.array([3, 1, 4, 1, 5, 9, 2, 6, 10])
SIX = ["standard", "gqa", "mqa", "selective", "mla", "equinox"]  # of which more is known here

run = eqx.filter_jit(lambda model, tokens, **key: model(tokens, **key))
run_batch = eqx.filter_jit(lambda model, batch: jax.vmap(model)(batch))
extend = eqx.filter_jit(lambda model, *cached: model.decode(*cached))
read_by = eqx.filter_jit(lambda model, tokens: model.attention_weights(tokens))
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


# Results as NumPy's arrays: JAX would compile each operation on them, for each shape.
def forward(model, tokens, **key) -> np.ndarray:
    return np.asarray(run(model, tokens, **key))


def decode(model, tokens, cache, position):
    logits, cache = extend(model, tokens, cache, jnp.asarray(position))
    return np.asarray(logits), cache


@functools.cache
def model_config(*overrides: str) -> ModelConfig:
    return small_config(*(f"model.{override}" for override in overrides)).model


@functools.cache
def make(*overrides: str) -> GPT:
    """A model with larger weights than at its initialisation: every part shows in the logits."""
    build = functools.partial(GPT, model_config(*overrides), VOCAB, SEQ_LEN)
    return filled(eqx.filter_eval_shape(build, key=jax.random.key(0)), 0.16)


@functools.cache
def shapes(*overrides: str) -> GPT:
    build = functools.partial(GPT, small_config(*overrides).model, VOCAB, SEQ_LEN)
    return eqx.filter_eval_shape(build, key=jax.random.key(0))


def of_type(mha_type: AttentionType, *overrides: str) -> GPT:
    return make(f"mha_type={mha_type.name}", *overrides)


def reads(model: GPT) -> np.ndarray:
    """[t, s]: whether the logits at t depend on token s, by what the heads read: at least on t."""
    reached = np.eye(SEQ_LEN, dtype=bool)
    weights = read_by(model, TOKENS)
    for layer in [] if weights is None else np.asarray(weights):
        reached |= (layer.max(axis=0) > 1e-2) @ reached
    return reached


def with_token(position: int, token: int) -> jax.Array:
    """TOKENS, one of them replaced."""
    return jnp.asarray(np.where(np.arange(SEQ_LEN) == position, token, TOKENS), TOKENS.dtype)


# --- the forward pass


def test_logits_are_causal_and_see_every_earlier_token_that_is_read(mha_type):
    model = of_type(mha_type)
    logits, read = forward(model, TOKENS), reads(model)
    assert logits.shape == (SEQ_LEN, VOCAB) and logits.dtype == jnp.float32
    for changed in range(SEQ_LEN):
        others = forward(model, with_token(changed, 0))
        np.testing.assert_array_equal(others[:changed], logits[:changed])
        assert (np.abs(others - logits).max(axis=1) > 1e-4)[read[:, changed]].all()


@pytest.mark.parametrize("kind", SIX)
def test_these_types_read_every_earlier_token(kind):
    np.testing.assert_array_equal(reads(make(f"mha_type={kind}")), np.tri(SEQ_LEN, dtype=bool))


def test_a_model_of_attention_without_weights_has_none(monkeypatch):
    assert read_by(make(), TOKENS).shape == (2, 4, SEQ_LEN, SEQ_LEN)
    plain = AbstractAttention.attention_weights
    monkeypatch.setattr(GroupedQueryAttention, "attention_weights", plain)
    assert make().attention_weights(TOKENS) is None


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_blocks_normalise_before_or_after_each_branch(norm_position, norm):
    model = make(f"norm_position={norm_position}", f"norm={norm}")
    x = model.embedding[TOKENS]
    for block in model.layers():
        norm_1, norm_2 = jax.vmap(block.attention_norm), jax.vmap(block.feed_forward_norm)
        if norm_position == "pre":
            x = x + forward(block.attention, norm_1(x))
            x = x + block.feed_forward(norm_2(x))
        else:
            x = norm_1(x + forward(block.attention, x))
            x = norm_2(x + block.feed_forward(x))
    assert (model.final_norm is None) == (norm_position == "post")
    x = x if model.final_norm is None else jax.vmap(model.final_norm)(x)
    close(forward(model, TOKENS), x @ model.head.weight.T)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_norms_equal_their_formulas(norm):
    x = np.asarray(jax.random.normal(jax.random.key(0), (16,)) + 0.5)
    weight = jnp.linspace(0.5, 2, 16)
    layer = make_norm(model_config(f"norm={norm}").norm, 16)
    assert layer.bias is None
    centred = x - x.mean() if norm == "layernorm" else x
    expected = centred / np.sqrt((centred**2).mean() + 1e-5) * weight
    close(eqx.tree_at(lambda layer: layer.weight, layer, weight)(jnp.asarray(x)), expected)


def gelu(z):
    """The tanh form, as in GPT-2."""
    return 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_residual_scale_is_a_factor_on_both_branches(norm_position):
    model = make(f"norm_position={norm_position}", "residual_scale=0.3")
    x = model.embedding[TOKENS]
    for block in model.layers():
        norm_1, norm_2 = jax.vmap(block.attention_norm), jax.vmap(block.feed_forward_norm)
        if norm_position == "pre":
            x = x + 0.3 * forward(block.attention, norm_1(x))
            x = x + 0.3 * block.feed_forward(norm_2(x))
        else:
            x = norm_1(x + 0.3 * forward(block.attention, x))
            x = norm_2(x + 0.3 * block.feed_forward(x))
    x = x if model.final_norm is None else jax.vmap(model.final_norm)(x)
    close(forward(model, TOKENS), x @ model.head.weight.T)


@pytest.mark.parametrize("tied", [False, True])
def test_logit_softcap_bends_logits_by_its_formula(tied):
    capped, bare = (
        make(f"tie_embeddings={tied}", "logit_softcap=0.7"),
        make(f"tie_embeddings={tied}"),
    )
    logits = np.asarray(forward(bare, TOKENS))
    assert np.abs(logits).max() > 1
    close(forward(capped, TOKENS), 0.7 * np.tanh(logits / 0.7))


FORMULAS = {
    Activation.relu: lambda up, gate: np.maximum(up, 0),
    Activation.gelu: lambda up, gate: gelu(up),
    Activation.relu2: lambda up, gate: np.maximum(up, 0) ** 2,
    Activation.swiglu: lambda up, gate: gate / (1 + np.exp(-gate)) * up,
}


@pytest.mark.parametrize("activation", list(Activation), ids=lambda activation: activation.name)
def test_every_activation_equals_its_formula(activation):
    layer = FeedForward(6, 10, activation, key=jax.random.key(0))
    x = 3 * np.asarray(jax.random.normal(jax.random.key(1), (4, 6)))
    up = x @ np.asarray(layer.up_proj.weight).T
    assert (layer.gate_proj is not None) == (activation is Activation.swiglu)
    gate = None if layer.gate_proj is None else x @ np.asarray(layer.gate_proj.weight).T
    close(
        layer(jnp.asarray(x)), FORMULAS[activation](up, gate) @ np.asarray(layer.down_proj.weight).T
    )


def test_tied_embeddings_are_one_matrix_that_learns_from_both_ends():
    tied, untied = make("tie_embeddings=true"), make("tie_embeddings=false")
    assert tied.head is None
    sizes = [sum(count_parameters(model).values()) for model in (untied, tied)]
    assert sizes[0] - sizes[1] == untied.head.weight.size == VOCAB * 16
    same = eqx.tree_at(lambda m: m.head.weight, untied, tied.embedding)
    same = eqx.tree_at(lambda m: (m.embedding, m.blocks), same, (tied.embedding, tied.blocks))
    close(forward(same, TOKENS), forward(tied, TOKENS))
    loss = eqx.filter_jit(eqx.filter_grad(lambda model: jnp.sin(model(TOKENS)).sum()))
    both = loss(same)
    close(loss(tied).embedding, both.embedding + both.head.weight, atol=1e-4)


@pytest.mark.parametrize("learned_positions", [False, True])
def test_order_is_seen_only_through_positions(learned_positions):
    """Without RoPE a layer reads earlier tokens as a set; learned positions make it a sequence."""
    model = make("num_layers=1", "rope=false", f"learned_positions={learned_positions}")
    swapped = TOKENS.at[jnp.array([0, 5])].set(TOKENS[jnp.array([5, 0])])
    difference = np.abs(forward(model, TOKENS)[-1] - forward(model, swapped)[-1]).max()
    assert difference > 1e-2 if learned_positions else difference < 1e-5
    if learned_positions:
        assert model.position_embedding.shape == (SEQ_LEN, 16)
        zeros, none = (
            eqx.tree_at(lambda m: m.position_embedding, model, replace_fn=replace)
            for replace in (jnp.zeros_like, lambda _: None)
        )
        close(forward(zeros, TOKENS), forward(none, TOKENS))


def test_an_ngram_embedding_adds_a_vector_for_each_earlier_token():
    """In sequences of their own; nothing for tokens before the first."""
    model, plain = make("ngram=3"), make()
    assert model.ngram_embedding.shape == (2 * VOCAB, 16)
    tables = np.asarray(model.ngram_embedding).reshape(2, VOCAB, 16)
    tokens = np.stack([TOKENS, TOKENS[::-1]])
    expected = np.asarray(plain.embedding)[tokens]
    for sequence, position in np.ndindex(*tokens.shape):
        for before in (1, 2):
            if position >= before:
                expected[sequence, position] += tables[
                    before - 1, tokens[sequence, position - before]
                ]
    close(model._embed(jnp.asarray(tokens), jnp.arange(SEQ_LEN)), expected.reshape(-1, 16))
    close(run_batch(model, tokens), eqx.filter_jit(GPT.batch)(model, jnp.asarray(tokens)))


def test_an_ngram_embedding_begins_at_zero_so_that_runs_with_it_are_pairs_with_those_without():
    def build(option: str) -> GPT:
        return GPT(model_config(option), VOCAB, SEQ_LEN, key=jax.random.key(0))

    with_it, without = map(eqx.filter_jit(build), ("ngram=4", "ngram=1"))
    assert with_it.ngram_embedding.shape == (3 * VOCAB, 16) and not with_it.ngram_embedding.any()
    assert eqx.tree_equal(eqx.tree_at(lambda model: model.ngram_embedding, with_it, None), without)


def test_a_new_text_in_a_used_cache_does_not_see_the_last_tokens_of_the_text_before():
    model = make("ngram=3")
    _, used = decode(model, TOKENS, model.init_cache(SEQ_LEN), 0)
    fresh = model.init_cache(SEQ_LEN)
    for position in range(3):
        token = TOKENS[position : position + 1]
        again, used = decode(model, token, used, position)
        expected, fresh = decode(model, token, fresh, position)
        close(again, expected)


@pytest.mark.parametrize("mha_type", ["standard", "gqa", "mqa"])
def test_qk_norm_changes_the_model_and_has_its_own_weights(mha_type):
    bare, normed = make(f"mha_type={mha_type}"), make(f"mha_type={mha_type}", "qk_norm=true")
    assert (
        sum(count_parameters(normed).values()) - sum(count_parameters(bare).values()) == 2 * 2 * 4
    )
    assert np.abs(forward(normed, TOKENS) - forward(bare, TOKENS)).max() > 1e-2


def test_the_scan_over_layers_equals_one_block_after_another(mha_type):
    model = of_type(mha_type)
    assert len(model.layers()) == 2
    x = model.embedding[TOKENS]
    for block in model.layers():
        x = forward(block, x)
    close(forward(model, TOKENS), jax.vmap(model.final_norm)(x) @ model.head.weight.T)


def test_a_batch_equals_its_sequences_one_by_one(mha_type):
    model = of_type(mha_type)
    batch = jnp.asarray(np.stack([TOKENS, np.flip(TOKENS), np.zeros_like(TOKENS)]))
    logits = np.asarray(run_batch(model, batch))
    for sequence, expected in zip(np.asarray(batch), logits, strict=True):
        close(forward(model, jnp.asarray(sequence)), expected)


def test_the_shape_checker_watches_the_model():
    model = make()
    with pytest.raises(jaxtyping.TypeCheckError):
        model(TOKENS[None])
    with pytest.raises(jaxtyping.TypeCheckError):
        model(TOKENS.astype(jnp.float32))
    with pytest.raises(jaxtyping.TypeCheckError):
        model.layers()[0].feed_forward(jnp.ones(16))


# --- decoding


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_decode_equals_the_forward_pass(mha_type, positions):
    """A prompt, then token by token, in a cache longer than the sequence."""
    optional = "rope" in layer_of(mha_type).accepts
    rope = positions == "rope" or not optional
    model = of_type(mha_type, f"rope={rope}", f"learned_positions={positions == 'learned'}")
    expected = forward(model, TOKENS)
    prompt_len = 4
    prompt_logits, cache = decode(
        model, TOKENS[:prompt_len], model.init_cache(SEQ_LEN + 3), jnp.asarray(0)
    )
    close(prompt_logits, expected[:prompt_len])
    for position in range(prompt_len, SEQ_LEN):
        logits, cache = decode(model, TOKENS[position : position + 1], cache, jnp.asarray(position))
        close(logits[0], expected[position])


@pytest.mark.parametrize(
    "overrides",
    [
        ("norm_position=post",),
        ("norm=layernorm", "tie_embeddings=true"),
        ("qk_norm=true",),
        ("residual_scale=0.5", "logit_softcap=1"),
        ("ngram=3",),
    ],
)
def test_decode_equals_the_forward_pass_however_the_block_is_built(overrides):
    model = make(*overrides)
    first, cache = decode(model, TOKENS[:-1], model.init_cache(SEQ_LEN), 0)
    last, _ = decode(model, TOKENS[-1:], cache, SEQ_LEN - 1)
    close(np.concatenate([first, last]), forward(model, TOKENS))


# --- weights


def linears(tree) -> dict[str, np.ndarray]:
    """Every Linear's weight by its path."""
    nodes = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda node: isinstance(node, eqx.nn.Linear)
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(node.weight)
        for path, node in nodes
        if isinstance(node, eqx.nn.Linear)
    }


@functools.cache
def initialised(mha_type: AttentionType, seed: int = 0) -> GPT:
    overrides = ("d_model=64", "num_layers=3", "activation=swiglu", "learned_positions=true")
    config = model_config(f"mha_type={mha_type.name}", *overrides)
    return eqx.filter_jit(lambda key: GPT(config, 96, 64, key=key))(jax.random.key(seed))


def test_initialisation_is_that_of_gpt2(mha_type):
    model = initialised(mha_type)
    tables = {"tokens": model.embedding, "positions": model.position_embedding}
    onto_residual = {f"blocks.{path}" for path in model.stacked.residual_projections()}
    assert "blocks.feed_forward.down_proj" in onto_residual <= linears(model).keys()
    for name, weight in (linears(model) | jax.device_get(tables)).items():
        std = 0.02 / math.sqrt(2 * model.num_layers) if name in onto_residual else 0.02
        assert np.std(weight) == pytest.approx(std, rel=5 / math.sqrt(2 * weight.size)), name
        assert abs(np.mean(weight)) < 5 * std / math.sqrt(weight.size), name
        assert np.abs(weight).max() > 2.5 * std, f"{name} is not normal"
    gains = [model.blocks.attention_norm, model.blocks.feed_forward_norm, model.final_norm]
    assert all((np.asarray(norm.weight) == 1).all() for norm in gains)


@pytest.mark.parametrize("kind", SIX)
def test_one_projection_of_each_branch_leads_onto_the_residual_stream(kind):
    block = make(f"mha_type={kind}").stacked
    output = "mha.output_proj" if kind == "equinox" else "o_proj"
    assert block.residual_projections() == {f"attention.{output}", "feed_forward.down_proj"}


def test_a_projection_that_does_not_exist_cannot_be_initialised():
    layer = FeedForward(6, 10, Activation.gelu, key=jax.random.key(0))
    with pytest.raises(TypeError, match="FeedForward has no projection o_proj"):
        init_weights(layer, {"up_proj": 0.1, "o_proj": 0.0}, key=jax.random.key(0))


def test_zero_init_starts_with_even_odds_and_blocks_that_do_nothing(mha_type):
    """The head learns from the first step; unstacked and decoded, the model is the same."""
    config = model_config(f"mha_type={mha_type.name}", "zero_init=true", "num_layers=1")
    model = eqx.filter_jit(lambda key: GPT(config, VOCAB, SEQ_LEN, key=key))(jax.random.key(0))
    zero = {name for name, weight in linears(model).items() if (weight == 0).all()}
    assert zero == {"head"} | {f"blocks.{path}" for path in model.stacked.residual_projections()}
    np.testing.assert_array_equal(forward(model, TOKENS), np.zeros((SEQ_LEN, VOCAB)))

    probe = jax.random.normal(jax.random.key(1), (SEQ_LEN, VOCAB))
    grads = eqx.filter_jit(eqx.filter_grad(lambda model: jnp.vdot(probe, model(TOKENS))))(model)
    assert np.abs(grads.head.weight).min(axis=1).max() > 1e-3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    moved = eqx.tree_at(lambda m: m.head.weight, model, grads.head.weight)
    x = jax.vmap(moved.final_norm)(moved.embedding[TOKENS])
    close(forward(moved, TOKENS), x @ moved.head.weight.T)
    close(decode(moved.unstack(), TOKENS, moved.init_cache(SEQ_LEN), 0)[0], forward(moved, TOKENS))


def test_no_two_weights_start_alike(mha_type):
    model = initialised(mha_type)
    weights = [model.embedding, model.position_embedding, *linears(model).values()]
    numbers = np.concatenate([np.ravel(weight)[::16] for weight in weights])
    assert len(set((numbers / np.abs(numbers).mean()).tolist())) > 0.99 * len(numbers)


def test_the_key_decides_the_weights():
    model = initialised(AttentionType.standard)
    assert eqx.tree_equal(model, initialised.__wrapped__(AttentionType.standard))
    other = initialised(AttentionType.standard, seed=1)
    for one, two in zip(linears(model).values(), linears(other).values(), strict=True):
        assert (one != two).mean() > 0.99


def test_every_array_is_a_parameter_and_all_are_counted(mha_type):
    """No table of angles and no mask among the leaves, where an optimizer would change it."""
    model = of_type(mha_type, "learned_positions=true")
    arrays = [leaf for leaf in jax.tree.leaves(model) if eqx.is_array(leaf)]
    assert all(eqx.is_inexact_array(leaf) for leaf in arrays)
    assert sum(leaf.size for leaf in arrays) == sum(count_parameters(model).values())


def test_every_weight_learns(mha_type):
    model = of_type(mha_type, "learned_positions=true")
    probe = jax.random.normal(jax.random.key(1), (SEQ_LEN, VOCAB))
    grads = eqx.filter_jit(eqx.filter_grad(lambda model: jnp.vdot(probe, model(TOKENS))))(model)
    for path, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]:
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-3, jax.tree_util.keystr(path)


# --- dropout


def test_dropout_is_off_without_a_key_and_on_with_one(mha_type):
    with_dropout, without = of_type(mha_type, "dropout=0.5"), of_type(mha_type)
    np.testing.assert_array_equal(forward(with_dropout, TOKENS), forward(without, TOKENS))
    keys = jax.random.split(jax.random.key(0))
    first, again, other = (
        forward(with_dropout, TOKENS, key=key) for key in (keys[0], keys[0], keys[1])
    )
    np.testing.assert_array_equal(first, again)
    for one, two in ((first, other), (first, forward(without, TOKENS))):
        assert np.abs(one - two).max() > 1e-2
    close(forward(without, TOKENS, key=keys[0]), forward(without, TOKENS))


@pytest.mark.parametrize("branch", ["attention", "feed_forward"])
def test_dropout_keeps_the_expectation_of_a_branch(branch):
    """Of the branch, never of the stream: each number is dropped, or scaled by 1 / (1 - rate)."""
    rate, draws = 0.25, 4000
    build = functools.partial(Block, model_config(f"dropout={rate}"))
    block = eqx.filter_jit(lambda key: build(key=key))(jax.random.key(0))
    silent = (
        (lambda b: b.feed_forward.down_proj.weight)
        if branch == "attention"
        else (lambda b: b.attention.o_proj.weight)
    )
    block = eqx.tree_at(silent, block, replace_fn=jnp.zeros_like)
    x = jax.random.normal(jax.random.key(1), (3, 16))
    full = forward(block, x) - np.asarray(x)
    noisy = eqx.filter_jit(jax.vmap(lambda key: block(x, key=key) - x))(
        jax.random.split(jax.random.key(2), draws)
    )
    noisy = np.asarray(noisy)
    kept = np.abs(noisy) > 1e-6
    close(noisy[kept], np.broadcast_to(full / (1 - rate), noisy.shape)[kept], atol=1e-5)
    assert abs(kept.mean() - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / kept.size)
    error = np.abs(full) * math.sqrt(rate / (1 - rate) / draws)
    assert (np.abs(noisy.mean(axis=0) - full) < 5 * error + 1e-5).all()


def test_dropout_is_drawn_anew_in_every_layer_and_branch():
    """Silence all branches but one: which numbers of the stream move, tells that branch's mask."""
    model = make("dropout=0.5")

    def scale(block, which, gain):
        return eqx.tree_at(which, block, replace_fn=lambda weight: gain * weight)

    branches = (lambda b: b.attention.o_proj.weight, lambda b: b.feed_forward.down_proj.weight)
    masks = []
    for layer in range(2):
        for branch in range(2):
            gains = jnp.zeros((2, 2)).at[layer, branch].set(1.0)[:, :, None, None]
            blocks = scale(scale(model.blocks, branches[0], gains[:, 0]), branches[1], gains[:, 1])
            masks.append(stream_moves(eqx.tree_at(lambda m: m.blocks, model, blocks)))
    for i, mask in enumerate(masks):
        assert 0.35 < mask.mean() < 0.65
        for other in masks[:i]:
            assert 0.3 < (mask == other).mean() < 0.7


def stream_moves(model: GPT) -> np.ndarray:
    """Where the blocks move the stream, under one fixed dropout key."""
    # Logits show the stream itself, not normalised
    model = eqx.tree_at(lambda m: m.head.weight, model, jnp.eye(16))
    model = eqx.tree_at(lambda m: m.final_norm, model, eqx.nn.Identity())
    still = eqx.tree_at(lambda m: m.blocks, model, jax.tree.map(zeroed, model.blocks))
    moving, resting = (forward(m, TOKENS, key=jax.random.key(0)) for m in (model, still))
    return np.abs(moving - resting) > 1e-6


def zeroed(leaf):
    return jnp.zeros_like(leaf) if eqx.is_array(leaf) else leaf


@pytest.mark.parametrize(("shape", "rate"), [((999, 7), 0.3), ((600, 512), 2e-3)])
def test_dropout_decides_for_each_element_by_itself(shape, rate):
    """Two elements share a random word: neither their rates nor their fates may differ for it."""
    x = drop(jnp.ones(shape), rate, jax.random.key(0))
    kept = np.asarray(x) != 0
    np.testing.assert_allclose(x[kept], 1 / (1 - rate), rtol=2e-5)
    for part in (kept[:, 0::2], kept[:, 1::2]):
        assert abs(part.mean() - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / part.size)
    pairs = ~kept[:, 0 : 2 * (shape[1] // 2) : 2] & ~kept[:, 1::2]
    assert abs(pairs.mean() - rate**2) < 5 * rate / math.sqrt(pairs.size)


# --- looking rows up


@pytest.mark.parametrize("rows", [65, 600], ids=["small_table", "large_table"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_take_rows_equals_indexing_and_so_does_its_gradient(rows, dtype):
    table = jax.random.normal(jax.random.key(0), (rows, 5), dtype)
    indices = jnp.array([0, 3, 3, rows - 1, 7, 3])
    taken = take_rows(table, indices)
    assert taken.dtype == dtype
    np.testing.assert_array_equal(taken, np.asarray(table)[np.asarray(indices)])
    weights = jax.random.normal(jax.random.key(1), (6, 5), dtype)

    @jax.jit
    @jax.grad
    def gradient(table):
        return jnp.vdot(weights, take_rows(table, indices))

    @jax.jit
    @jax.grad
    def expected(table):
        return jnp.vdot(weights, table[indices])

    found, wanted = (np.asarray(of(table), np.float32) for of in (gradient, expected))
    np.testing.assert_allclose(found, wanted, atol=1e-6 if dtype == jnp.float32 else 0.03)


# --- narrow numbers


def test_bfloat16_logits_are_bfloat16_and_near_those_of_float32(mha_type):
    model = of_type(mha_type)
    arrays, rest = eqx.partition(model, eqx.is_array)
    narrow = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, jnp.bfloat16)), arrays)
    narrow = eqx.combine(narrow, rest)
    wide = forward(model, TOKENS)
    logits = forward(narrow, TOKENS)
    cache = narrow.init_cache(SEQ_LEN)
    decoded, cache = eqx.filter_eval_shape(narrow.decode, TOKENS, cache, 0)
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, decoded, cache))} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert np.abs(logits.astype(jnp.float32) - wide).max() < 0.05 * np.abs(wide).max()


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_matched_parameters_are_those_of_standard_to_half_a_hidden_unit(mha_type, activation):
    sizes = ["model.d_model=32", "model.num_layers=2", f"model.activation={activation}"]

    def count(kind: str, match: str) -> int:
        model = shapes(f"model.mha_type={kind}", f"model.match={match}", *sizes)
        return sum(leaf.size for leaf in jax.tree.leaves(model) if hasattr(leaf, "size"))

    hidden_unit = 2 * 32 * (3 if activation == "swiglu" else 2)
    assert abs(count(mha_type.name, "params") - count("standard", "none")) <= hidden_unit / 2
    assert count("standard", "params") == count("standard", "none")


def test_a_match_that_no_feed_forward_layer_can_pay_for_is_refused():
    with pytest.raises(
        ConfigError, match=r"^model.match=params: selective attention has .* write a larger one"
    ):
        shapes("model.mha_type=selective", "model.match=params", "model.d_ff=4")


@pytest.mark.parametrize("rows", [65, 600])
def test_sums_of_rows_skip_indices_below_zero(rows):
    table = np.random.default_rng(0).normal(size=(rows, 8)).astype(np.float32)
    indices = np.array([[0, rows - 1, 3], [-1, 2, 2], [-1, -1, -1]])
    expected = [[table[i] for i in line if i >= 0] for line in indices]
    found = sum_rows(jnp.asarray(table), jnp.asarray(indices))
    close(found, [np.sum(line, axis=0) if line else np.zeros(8) for line in expected])
