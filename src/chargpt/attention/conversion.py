"""An attention layer of one type with the weights of another, where that is possible."""

import math
from enum import StrEnum
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from chargpt.attention import (
    AbstractAttention,
    GroupedQueryAttention,
    MultiHeadLatentAttention,
    filled_in,
)
from chargpt.config import require_divides
from chargpt.errors import require

# How the key/value heads of a group become one: their mean, the first of them, or a new one.
Pool = StrEnum("Pool", ["mean", "first", "random"])
Error = Float[Array, ""]  # Frobenius norm of what is lost of W_k and W_v, to that of both
Converted = tuple[AbstractAttention, Error]


def convert(
    layer: AbstractAttention, wanted: AbstractAttention, pool: Pool | None, *, key: PRNGKeyArray
) -> Converted | None:
    """`layer` as one of the type and sizes of `wanted`, which has shapes in place of arrays.

    From grouped-query attention, standard attention being that with the most key/value heads.
    ConfigError for sizes that do not fit; None if there is no way from the one type to the other.
    """
    match layer, wanted:
        case GroupedQueryAttention(), GroupedQueryAttention():
            return fewer_heads(layer, wanted, pool or Pool.mean, key)
        case GroupedQueryAttention(), MultiHeadLatentAttention():
            require(pool is None, f"pool={pool}: MLA pools no heads; leave it out")
            return latent(layer, wanted, key)
        case _:
            return None


def fewer_heads(
    layer: GroupedQueryAttention, wanted: GroupedQueryAttention, pool: Pool, key: PRNGKeyArray
) -> Converted:
    """Adjacent key/value heads pooled (GQA, arXiv 2305.13245, section 2.1); all else stays."""
    number, fewer, width = layer.num_kv_heads, wanted.num_kv_heads, layer.head_dim
    require_divides("key/value heads", fewer, number, "those of that run")

    def pooled(weight: Float[Array, "kh m"], key: PRNGKeyArray) -> tuple[Array, Array]:
        """The pooled weight, and what each of its heads was before minus what it is now."""
        heads = weight.reshape(fewer, number // fewer, width, -1)
        match pool:
            case Pool.mean:
                new = heads.mean(axis=1)
            case Pool.first:
                new = heads[:, 0]
            case Pool.random:
                new = weight.std() * jax.random.normal(key, heads[:, 0].shape)
        return new.reshape(fewer * width, -1), heads - new[:, None]

    def weights(layer: GroupedQueryAttention) -> list[Any]:
        return [layer.k_proj.weight, layer.v_proj.weight]

    pairs = zip(weights(layer), jax.random.split(key), strict=True)
    new, lost = zip(*(pooled(*pair) for pair in pairs), strict=True)
    converted = filled_in(wanted, eqx.tree_at(weights, layer, list(new)))
    return converted, size(*lost) / size(*weights(layer))


def latent(
    layer: GroupedQueryAttention, wanted: MultiHeadLatentAttention, key: PRNGKeyArray
) -> Converted:
    """Keys and values made from a latent: W = [W_k ; W_v] by its r largest singular values.

    Exact if r is at least the rank of W, at most 2kh (TransMLA, arXiv 2502.07864). The rotary key
    that all heads share is met by queries of zero, and the norm of the latent must be off, because
    it is not linear. With RoPE every key is rotary, so there may be only one: that of multi-query
    attention becomes the shared one, and W is W_v, of rank h at most.
    """
    n, k, h = layer.num_heads, layer.num_kv_heads, layer.head_dim
    rope, dn, dr = layer.rope_theta is not None, wanted.qk_nope_head_dim, wanted.qk_rope_head_dim
    many = f"model.mha_type=mla: the {k} key heads of that run turn by RoPE, and MLA has one that"
    require(not rope or k == 1, f"{many} does; convert to model.mha_type=mqa first")
    require(layer.q_norm is None, "model.mha_type=mla: that run has query and key norms, MLA none")
    fixed = {"num_heads": (wanted.num_heads, n), "mla.v_head_dim": (wanted.v_head_dim, h)}
    needed = {"mla.qk_rope_head_dim": (dr, h)} if rope else {"mla.qk_nope_head_dim": (dn, h)}
    for name, (asked, needs) in (fixed | needed).items():
        require(asked == needs, f"model.{name}={asked}: that run needs {needs}; write that")
    plain = wanted.kv_a_norm is None
    require(plain, "model.mla.latent_norm=true: is not linear; write model.mla.latent_norm=false")
    require(
        wanted.q_proj is not None, "model.mla.q_lora_rank: queries stay as they are; write null"
    )

    keys, values = layer.k_proj.weight, layer.v_proj.weight
    whole = values if rope else jnp.concatenate([keys, values])
    left, singular, right = jnp.linalg.svd(whole, full_matrices=False)
    rank = wanted.kv_lora_rank
    kept = min(rank, len(singular))
    rank_key, head_key = jax.random.split(key)

    def small(key: PRNGKeyArray, *shape: int) -> Array:
        """What meets zeros: with zeros on both sides, neither would ever learn."""
        return keys.std() * jax.random.normal(key, shape)

    up = jnp.pad(left[:, :kept] * singular[:kept], ((0, 0), (0, rank - kept)))  # [_, r]
    spare = small(rank_key, rank - kept, layer.d_model)
    down = jnp.concatenate([right[:kept], spare])  # [r, m]

    def per_head(rows: Float[Array, "kh r"]) -> Float[Array, "n h r"]:
        return jnp.repeat(rows.reshape(k, h, rank), n // k, axis=0)

    key_half = small(head_key, n, dn, rank) if rope else per_head(up[: k * h])
    kv_b = jnp.concatenate([key_half, per_head(up[-k * h :])], axis=1)
    shared_key = keys if rope else small(head_key, dr, layer.d_model)
    # The scale of MLA is that of its wider heads
    queries = layer.q_proj.weight.reshape(n, h, -1) * math.sqrt((dn + dr) / h)
    nothing = jnp.zeros((n, dn if rope else dr, layer.d_model))
    queries = jnp.concatenate([nothing, queries] if rope else [queries, nothing], axis=1)
    arrays = {
        "q_proj": queries.reshape(n * (dn + dr), -1),
        "kv_a_proj": jnp.concatenate([down, shared_key]),
        "kv_b_proj": kv_b.reshape(-1, rank),
        "o_proj": layer.o_proj.weight,
    }

    def weights(layer: MultiHeadLatentAttention) -> list[Any]:
        return [getattr(layer, name).weight for name in arrays]

    error = size(singular[kept:]) / size(keys, values)
    return eqx.tree_at(weights, wanted, list(arrays.values())), error


def size(*arrays: Array) -> Float[Array, ""]:
    """Frobenius norm of all of them together."""
    return jnp.sqrt(sum((jnp.sum(jnp.square(array)) for array in arrays), jnp.zeros(())))
