"""Attention itself: softmax(q·k) v, by the kernel that suits the device."""

import dataclasses
import functools
import math
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BLOCK = 64  # queries that read keys together, at least
MAX_BLOCKS = 16  # of a sequence: each is compiled by itself
CHUNK = 32  # tokens that read their window together, at least

Queries = Float[Array, "t n d"]
Keys = Float[Array, "s k d"]
Values = Float[Array, "s k v"]
Shared = tuple[Float[Array, "t n e"], Float[Array, "s e"]] | None
Heads = Float[Array, "n _ _"]  # heads first: [n, position, width]


class Reading(eqx.Module):
    """Which keys a query reads, and what else decides how much: the same for every type.

    A query reads the keys at its own position and before, the last `window` of them if that is
    given. Without `positions`, queries and keys are those of one sequence from its beginning:
    causal attention as a fact, which needs no array and lets half of the scores go uncomputed.
    """

    positions: tuple[Int[Array, " t"], Int[Array, " s"]] | None = None  # below 0: an empty key
    # A logit per head that takes weight and gives no value (gpt-oss; arXiv 2309.17453)
    sink: Float[Array, " n"] | None = None
    window: int | None = eqx.field(static=True, default=None)
    alibi: bool = eqx.field(static=True, default=False)  # arXiv 2108.12409

    def key_positions(self, length: int) -> Int[Array, " s"]:
        return jnp.arange(length) if self.positions is None else self.positions[1]

    def mask(self, num_queries: int, num_keys: int) -> Bool[Array, "t s"]:
        """True: is read."""
        distance = self._distance(num_queries, num_keys)
        read = distance >= 0
        if self.window is not None:
            read &= distance < self.window
        return read if self.positions is None else read & (self.positions[1] >= 0)

    def scores(self, scores: Float[Array, "*n t s"]) -> Float[Array, "*n t s"]:
        """`scores` in float32, with what a head adds by distance, and -inf for keys not read."""
        scores, sizes = scores.astype(jnp.float32), scores.shape[-2:]
        if self.alibi:
            slopes = alibi_slopes(math.prod(scores.shape[:-2])).reshape(*scores.shape[:-2], 1, 1)
            scores = scores - slopes * self._distance(*sizes)
        return jnp.where(self.mask(*sizes), scores, -jnp.inf)

    def softmax(self, scores: Float[Array, "*n t s"], dtype: Any) -> Float[Array, "*n t s"]:
        """Weights of the keys, in float32 until they are done; less than 1 in all with a sink."""
        scores = self.scores(scores)
        if self.sink is None:
            return jax.nn.softmax(scores, axis=-1).astype(dtype)
        sink = self.sink.astype(jnp.float32).reshape(*scores.shape[:-2], 1, 1)
        column = jnp.broadcast_to(sink, (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, column], axis=-1), axis=-1)
        return weights[..., :-1].astype(dtype)

    def _distance(self, num_queries: int, num_keys: int) -> Int[Array, "t s"]:
        """How far before a query each key is."""
        rows, columns = self.positions or (jnp.arange(num_queries), jnp.arange(num_keys))
        return rows[:, None] - columns[None, :]


CAUSAL = Reading()


def alibi_slopes(num_heads: int) -> Float[Array, " n"]:
    """2^(-8/n), 2^(-16/n), …, 2^-8; for other n than powers of two as in the paper's code."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (i + 1) / power) for i in range(0, 2 * (num_heads - power), 2)]
    return jnp.array(slopes, jnp.float32)


def cuda_capability() -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU, such as (9, 0); None on anything else."""
    device = jax.devices()[0]
    found = re.fullmatch(r"(\d+)\.(\d+)", getattr(device, "compute_capability", ""))
    return (int(found[1]), int(found[2])) if found else None  # ROCm has names such as gfx90a


def fused_kernel(dtype: Any, width: int, length: int, reading: Reading = CAUSAL) -> bool:
    """Whether cuDNN has a plan for fused attention, forward and backward.

    Asked of cuDNN 9.28: on Ampere and later, for 16-bit numbers, widths up to 128 that are
    multiples of 8, and more than one query (docs/gpu.md). It knows windows, but no sinks, and a
    bias by distance only as an array of all scores.
    """
    fits = jnp.dtype(dtype).itemsize == 2 and width % 8 == 0 and width <= 128 and length > 1
    plain = reading.sink is None and not reading.alibi
    return fits and plain and (cuda_capability() or (0, 0)) >= (8, 0)


def join_shared(queries: Queries, keys: Keys, shared: Shared) -> tuple[Array, Array]:
    """Queries and keys with their shared part appended, its one key repeated for every head."""
    if shared is None:
        return queries, keys
    everywhere = jnp.broadcast_to(shared[1][:, None], (*keys.shape[:2], shared[1].shape[-1]))
    queries = jnp.concatenate([queries, shared[0]], axis=-1)
    return queries, jnp.concatenate([keys, everywhere], axis=-1)


def shared_scores(shared: Shared, scale: float) -> Float[Array, "n t s"] | None:
    """What the shared part adds to the scores, if there is one."""
    return None if shared is None else jnp.einsum("tne,se->nts", shared[0] * scale, shared[1])


def attention_weights(
    queries: Queries, keys: Keys, reading: Reading, scale: float, shared: Shared = None
) -> Float[Array, "n t s"]:
    """What `dot_product_attention` weights the values with."""
    queries, keys = join_shared(queries, keys, shared)
    keys = jnp.repeat(keys, queries.shape[1] // keys.shape[1], axis=1)
    scores = jnp.einsum("tnd,snd->nts", queries * scale, keys)
    return reading.softmax(scores, queries.dtype)


def dot_product_attention(
    queries: Queries,
    keys: Keys,
    values: Values,
    reading: Reading,
    scale: float,
    shared: Shared = None,
) -> Float[Array, "t n v"]:
    """softmax(scale * q·k) v, query head i reading key/value head floor(i / g); softmax in float32.

    `shared` is a further part of the queries, and of the keys one that all heads share: its
    products are added to the scores, as if the two parts were concatenated. A whole sequence
    reaches cuDNN's fused kernel where that applies, `local` if its window is short, `blocked` on a
    CPU, XLA as it is otherwise.
    """
    if reading.positions is None:
        # Over many queries one long product beats a sum of two; over one, it would copy the cache.
        queries, keys = join_shared(queries, keys, shared)
        shared, width, length = None, values.shape[-1], len(queries)
        fused = fused_kernel(queries.dtype, keys.shape[-1], length, reading)
        if width <= keys.shape[-1] and fused:
            # The kernel wants one width: zeros added to the values come out as zeros.
            values = jnp.pad(values, ((0, 0), (0, 0), (0, keys.shape[-1] - width)))
            window = None if reading.window is None else (reading.window - 1, 0)
            attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
            out = attend(
                queries, keys, values, scale=scale, is_causal=True, local_window_size=window
            )
            return out[..., :width]
        # Scores outweigh keys here: a copy of the few keys for every query head beats an axis of
        # groups in the many scores.
        group = queries.shape[1] // keys.shape[1]
        keys, values = jnp.repeat(keys, group, axis=1), jnp.repeat(values, group, axis=1)
        if reading.window is not None and length > 2 * max(CHUNK, reading.window):
            return local(queries, keys, values, reading, scale)
        if length > BLOCK and jax.default_backend() == "cpu":
            heads = (heads_first(x) for x in (queries * scale, keys, values))
            rule = dataclasses.replace(reading, sink=None)
            out = blocked(*heads, reading.sink, rule, max(BLOCK, -(-length // MAX_BLOCKS)))
            return jax.lax.optimization_barrier(out).transpose(1, 0, 2)
    bias = shared_scores(shared, scale)
    queries = queries * scale
    if keys.shape[1] == queries.shape[1]:
        scores = jnp.einsum("tnd,snd->nts", queries, keys)
        weights = reading.softmax(scores if bias is None else scores + bias, values.dtype)
        return jnp.einsum("nts,snv->tnv", weights, values)
    # Keys and values stay as few as they are: a decoded token reads the cache once.
    grouped = queries.reshape(queries.shape[0], keys.shape[1], -1, queries.shape[-1])
    scores = jnp.einsum("tkgd,skd->kgts", grouped, keys)
    scores = scores if bias is None else scores + bias.reshape(scores.shape)
    out = jnp.einsum("kgts,skv->tkgv", reading.softmax(scores, values.dtype), values)
    return out.reshape(*queries.shape[:2], values.shape[-1])


def local(
    queries: Queries, keys: Keys, values: Values, reading: Reading, scale: float
) -> Float[Array, "t n v"]:
    """Attention with a window: chunks at least as long, each reading itself and the one before.

    Work and memory are O(t · window), not O(t²) (Longformer, arXiv 2004.05150).
    """
    assert reading.window is not None
    length, size = len(queries), max(CHUNK, reading.window)
    count = -(-length // size)

    def chunks(x: Float[Array, "s n d"]) -> Float[Array, "count size n d"]:
        padded = jnp.pad(x, ((0, count * size - length), (0, 0), (0, 0)))
        return padded.reshape(count, size, *x.shape[1:])

    def with_previous(x: Float[Array, "s n d"]) -> Float[Array, "count both n d"]:
        own = chunks(x)
        return jnp.concatenate([jnp.pad(own, ((1, 0), *3 * [(0, 0)]))[:-1], own], axis=1)

    def attend(start: Int[Array, ""], q: Queries, k: Keys, v: Values) -> Float[Array, "t n v"]:
        positions = start + jnp.arange(size), start - size + jnp.arange(2 * size)
        return dot_product_attention(
            q, k, v, dataclasses.replace(reading, positions=positions), scale
        )

    starts = size * jnp.arange(count)
    out = jax.vmap(attend)(starts, chunks(queries), with_previous(keys), with_previous(values))
    return out.reshape(count * size, *out.shape[2:])[:length]


def heads_first(x: Float[Array, "s n d"]) -> Heads:
    """[n, s, d], copied once: XLA's CPU products read it in order, at twice the speed."""
    return jax.lax.optimization_barrier(x.transpose(1, 0, 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def blocked(
    queries: Heads,
    keys: Heads,
    values: Heads,
    sink: Float[Array, " n"] | None,
    reading: Reading,
    size: int,
) -> Heads:
    """Causal attention of `size` queries at a time, which read the keys up to their own end.

    The other half of the scores is never computed. The backward pass computes a block's scores
    again (FlashAttention, arXiv 2205.14135): memory is O(t · size), not O(t²). For that, blocks
    must follow one another, while XLA would compute all of them at once: `after`, a zero, makes
    each depend on the one before it.
    """
    return blocked_forward(queries, keys, values, sink, reading, size)[0]


def blocks(length: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(length, start + size)) for start in range(0, length, size)]


def block_scores(queries: Heads, keys: Heads, start: int, reading: Reading) -> Heads:
    """Scores of queries that begin at position `start`, in float32; -inf for keys not read."""
    scores = jnp.einsum("ntd,nsd->nts", queries, keys)
    positions = start + jnp.arange(queries.shape[1]), jnp.arange(keys.shape[1])
    return dataclasses.replace(reading, positions=positions).scores(scores)


def blocked_forward(
    queries: Heads,
    keys: Heads,
    values: Heads,
    sink: Float[Array, " n"] | None,
    reading: Reading,
    size: int,
) -> tuple[Heads, tuple[Any, ...]]:
    """The output, and what the backward pass needs: log-sum-exp of every query's scores."""
    outs, norms = [], []
    after = jnp.zeros((), queries.dtype)
    own = None if sink is None else sink.astype(jnp.float32)[:, None, None]
    for start, end in blocks(queries.shape[1], size):
        scores = block_scores(queries[:, start:end] + after, keys[:, :end], start, reading)
        highest = scores.max(axis=-1, keepdims=True)
        if own is not None:
            highest = jnp.maximum(highest, own)
        weights = jnp.exp(scores - highest)
        total = weights.sum(axis=-1, keepdims=True)
        if own is not None:
            total = total + jnp.exp(own - highest)
        out = jnp.einsum("nts,nsv->ntv", weights.astype(values.dtype), values[:, :end])
        outs.append((out / total).astype(values.dtype))
        norms.append(highest + jnp.log(total))
        after = 0 * outs[-1][0, 0, 0]
    out, norm = jnp.concatenate(outs, axis=1), jnp.concatenate(norms, axis=1)
    return out, (queries, keys, values, sink, out, norm)


def blocked_backward(
    reading: Reading, size: int, kept: tuple[Any, ...], grad: Heads
) -> tuple[Array | None, ...]:
    """Gradients of queries, keys, values and the sink."""
    queries, keys, values, sink, out, norm = kept
    grad = jax.lax.optimization_barrier(grad)
    overlap = jnp.sum((grad * out).astype(jnp.float32), axis=-1, keepdims=True)
    d_queries, d_keys, d_values = [], jnp.zeros_like(keys), jnp.zeros_like(values)
    after = jnp.zeros((), queries.dtype)
    for start, end in blocks(queries.shape[1], size):
        rows = slice(start, end)
        q, k, v, g = queries[:, rows] + after, keys[:, :end], values[:, :end], grad[:, rows] + after
        weights = jnp.exp(block_scores(q, k, start, reading) - norm[:, rows])
        d_weights = jnp.einsum("ntv,nsv->nts", g, v)
        d_scores = (weights * (d_weights - overlap[:, rows])).astype(q.dtype)
        d_values = d_values.at[:, :end].add(jnp.einsum("nts,ntv->nsv", weights.astype(g.dtype), g))
        d_keys = d_keys.at[:, :end].add(jnp.einsum("nts,ntd->nsd", d_scores, q))
        d_queries.append(jnp.einsum("nts,nsd->ntd", d_scores, k))
        after = 0 * (d_queries[-1][0, 0, 0] + d_keys[0, 0, 0] + d_values[0, 0, 0])
    d_sink = None
    if sink is not None:  # Its weight times the gradient of its score; its value is zero
        weights = jnp.exp(sink.astype(jnp.float32)[:, None, None] - norm)
        d_sink = -(weights * overlap).sum(axis=(1, 2)).astype(sink.dtype)
    return jnp.concatenate(d_queries, axis=1), d_keys, d_values, d_sink


blocked.defvjp(blocked_forward, blocked_backward)
