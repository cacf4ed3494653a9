"""Parameters, cache bytes and operations, each against the formulas of the types, worked out by hand."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from conftest import make_config, small_config

from chargpt.config import AttentionType, Config
from chargpt.costs import count_parameters, flops_per_token, kv_cache_bytes_per_token
from chargpt.model import GPT

VOCAB, SEQ_LEN, LAYERS = 11, 16, 2
WIDTH, HEADS, HEAD_DIM = 16, 4, 4  # tests/conftest.py: SMALL
LATENT, NOPE, ROPE, VALUE = 8, 4, 4, 8
KV_HEADS = {AttentionType.standard: 4, AttentionType.gqa: 2, AttentionType.mqa: 1}
HEADS_OPTIONS = {
    "untied": [],
    "tied": ["model.tie_embeddings=true"],
    "learned": ["model.learned_positions=true"],
}


def make_model(config: Config) -> GPT:
    """A model of zeros: only its sizes matter here."""
    shapes = eqx.filter_eval_shape(
        lambda key: GPT(config.model, VOCAB, SEQ_LEN, key=key), jax.random.key(0)
    )
    is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)  # noqa: E731
    return jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype) if is_shape(leaf) else leaf, shapes
    )


def attention_parameters(mha_type: AttentionType) -> int:
    """Of one layer, as design.md counts them."""
    match mha_type:
        case AttentionType.standard | AttentionType.gqa | AttentionType.mqa:
            return 2 * WIDTH * HEADS * HEAD_DIM + 2 * WIDTH * KV_HEADS[mha_type] * HEAD_DIM
        case AttentionType.selective:
            return 2 * WIDTH * WIDTH + 2 * WIDTH * 2 * WIDTH  # keys and values read [query | token]
        case AttentionType.mla:
            latents = WIDTH * (LATENT + ROPE) + LATENT + LATENT * HEADS * (NOPE + VALUE)
            return WIDTH * HEADS * (NOPE + ROPE) + latents + HEADS * VALUE * WIDTH
        case AttentionType.equinox:
            return 4 * WIDTH * WIDTH


def cache_floats(mha_type: AttentionType) -> int:
    """Per token and layer."""
    match mha_type:
        case AttentionType.standard | AttentionType.gqa | AttentionType.mqa:
            return 2 * KV_HEADS[mha_type] * HEAD_DIM
        case AttentionType.selective:
            return 2 * WIDTH
        case AttentionType.mla:
            return LATENT + ROPE
        case AttentionType.equinox:
            return WIDTH


@pytest.mark.parametrize("head", HEADS_OPTIONS)
def test_parameters_are_counted_by_part_and_add_up(mha_type, head):
    model = make_model(small_config(f"model.mha_type={mha_type.name}", *HEADS_OPTIONS[head]))
    parts = count_parameters(model)
    assert sum(parts.values()) == sum(
        leaf.size for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    )
    expected = {
        "token embedding": VOCAB * WIDTH,
        "position embedding": SEQ_LEN * WIDTH if head == "learned" else 0,
        "attention, 2 layers": LAYERS * attention_parameters(mha_type),
        "feed-forward, 2 layers": LAYERS * 2 * WIDTH * 4 * WIDTH,
        "norms": (2 * LAYERS + 1) * WIDTH,
        "output head": 0 if head == "tied" else VOCAB * WIDTH,
    }
    assert parts == {name: number for name, number in expected.items() if number}


@pytest.mark.parametrize(
    ("overrides", "part", "expected"),
    [
        (
            ["model.activation=swiglu", "model.d_ff=10"],
            "feed-forward, 2 layers",
            LAYERS * 3 * WIDTH * 10,
        ),
        (["model.norm_position=post"], "norms", 2 * LAYERS * WIDTH),
        (["model.head_dim=6"], "attention, 2 layers", LAYERS * 4 * WIDTH * HEADS * 6),
        (
            ["model.qk_norm=true"],
            "attention, 2 layers",
            LAYERS * (4 * WIDTH * WIDTH + 2 * HEAD_DIM),
        ),
        (
            ["model.mha_type=mla", "model.mla.q_lora_rank=3"],
            "attention, 2 layers",
            LAYERS
            * (
                attention_parameters(AttentionType.mla)
                - WIDTH * HEADS * (NOPE + ROPE)
                + WIDTH * 3
                + 3
                + 3 * HEADS * (NOPE + ROPE)
            ),
        ),
    ],
)
def test_options_change_the_parameters_of_their_part(overrides, part, expected):
    assert count_parameters(make_model(small_config(*overrides)))[part] == expected


def test_the_default_model_has_about_0_8_million_parameters():
    assert sum(count_parameters(make_model(make_config())).values()) == pytest.approx(
        0.8e6, rel=0.05
    )


def test_cache_bytes_follow_the_formula_of_each_type_and_halve_in_bfloat16(mha_type):
    model = make_model(small_config(f"model.mha_type={mha_type.name}"))
    assert kv_cache_bytes_per_token(model, jnp.float32) == 4 * LAYERS * cache_floats(mha_type)
    assert kv_cache_bytes_per_token(model, jnp.bfloat16) == 2 * LAYERS * cache_floats(mha_type)
    cache = eqx.filter_eval_shape(lambda: model.init_cache(SEQ_LEN))
    assert sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)
    ) == SEQ_LEN * kv_cache_bytes_per_token(model, jnp.float32)


@pytest.mark.parametrize("tied", [False, True])
def test_operations_are_six_per_parameter_that_multiplies_and_twelve_per_score(mha_type, tied):
    config = small_config(f"model.mha_type={mha_type.name}", f"model.tie_embeddings={tied}")
    model = make_model(config)
    norms = (2 * LAYERS + 1) * WIDTH
    parameters = (
        LAYERS * (attention_parameters(mha_type) + 8 * WIDTH * WIDTH) + norms + VOCAB * WIDTH
    )  # the head, once
    width = HEADS * (NOPE + ROPE) if mha_type is AttentionType.mla else HEADS * HEAD_DIM
    for seq_len in (1, SEQ_LEN, 1000):
        assert (
            flops_per_token(model, config.model, seq_len)
            == 6 * parameters + 12 * LAYERS * width * seq_len
        )


def test_a_wider_head_costs_more_operations():
    config = small_config("model.head_dim=6")
    parameters = (
        LAYERS * (4 * WIDTH * HEADS * 6 + 8 * WIDTH * WIDTH)
        + (2 * LAYERS + 1) * WIDTH
        + VOCAB * WIDTH
    )
    expected = 6 * parameters + 12 * LAYERS * HEADS * 6 * SEQ_LEN
    assert flops_per_token(make_model(config), config.model, SEQ_LEN) == expected


def test_learned_positions_are_looked_up_and_cost_no_operations():
    plain, learned = small_config(), small_config("model.learned_positions=true")
    costs = [
        flops_per_token(make_model(config), config.model, SEQ_LEN) for config in (plain, learned)
    ]
    assert costs[0] == costs[1]
