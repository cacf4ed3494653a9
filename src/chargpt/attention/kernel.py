"""Attention itself: softmax(q·k) v, by the kernel that suits the device."""

import functools
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

BLOCK = 64  # queries that read keys together, at least
MAX_BLOCKS = 16  # of a sequence: each is compiled by itself

Queries = Float[Array, "t n d"]
Keys = Float[Array, "s k d"]
Values = Float[Array, "s k v"]
Shared = tuple[Float[Array, "t n e"], Float[Array, "s e"]] | None
Heads = Float[Array, "n _ _"]  # heads first: [n, position, width]
# Which keys each query reads: a boolean array, True = attend; or the fact "causal", which needs
# no array and lets the other half of the scores go uncomputed.
Mask = Bool[Array, "t s"] | Literal["causal"]


def cuda_capability() -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU, such as (9, 0); None on anything else."""
    device = jax.devices()[0]
    found = re.fullmatch(r"(\d+)\.(\d+)", getattr(device, "compute_capability", ""))
    return (int(found[1]), int(found[2])) if found else None  # ROCm has names such as gfx90a


def fused_kernel(dtype: Any, width: int, length: int) -> bool:
    """Whether cuDNN has a plan for fused attention, forward and backward.

    Asked of cuDNN 9.28: on Ampere and later, for 16-bit numbers, widths up to 128 that are
    multiples of 8, and more than one query (docs/gpu.md).
    """
    fits = jnp.dtype(dtype).itemsize == 2 and width % 8 == 0 and width <= 128 and length > 1
    return fits and (cuda_capability() or (0, 0)) >= (8, 0)


def softmax(scores: Float[Array, "*n t s"], mask: Bool[Array, "t s"], dtype: Any) -> Array:
    """Over the keys that `mask` lets a query read, in float32."""
    masked = jnp.where(mask, scores.astype(jnp.float32), -jnp.inf)
    return jax.nn.softmax(masked, axis=-1).astype(dtype)


def join_shared(queries: Queries, keys: Keys, shared: Shared) -> tuple[Array, Array]:
    """Queries and keys with their shared part appended, its one key repeated for every head."""
    if shared is None:
        return queries, keys
    everywhere = jnp.broadcast_to(shared[1][:, None], (*keys.shape[:2], shared[1].shape[-1]))
    queries = jnp.concatenate([queries, shared[0]], axis=-1)
    return queries, jnp.concatenate([keys, everywhere], axis=-1)


def causal_weights(
    queries: Queries, keys: Keys, scale: float, shared: Shared = None
) -> Float[Array, "n t s"]:
    """What causal `dot_product_attention` weights the values with."""
    queries, keys = join_shared(queries, keys, shared)
    keys = jnp.repeat(keys, queries.shape[1] // keys.shape[1], axis=1)
    scores = jnp.einsum("tnd,snd->nts", queries * scale, keys)
    return softmax(scores, jnp.tri(len(queries), len(keys), dtype=bool), queries.dtype)


def dot_product_attention(
    queries: Queries, keys: Keys, values: Values, mask: Mask, scale: float, shared: Shared = None
) -> Float[Array, "t n v"]:
    """softmax(scale * q·k) v, query head i reading key/value head floor(i / g); softmax in float32.

    `shared` is a further part of the queries, and of the keys one that all heads share: its
    products are added to the scores, as if the two parts were concatenated. The fact "causal"
    reaches cuDNN's fused kernel where that applies, `blocked` on a CPU, XLA as it is otherwise.
    """
    if isinstance(mask, str):
        # Over many queries one long product beats a sum of two; over one, it would copy the cache.
        queries, keys = join_shared(queries, keys, shared)
        shared, width, length = None, values.shape[-1], len(queries)
        if width <= keys.shape[-1] and fused_kernel(queries.dtype, keys.shape[-1], length):
            # The kernel wants one width: zeros added to the values come out as zeros.
            values = jnp.pad(values, ((0, 0), (0, 0), (0, keys.shape[-1] - width)))
            fused = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
            return fused(queries, keys, values, scale=scale, is_causal=True)[..., :width]
        # Scores outweigh keys here: a copy of the few keys for every query head beats an axis of
        # groups in the many scores.
        group = queries.shape[1] // keys.shape[1]
        keys, values = jnp.repeat(keys, group, axis=1), jnp.repeat(values, group, axis=1)
        if length > BLOCK and jax.default_backend() == "cpu":
            heads = (heads_first(x) for x in (queries * scale, keys, values))
            out = blocked(*heads, max(BLOCK, -(-length // MAX_BLOCKS)))
            return jax.lax.optimization_barrier(out).transpose(1, 0, 2)
        mask = jnp.tri(length, dtype=bool)
    bias = jnp.einsum("tne,se->nts", shared[0] * scale, shared[1]) if shared else None
    queries = queries * scale
    if keys.shape[1] == queries.shape[1]:
        scores = jnp.einsum("tnd,snd->nts", queries, keys)
        weights = softmax(scores if bias is None else scores + bias, mask, values.dtype)
        return jnp.einsum("nts,snv->tnv", weights, values)
    # Keys and values stay as few as they are: a decoded token reads the cache once.
    grouped = queries.reshape(queries.shape[0], keys.shape[1], -1, queries.shape[-1])
    scores = jnp.einsum("tkgd,skd->kgts", grouped, keys)
    scores = scores if bias is None else scores + bias.reshape(scores.shape)
    out = jnp.einsum("kgts,skv->tkgv", softmax(scores, mask, values.dtype), values)
    return out.reshape(*queries.shape[:2], values.shape[-1])


def heads_first(x: Float[Array, "s n d"]) -> Heads:
    """[n, s, d], copied once: XLA's CPU products read it in order, at twice the speed."""
    return jax.lax.optimization_barrier(x.transpose(1, 0, 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def blocked(queries: Heads, keys: Heads, values: Heads, size: int) -> Heads:
    """Causal attention of `size` queries at a time, which read the keys up to their own end.

    The other half of the scores is never computed. The backward pass computes a block's scores
    again (FlashAttention, arXiv 2205.14135): memory is O(t · size), not O(t²). For that, blocks
    must follow one another, while XLA would compute all of them at once: `after`, a zero, makes
    each depend on the one before it.
    """
    return blocked_forward(queries, keys, values, size)[0]


def blocks(length: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(length, start + size)) for start in range(0, length, size)]


def block_scores(queries: Heads, keys: Heads, start: int) -> Heads:
    """Scores of queries that begin at position `start`, in float32; -inf for later keys."""
    scores = jnp.einsum("ntd,nsd->nts", queries, keys).astype(jnp.float32)
    causal = jnp.tri(queries.shape[1], keys.shape[1], start, dtype=bool)
    return jnp.where(causal, scores, -jnp.inf)


def blocked_forward(
    queries: Heads, keys: Heads, values: Heads, size: int
) -> tuple[Heads, tuple[Heads, ...]]:
    """The output, and what the backward pass needs: log-sum-exp of every query's scores."""
    outs, norms = [], []
    after = jnp.zeros((), queries.dtype)
    for start, end in blocks(queries.shape[1], size):
        scores = block_scores(queries[:, start:end] + after, keys[:, :end], start)
        highest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(axis=-1, keepdims=True)
        out = jnp.einsum("nts,nsv->ntv", weights.astype(values.dtype), values[:, :end])
        outs.append((out / total).astype(values.dtype))
        norms.append(highest + jnp.log(total))
        after = 0 * outs[-1][0, 0, 0]
    out, norm = jnp.concatenate(outs, axis=1), jnp.concatenate(norms, axis=1)
    return out, (queries, keys, values, out, norm)


def blocked_backward(size: int, kept: tuple[Heads, ...], grad: Heads) -> tuple[Heads, Heads, Heads]:
    """Gradients of queries, keys and values."""
    queries, keys, values, out, norm = kept
    grad = jax.lax.optimization_barrier(grad)
    overlap = jnp.sum((grad * out).astype(jnp.float32), axis=-1, keepdims=True)
    d_queries, d_keys, d_values = [], jnp.zeros_like(keys), jnp.zeros_like(values)
    after = jnp.zeros((), queries.dtype)
    for start, end in blocks(queries.shape[1], size):
        rows = slice(start, end)
        q, k, v, g = queries[:, rows] + after, keys[:, :end], values[:, :end], grad[:, rows] + after
        weights = jnp.exp(block_scores(q, k, start) - norm[:, rows])
        d_weights = jnp.einsum("ntv,nsv->nts", g, v)
        d_scores = (weights * (d_weights - overlap[:, rows])).astype(q.dtype)
        d_values = d_values.at[:, :end].add(jnp.einsum("nts,ntv->nsv", weights.astype(g.dtype), g))
        d_keys = d_keys.at[:, :end].add(jnp.einsum("nts,ntd->nsd", d_scores, q))
        d_queries.append(jnp.einsum("nts,nsd->ntd", d_scores, k))
        after = 0 * (d_queries[-1][0, 0, 0] + d_keys[0, 0, 0] + d_values[0, 0, 0])
    return jnp.concatenate(d_queries, axis=1), d_keys, d_values


blocked.defvjp(blocked_forward, blocked_backward)
