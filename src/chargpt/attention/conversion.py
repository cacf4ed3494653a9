"""An attention layer of one type with the weights of another, where that is possible."""

from enum import StrEnum
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from chargpt.attention import AbstractAttention, GroupedQueryAttention, filled_in
from chargpt.config import require_divides
from chargpt.errors import require

# How the key/value heads of a group become one: their mean, the first of them, or a new one.
Pool = StrEnum("Pool", ["mean", "first", "random"])


def convert(
    layer: AbstractAttention, wanted: AbstractAttention, pool: Pool, *, key: PRNGKeyArray
) -> AbstractAttention | None:
    """`layer` as one of the type and sizes of `wanted`, which has shapes in place of arrays.

    Grouped-query attention to fewer key/value heads, standard attention being that with the most:
    adjacent heads are pooled (GQA, arXiv 2305.13245, section 2.1). Queries and the output stay as
    they are. None if there is no way from the one type to the other.
    """
    if not (isinstance(layer, GroupedQueryAttention) and isinstance(wanted, GroupedQueryAttention)):
        return None
    number, fewer, width = layer.num_kv_heads, wanted.num_kv_heads, layer.head_dim
    for name in ("d_model", "num_heads", "head_dim"):
        had, asked = getattr(layer, name), getattr(wanted, name)
        require(had == asked, f"model.{name}={asked}: is {had} in that run, and stays so")
    require_divides("model.num_kv_heads", fewer, number, "the key/value heads of that run")

    def pooled(weight: Float[Array, "kh m"], key: PRNGKeyArray) -> Float[Array, "fewer m"]:
        heads = weight.reshape(fewer, number // fewer, width, -1)
        match pool:
            case Pool.mean:
                heads = heads.mean(axis=1)
            case Pool.first:
                heads = heads[:, 0]
            case Pool.random:
                heads = weight.std() * jax.random.normal(key, heads[:, 0].shape)
        return heads.reshape(fewer * width, -1)

    def weights(layer: GroupedQueryAttention) -> list[Any]:
        return [layer.k_proj.weight, layer.v_proj.weight]

    keys = jax.random.split(key)
    fewer_heads = [pooled(*pair) for pair in zip(weights(layer), keys, strict=True)]
    return filled_in(wanted, eqx.tree_at(weights, layer, fewer_heads))
