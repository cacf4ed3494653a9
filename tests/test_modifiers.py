"""What crosses the types: windows, gates, sinks and ALiBi, alone and together, in every type."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import filled, layer_of, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import (
    NUM_HEADS,
    SEQ_LEN,
    close,
    forward,
    make,
    mla_literally,
    multi_head_oracle,
    normal,
    selective_literally,
    tokens,
)
from test_model import TOKENS, VOCAB

from chargpt.attention import CROSSING, AbstractAttention
from chargpt.attention.kernel import (
    BLOCK,
    CAUSAL,
    CHUNK,
    Reading,
    alibi_slopes,
    dot_product_attention,
)
from chargpt.config import AttentionType, ModelConfig
from chargpt.costs import count_parameters, flops_per_token, kv_cache_bytes
from chargpt.errors import ConfigError
from chargpt.model import GPT
from chargpt.optimizer import split_fused
from chargpt.positions import sinusoidal
from chargpt.train import init_state, make_inputs, train_step

SINK = jnp.array([-1.0, 0.0, 0.5, 2.0])
READINGS = {
    "window": Reading(window=3),
    "sink": Reading(sink=SINK),
    "alibi": Reading(alibi=True),
    "all": Reading(window=3, sink=SINK, alibi=True),
}
decode = eqx.filter_jit(lambda layer, *cached: layer.decode(*cached))


def weigh_by(reading: Reading):
    """The literal rule, one query and one key at a time."""

    def weigh(scores: np.ndarray, head: int) -> np.ndarray:
        weights = np.zeros(scores.shape)
        for i in range(len(scores)):
            total = 0.0 if reading.sink is None else np.exp(float(reading.sink[head]))
            for j in range(i + 1):
                slope = 2.0 ** (-8 * (head + 1) / NUM_HEADS) if reading.alibi else 0
                if reading.window is None or i - j < reading.window:
                    weights[i, j] = np.exp(scores[i, j] - slope * (i - j))
            weights[i] /= total + weights[i].sum()
        return weights

    return weigh


def literally(kind: str, layer, x, weigh) -> np.ndarray:
    match kind:
        case "selective":
            return selective_literally(layer, x, weigh)
        case "mla":
            return mla_literally(layer, x, weigh)
        case "equinox":
            mha = layer.mha
            linears = mha.query_proj, mha.key_proj, mha.value_proj, mha.output_proj
            weights = [linear.weight for linear in linears]
        case _:

            def repeated(linear):
                heads = linear.weight.reshape(layer.num_kv_heads, layer.head_dim, -1)
                heads = jnp.repeat(heads, NUM_HEADS // layer.num_kv_heads, axis=0)
                return heads.reshape(-1, heads.shape[-1])

            k_weight, v_weight = repeated(layer.k_proj), repeated(layer.v_proj)
            weights = [layer.q_proj.weight, k_weight, v_weight, layer.o_proj.weight]
    return multi_head_oracle(x, *weights, NUM_HEADS, layer.rope_theta, weigh)


def refused(layer: AbstractAttention, reading: Reading) -> bool:
    asked = {"window": reading.window, "sink": reading.sink, "alibi": reading.alibi or None}
    return any(value is not None and name in layer.refuses for name, value in asked.items())


@pytest.mark.parametrize("name", READINGS)
@pytest.mark.parametrize("kind", ["standard", "gqa", "mqa", "selective", "mla", "equinox"])
def test_every_type_reads_by_the_literal_rule(kind, name):
    layer, reading = make(AttentionType[kind]), READINGS[name]
    if refused(layer, reading):
        pytest.skip(f"{kind} attention refuses it")
    expected = literally(kind, layer, tokens(), weigh_by(reading))
    close(forward(layer, tokens(), reading), expected)
    plain = literally(kind, layer, tokens(), weigh_by(CAUSAL))
    assert np.abs(expected - plain).max() > 0.01


def test_selective_without_rope_weighs_what_a_query_adds_to_its_keys_against_a_sink():
    layer, reading = make(AttentionType.selective, rope=False), READINGS["sink"]
    close(
        forward(layer, tokens(), reading),
        literally("selective", layer, tokens(), weigh_by(reading)),
    )


def everything(layer: AbstractAttention) -> Reading:
    """All that the type does not refuse at once."""
    given = {"window": 3, "sink": SINK, "alibi": True}
    return Reading(**{name: value for name, value in given.items() if name not in layer.refuses})


@pytest.mark.parametrize("pieces", [(n, *[1] * (SEQ_LEN - n)) for n in range(1, 8)] + [(2, 4, 1)])
def test_decode_equals_the_forward_pass_at_every_split_of_the_prompt(mha_type, pieces):
    """Through a ring of three slots, which a prompt overruns, in pieces too."""
    layer, x = make(mha_type), tokens()
    reading, gate = everything(layer), jax.nn.sigmoid(normal(SEQ_LEN, NUM_HEADS, 1, seed=3))
    cache = layer.init_cache(12, reading.window)
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(cache))
    outputs, position = [], 0
    for length in pieces:
        part = slice(position, position + length)
        y, cache = decode(layer, x[part], cache, jnp.asarray(position), reading, gate[part])
        outputs.append(y)
        position += length
    close(jnp.concatenate(outputs), forward(layer, x, reading, gate))


def test_weights_are_those_of_the_reading_and_leave_the_sinks_share_out(mha_type):
    layer = make(mha_type)
    reading = everything(layer)
    weights = layer.attention_weights(tokens(), reading)
    if weights is None:
        pytest.skip("its attention has no weights")
    band = np.tri(SEQ_LEN) - np.tri(SEQ_LEN, k=-3)
    np.testing.assert_array_equal(np.asarray(weights) > 0, np.tile(band > 0, (NUM_HEADS, 1, 1)))
    total = np.asarray(weights.sum(-1))
    assert (
        (total < 1).all() and total.min() < 0.9
        if reading.sink is not None
        else np.allclose(total, 1)
    )


def test_gates_are_factors_on_what_the_heads_have_read(mha_type):
    """One per head, or per element; closed, a head adds nothing."""
    layer, x = make(mha_type), tokens()
    number, width = layer.heads
    heads = eqx.filter_jit(lambda layer, x: layer.attend(*layer.project(x, positions), CAUSAL))
    positions = jnp.arange(SEQ_LEN)
    read = heads(layer, x)
    assert read.shape == (SEQ_LEN, number, width)
    output = functools.reduce(getattr, layer.output.split("."), layer)
    for shape in ((number, 1), (number, width)):
        gate = normal(SEQ_LEN, *shape, seed=5).at[:, 0].set(0)
        expected = (read * gate).reshape(SEQ_LEN, -1) @ output.weight.T
        close(forward(layer, x, CAUSAL, gate), expected)


def test_alibi_slopes_are_those_of_the_paper():
    close(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    close(alibi_slopes(6), [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8])
    close(alibi_slopes(1), [2.0**-8])


# --- the kernel


def literal_product(queries, keys, values, sink, reading, scale):
    """Every score, then the rule as a mask over all of them."""
    keys, values = (jnp.repeat(x, queries.shape[1] // x.shape[1], axis=1) for x in (keys, values))
    scores = scale * jnp.einsum("tnd,snd->nts", queries, keys)
    i, j = jnp.arange(len(queries))[:, None], jnp.arange(len(keys))[None, :]
    read = j <= i
    if reading.window is not None:
        read = read & (i - j < reading.window)
    if reading.alibi:
        slopes = 2.0 ** (-8.0 * jnp.arange(1, 5) / 4)
        scores = scores - slopes[:, None, None] * (i - j)
    weights = jnp.where(read, jnp.exp(scores), 0)
    total = weights.sum(-1, keepdims=True) + (0 if sink is None else jnp.exp(sink)[:, None, None])
    return jnp.einsum("nts,snv->tnv", weights / total, values)


def ours(queries, keys, values, sink, reading, scale):
    reading = dataclasses.replace(reading, sink=sink)
    return dot_product_attention(queries, keys, values, reading, scale)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize(
    ("length", "window"),
    [
        (5, 2),
        (2 * CHUNK + 1, 1),
        (3 * CHUNK - 5, CHUNK),
        (BLOCK + 40, CHUNK + 8),
        (2 * BLOCK + 3, BLOCK),
        (2 * BLOCK, None),
    ],
)
def test_chunks_and_blocks_equal_the_rule_in_values_and_gradients(length, window, alibi, sink):
    reading = Reading(window=window, alibi=alibi)
    shapes = ((length, 4, 6), (length, 2, 6), (length, 2, 3))
    arrays = [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradients(function, arrays, sink):
        out, pull_back = jax.vjp(lambda *a: function(*a, reading, 0.4), *arrays, sink)
        return out, pull_back(normal(*out.shape, seed=9))

    found = with_gradients(ours, arrays, SINK if sink else None)
    expected = with_gradients(literal_product, arrays, SINK if sink else None)
    assert len(jax.tree.leaves(found)) == 4 + sink
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


def test_a_window_needs_memory_and_work_by_its_own_length():
    """Eight times the context: eight times of both, not sixty-four."""

    def cost(length: int) -> tuple[float, float]:
        arrays = [normal(length, 1, 4, seed=seed) for seed in range(3)]

        def loss(*arrays):
            return dot_product_attention(*arrays, Reading(window=CHUNK), 0.5).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    for short, long in zip(cost(256), cost(2048), strict=True):
        assert 7 < long / short < 9


# --- the model


@functools.cache
def model_config(*overrides: str) -> ModelConfig:
    return small_config(*(f"model.{override}" for override in overrides)).model


def shapes_of(*overrides: str, seq_len: int = 9) -> GPT:
    build = functools.partial(GPT, model_config(*overrides), VOCAB, seq_len)
    return eqx.filter_eval_shape(build, key=jax.random.key(0))


def model_of(*overrides: str) -> GPT:
    return filled(shapes_of(*overrides), 0.16)


score = eqx.filter_jit(lambda model, tokens: model(tokens))
extend = eqx.filter_jit(lambda model, *cached: model.decode(*cached))


@pytest.mark.parametrize(
    ("pattern", "layers", "windows", "period"),
    [
        ("null", 3, (4, 4, 4), 1),
        ("LLG", 6, (4, 4, None, 4, 4, None), 3),
        ("LLG", 4, (4, 4, None, 4), 4),
        ("GL", 2, (None, 4), 2),
    ],
)
def test_a_pattern_says_which_layers_have_the_window(pattern, layers, windows, period):
    options = (f"num_layers={layers}", "window=4", f"window_pattern={pattern}")
    shapes = shapes_of(*options)
    assert (shapes.windows, shapes._period()) == (windows, period)
    ring, full = 4, 9  # slots of a cache of nine tokens
    slots = [full if window is None else ring for window in windows]
    assert [leaf.shape[0] for leaf, _ in filled(shapes, 0.1).init_cache(9)] == slots
    assert kv_cache_bytes(shapes, jnp.float32, 9) == sum(slots) * 2 * 16 * 4
    read = sum(min(7, window or 7) for window in windows)
    plain = flops_per_token(shapes_of(f"num_layers={layers}"), 7)
    assert plain - flops_per_token(shapes, 7) == 6 * 2 * 16 * (7 * layers - read)


def test_layers_of_a_pattern_follow_one_another():
    """In training, block by block, and decoded; with dropout, each layer has its own key."""
    options = ("num_layers=4", "window=2", "window_pattern=LG")
    model = model_of(*options)
    x = model.embedding[TOKENS]
    for block, window in zip(model.layers(), (2, None, 2, None), strict=True):
        x = block(x, window=window)
    expected = jax.vmap(model.final_norm)(x) @ model.head.weight.T
    close(score(model, TOKENS), expected, rtol=1e-4, atol=1e-5)
    logits, cache = extend(model, TOKENS[:5], model.init_cache(9), 0)
    last, _ = extend(model, TOKENS[5:], cache, 5)
    close(jnp.concatenate([logits, last]), expected, rtol=1e-4, atol=1e-5)
    noisy = eqx.filter_jit(lambda model, key: model(TOKENS, key=key))
    drawn = [noisy(model_of(*options, "dropout=0.5"), jax.random.key(seed)) for seed in (0, 0, 1)]
    assert eqx.tree_equal(*drawn[:2]) and not eqx.tree_equal(*drawn[1:])


def test_what_a_modifier_adds_leaves_the_other_weights_as_they_were(mha_type):
    """So that runs with and without it are pairs."""
    kind = f"mha_type={mha_type.name}"
    options = ("output_gate=element", "sink=learned")
    refuses = layer_of(mha_type).refuses
    options = [option for option in options if option.split("=")[0] not in refuses]

    @functools.cache
    def weights(*options: str) -> GPT:
        config = model_config(kind, *options)
        return eqx.filter_jit(lambda key: GPT(config, VOCAB, 9, key=key))(jax.random.key(0))

    plain, changed = weights(), weights(*options)
    number, width = plain.layers()[0].attention.heads
    added = {"output_gate=element": number * width * 16, "sink=learned": number}
    assert sum(count_parameters(changed).values()) - sum(count_parameters(plain).values()) == (
        2 * sum(added[option] for option in options)
    )
    neutral = plain.stacked.modifiers
    assert eqx.tree_equal(
        eqx.tree_at(lambda model: model.blocks.modifiers, changed, neutral), plain
    )


def test_positions_are_the_earlier_options_by_other_names():
    same = {
        "positions=rope": "rope=true",
        "positions=none": "rope=false",
        "positions=learned": ("rope=false", "learned_positions=true"),
    }
    for new, old in same.items():
        old = (old,) if isinstance(old, str) else old
        assert eqx.tree_equal(model_of(new), model_of(*old))
    assert shapes_of("positions=alibi").stacked.attention.rope_theta is None


def test_sinusoidal_positions_are_those_of_the_paper():
    table = np.asarray(sinusoidal(jnp.arange(50), 7))
    for p in (0, 1, 49):
        for i in range(7):
            angle = p / 10000 ** (2 * (i // 2) / 7)
            assert table[p, i] == pytest.approx(np.cos(angle) if i % 2 else np.sin(angle), abs=1e-5)
    model, plain = model_of("positions=sinusoidal"), model_of("positions=none")
    expected = plain.embedding[TOKENS] + 0.02 * np.sqrt(2) * sinusoidal(jnp.arange(9), 16)
    close(model._embed(TOKENS[None], jnp.arange(9)), expected)
    assert np.abs(score(model, TOKENS) - score(plain, TOKENS)).max() > 1e-3


def test_muon_sees_gates_as_matrices_and_leaves_sinks_to_adam():
    from chargpt.optimizer import hidden_matrices

    params = split_fused(eqx.filter(model_of("output_gate=head", "sink=learned"), eqx.is_array))
    matrices = hidden_matrices(params)
    assert matrices.blocks.modifiers.gate_proj.weight is not None
    assert matrices.blocks.modifiers.sink is None


REFUSED = {
    "window_pattern=LG": "model.window_pattern=LG: needs a window; write model.window=W",
    "window_pattern=LX window=3": "model.window_pattern=LX: must consist of L",
    "window_pattern=GGL window=3": "model.window_pattern=GGL: none of 2 layers has the window",
    "window=0": "model.window=0: must be at least 1",
    "positions=rope rope=false": "model.rope=false: model.positions=rope says otherwise",
    "positions=none learned_positions=true": "model.learned_positions=true: model.positions=none",
}


@pytest.mark.parametrize("options", REFUSED)
def test_options_that_contradict_each_other_are_refused(options):
    with pytest.raises(ConfigError, match="^" + REFUSED[options]):
        model_config(*options.split())


OPTIONS = {
    "window": [None, 3],
    "window_pattern": [None, "LG"],
    "output_gate": ["none", "head", "element"],
    "sink": ["none", "learned", "zero"],
    "positions": [None, "rope", "sinusoidal", "learned", "alibi", "none"],
    "ngram": [1, 3],
    "qk_norm": [False, True],
    "norm_position": ["pre", "post"],
    "match": ["none", "params"],
    "num_experts": [None, 4],
    "router": ["softmax", "sigmoid_bias"],
}


@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(AttentionType),
    st.fixed_dictionaries({k: st.sampled_from(v) for k, v in OPTIONS.items()}),
)
def test_any_combination_trains_and_decodes_as_it_scores_or_is_refused(kind, options):
    if options["num_experts"] is None:  # otherwise refused (tests/test_experts.py)
        options = options | {"router": "softmax"}
    else:
        options = options | {"match": "none"}
    chosen = [f"model.{name}={'null' if v is None else v}" for name, v in options.items()]
    name = "optimizer.name=muon" if options["match"] == "none" else "optimizer.name=adamw"
    try:
        config = small_config(f"model.mha_type={kind.name}", name, *chosen)
        state = init_state(config, VOCAB, 0)
    except ConfigError as error:
        refuses = set(layer_of(kind).refuses) | {"window_pattern", "qk_norm"}
        refuses |= {"positions"}
        assert any(name in str(error) for name in refuses) and "write" in str(error)
        return
    inputs = make_inputs(np.tile(np.arange(VOCAB), 9), config)
    step = eqx.filter_jit(lambda state: train_step(state, inputs, config))
    before = state.model
    for _ in range(2):
        state, metrics = step(state)
        assert np.isfinite(metrics.loss) and int(metrics.skipped) == 0
    model = state.model
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()), *(eqx.filter(m, eqx.is_array) for m in (before, model))
    )
    assert all(jax.tree.leaves(moved)), moved
    logits, cache = extend(model, TOKENS[:4], model.init_cache(9), 0)
    rest = [logits]
    for i in range(4, 9):
        logits, cache = extend(model, TOKENS[i : i + 1], cache, jnp.asarray(i))
        rest.append(logits)
    close(jnp.concatenate(rest), score(model, TOKENS), rtol=1e-4, atol=2e-5)


def test_every_option_that_crosses_the_types_is_refused_only_with_a_reason(mha_type):
    refuses = layer_of(mha_type).refuses
    crossing = set(CROSSING) & set(refuses)
    assert crossing == ({"output_gate", "sink", "alibi"} if mha_type.name == "equinox" else set())
    values = {"output_gate": "head", "sink": "zero", "window": 3, "alibi": None}
    assert values.keys() == CROSSING.keys()
    for name, value in values.items():
        option = "model.positions=alibi" if name == "alibi" else f"model.{name}={value}"
        if name not in refuses:
            layer_of(mha_type, option)
            continue
        with pytest.raises(ConfigError, match=rf"^{option}: {mha_type.name} attention .*; write"):
            layer_of(mha_type, option)
