"""Parameters, cache bytes and operations, against formulas worked out by hand for each type."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from conftest import layer_of, make_config, small_config

from chargpt.config import Config
from chargpt.costs import count_parameters, flops_per_token, kv_cache_bytes
from chargpt.model import GPT

VOCAB, SEQ_LEN, LAYERS = 11, 16, 2
WIDTH, HEADS, HEAD_DIM = 16, 4, 4  # tests/conftest.py: SMALL
LATENT, NOPE, ROPE, VALUE = 8, 4, 4, 8
HEADS_OPTIONS = {
    "untied": [],
    "tied": ["model.tie_embeddings=true"],
    "learned": ["model.learned_positions=true"],
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """What one attention layer costs."""

    parameters: int
    cache: int  # numbers per token
    scores: int  # multiplications for a query and a key, all heads together
    values: int = WIDTH  # multiplications for a weight and a value


def grouped(kv_heads: int) -> Layer:
    parameters = 2 * WIDTH * HEADS * HEAD_DIM + 2 * WIDTH * kv_heads * HEAD_DIM
    return Layer(parameters, cache=2 * kv_heads * HEAD_DIM, scores=WIDTH)


def latent(value: int = VALUE) -> Layer:
    down = WIDTH * (LATENT + ROPE) + LATENT
    up = LATENT * HEADS * (NOPE + value)
    parameters = WIDTH * HEADS * (NOPE + ROPE) + down + up + HEADS * value * WIDTH
    return Layer(parameters, LATENT + ROPE, scores=HEADS * (NOPE + ROPE), values=HEADS * value)


KNOWN = {
    "standard": grouped(4),
    "gqa": grouped(2),
    "mqa": grouped(1),
    # Keys and values read [query | token]; the bias of a query is as wide as its keys.
    "selective": Layer(2 * WIDTH * WIDTH + 2 * WIDTH * 2 * WIDTH, 2 * WIDTH, scores=2 * WIDTH),
    "mla": latent(),
    "equinox": Layer(4 * WIDTH * WIDTH, cache=WIDTH, scores=WIDTH),
}


def make_model(config: Config) -> GPT:
    """A model of zeros: only its sizes matter here."""
    build = eqx.Partial(GPT, config.model, VOCAB, SEQ_LEN)
    shapes = eqx.filter_eval_shape(build, key=jax.random.key(0))
    arrays, static = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    return eqx.combine(jax.tree.map(jnp.zeros_like, arrays), static)


def model_of(kind: str, *overrides: str) -> GPT:
    return make_model(small_config(f"model.mha_type={kind}", *overrides))


def size(tree: object) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)))


@pytest.mark.parametrize("head", HEADS_OPTIONS)
def test_parameters_are_counted_by_part_and_add_up(mha_type, head):
    model = model_of(mha_type.name, *HEADS_OPTIONS[head])
    parts = count_parameters(model)
    assert sum(parts.values()) == size(model)
    layer = layer_of(mha_type)
    attention = sum(leaf.size for leaf in jax.tree.leaves(layer) if hasattr(leaf, "size"))
    expected = {
        "token embedding": VOCAB * WIDTH,
        "position embedding": SEQ_LEN * WIDTH if head == "learned" else 0,
        "attention, 2 layers": LAYERS * attention,
        "feed-forward, 2 layers": LAYERS * 2 * WIDTH * 4 * WIDTH,
        "norms": (2 * LAYERS + 1) * WIDTH,
        "output head": 0 if head == "tied" else VOCAB * WIDTH,
    }
    assert parts == {name: number for name, number in expected.items() if number}


@pytest.mark.parametrize("kind", KNOWN)
def test_attention_has_the_parameters_of_its_formula(kind):
    parts = count_parameters(model_of(kind))
    assert parts["attention, 2 layers"] == LAYERS * KNOWN[kind].parameters


@pytest.mark.parametrize(
    ("overrides", "part", "expected"),
    [
        (["model.activation=swiglu", "model.d_ff=10"], "feed-forward, 2 layers", 3 * WIDTH * 10),
        (["model.norm_position=post"], "norms", 2 * WIDTH),
        (["model.head_dim=6"], "attention, 2 layers", 4 * WIDTH * HEADS * 6),
        (["model.qk_norm=true"], "attention, 2 layers", 4 * WIDTH * WIDTH + 2 * HEAD_DIM),
        (
            ["model.mha_type=mla", "model.mla.q_lora_rank=3"],
            "attention, 2 layers",
            # Heads from a latent query of width 3, its projection and its norm
            KNOWN["mla"].parameters + (3 - WIDTH) * HEADS * (NOPE + ROPE) + WIDTH * 3 + 3,
        ),
    ],
)
def test_options_change_the_parameters_of_their_part(overrides, part, expected):
    assert count_parameters(make_model(small_config(*overrides)))[part] == LAYERS * expected


def test_the_default_model_has_about_0_8_million_parameters():
    parameters = sum(count_parameters(make_model(make_config())).values())
    assert parameters == pytest.approx(0.8e6, rel=0.05)


def test_cache_bytes_are_those_of_a_cache_and_halve_in_bfloat16(mha_type):
    model = model_of(mha_type.name)
    per_token = kv_cache_bytes(model, jnp.float32, 1)
    assert kv_cache_bytes(model, jnp.bfloat16, 1) == per_token / 2
    cache = jax.tree.leaves(eqx.filter_eval_shape(lambda: model.init_cache(SEQ_LEN)))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in cache) == SEQ_LEN * per_token


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", KNOWN)
def test_cache_bytes_follow_the_formula_of_each_type(kind, dtype):
    expected = LAYERS * KNOWN[kind].cache * jnp.dtype(dtype).itemsize
    assert kv_cache_bytes(model_of(kind), dtype, 1) == expected


@pytest.mark.parametrize("tied", [False, True])
def test_operations_are_six_per_parameter_that_multiplies_and_per_product_of_attention(
    mha_type, tied
):
    model = model_of(mha_type.name, f"model.tie_embeddings={tied}")
    parameters = size(model) - (0 if tied else VOCAB * WIDTH)
    for seq_len in (1, SEQ_LEN, 1000):
        products = LAYERS * sum(layer_of(mha_type).widths) * seq_len
        assert flops_per_token(model, seq_len) == 6 * parameters + 6 * products


@pytest.mark.parametrize("kind", KNOWN)
def test_operations_follow_the_formula_of_each_type(kind):
    layer = KNOWN[kind]
    parameters = LAYERS * (layer.parameters + 8 * WIDTH * WIDTH)
    parameters += (2 * LAYERS + 1) * WIDTH + VOCAB * WIDTH  # norms, and the head once
    for seq_len in (1, SEQ_LEN, 1000):
        products = LAYERS * (layer.scores + layer.values) * seq_len
        assert flops_per_token(model_of(kind), seq_len) == 6 * parameters + 6 * products


SELECTIVE_WITHOUT_ROPE = ["model.mha_type=selective", "model.rope=false"]


@pytest.mark.parametrize(
    ("overrides", "layer"),
    [
        (["model.head_dim=6"], Layer(4 * WIDTH * 24, cache=48, scores=24, values=24)),
        (["model.mha_type=mla", "model.mla.v_head_dim=5"], latent(value=5)),
        (SELECTIVE_WITHOUT_ROPE, dataclasses.replace(KNOWN["selective"], scores=WIDTH)),
    ],
    ids=["wide heads", "narrow values", "selective without RoPE"],
)
def test_operations_follow_the_widths_of_scores_and_values(overrides, layer):
    parameters = LAYERS * (layer.parameters + 8 * WIDTH * WIDTH)
    parameters += (2 * LAYERS + 1) * WIDTH + VOCAB * WIDTH
    products = LAYERS * (layer.scores + layer.values) * SEQ_LEN
    model = make_model(small_config(*overrides))
    assert flops_per_token(model, SEQ_LEN) == 6 * parameters + 6 * products


@pytest.mark.parametrize(
    ("option", "part", "size"),
    [
        ("model.learned_positions=true", "position embedding", SEQ_LEN * WIDTH),
        ("model.ngram=3", "n-gram embedding", 2 * VOCAB * WIDTH),
    ],
)
def test_what_is_looked_up_costs_no_operations_and_no_cache(option, part, size):
    plain, model = (model_of("standard", *overrides) for overrides in ([], [option]))
    assert flops_per_token(plain, SEQ_LEN) == flops_per_token(model, SEQ_LEN)
    assert count_parameters(model) == count_parameters(plain) | {part: size}
    assert kv_cache_bytes(model, jnp.float32, 8) == kv_cache_bytes(plain, jnp.float32, 8)
