"""Attention types behind one interface; `make_attention` is the only place that knows them all."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, assert_never

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from chargpt.attention.base import AbstractAttention
from chargpt.attention.grouped import GroupedQueryAttention
from chargpt.attention.latent import MultiHeadLatentAttention
from chargpt.attention.modifiers import Modifiers
from chargpt.attention.reference import EquinoxAttention
from chargpt.attention.selective import SelectiveAttention
from chargpt.config import (
    AttentionType,
    ModelConfig,
    OutputGate,
    Positions,
    Sink,
    require_divides,
    spell,
)
from chargpt.errors import ConfigError

Built = TypeVar("Built")

# Options that a type need not implement, with the value that asks nothing of it.
OPTIONAL = {"qk_norm": False, "head_dim": None, "rope": True}
# Options that cross the types, which a type has unless it refuses them, likewise.
CROSSING = {"output_gate": OutputGate.none, "sink": Sink.none, "window": None, "alibi": False}


def make_attention(config: ModelConfig, *, key: PRNGKeyArray) -> AbstractAttention:
    """The attention layer of `config.mha_type`; ConfigError for an option it does not accept."""
    layer = build(config, key)
    asked = vars(config) | {"rope": config.has_rope, "alibi": config.has_alibi}
    everything: dict[str, Any] = OPTIONAL | CROSSING
    for name, neutral in everything.items():
        accepted = name in layer.accepts if name in OPTIONAL else name not in layer.refuses
        if asked[name] == neutral or accepted:
            continue
        reason = f" ({layer.refuses[name]})" if name in layer.refuses else ""
        option, value = f"model.{name}", asked[name]
        if name in ("rope", "alibi") and config.positions is not None:
            option, value, neutral = "model.positions", config.positions, Positions.rope
        raise ConfigError(
            f"{option}={spell(value)}: {config.mha_type.name} attention does not implement it"
            f"{reason}; write {option}={spell(neutral)}"
        )
    return layer


def build(config: ModelConfig, key: PRNGKeyArray) -> AbstractAttention:
    theta = config.rope_theta if config.has_rope else None
    d_model, num_heads = config.d_model, config.num_heads
    match config.mha_type:
        case AttentionType.standard:
            return grouped(config, num_heads, theta, key)
        case AttentionType.gqa:
            return grouped(config, config.num_kv_heads or max(1, num_heads // 2), theta, key)
        case AttentionType.mqa:
            return grouped(config, 1, theta, key)
        case AttentionType.selective:
            return SelectiveAttention(d_model, num_heads, theta, key=key)
        case AttentionType.mla:
            sizes = dataclasses.asdict(config.mla)
            return MultiHeadLatentAttention(d_model, num_heads, **sizes, rope_theta=theta, key=key)
        case AttentionType.equinox:
            return EquinoxAttention(d_model, num_heads, theta, key=key)
        case _:
            assert_never(config.mha_type)


def grouped(
    config: ModelConfig, num_kv_heads: int, rope_theta: float | None, key: PRNGKeyArray
) -> GroupedQueryAttention:
    heads, d_model, head_dim = config.num_heads, config.d_model, config.head_dim
    if head_dim is None:
        require_divides("model.num_heads", heads, d_model, "model.d_model")
        head_dim = d_model // heads
    sizes = d_model, heads, num_kv_heads, head_dim
    return GroupedQueryAttention(*sizes, rope_theta, qk_norm=config.qk_norm, key=key)


def surplus_weights(config: ModelConfig) -> int:
    """How many more weights a layer of this type has than one of standard attention.

    The gate and the sink of each are counted.
    """

    def layer(config: ModelConfig, *, key: PRNGKeyArray) -> tuple[AbstractAttention, Modifiers]:
        attention = make_attention(config, key=key)
        return attention, Modifiers(config, attention, key=key)

    def size(config: ModelConfig) -> int:
        shapes = eqx.filter(abstract(layer, config), is_shape)
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    return size(config) - size(dataclasses.replace(config, mha_type=AttentionType.standard))


def abstract(make: Callable[..., Built], config: ModelConfig) -> Built:
    """What `make` builds from `config`, with shapes in place of arrays: no device is touched."""
    return eqx.filter_eval_shape(make, config, key=jax.ShapeDtypeStruct((2,), jnp.uint32))


def filled_in(shapes: Built, module: Any) -> Built:
    """`shapes` with the arrays of a module that has as many, in the same order."""
    found, rest = eqx.partition(shapes, is_shape)
    arrays = jax.tree.leaves(eqx.filter(module, eqx.is_array))
    return eqx.combine(jax.tree.unflatten(jax.tree.structure(found), arrays), rest)


def is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)
