"""What all attention types share: the glossary of axes, the interface, and the one call into the attention kernel.

Axes, in every einsum and every annotation of this package:

    t  query position        n  query heads            m  d_model, the width of the residual stream
    s  key position          k  key/value heads        r  kv_lora_rank, the width of MLA's latent
    h  head_dim              g  = n / k                f  d_ff
    d  width of queries and keys, v  width of values, where they differ from h; e  width of a key that all heads share
"""

import abc
import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, Literal, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

# Which keys each query reads: a boolean array, True = attend; or the fact "causal", which needs no array and which fused
# kernels turn into skipped work.
Mask = Bool[Array, "t s"] | Literal["causal"]


class AbstractAttention(eqx.Module):
    """Causal self-attention over one sequence; `jax.vmap` adds the batch.

    A variant says what tokens ask (`queries`), what they leave behind (`entries`), and how the asking reads what was left
    behind. `project` and `attend` are all that it defines. Training, scoring and decoding follow from them here, once, so
    that a cached decode equals the forward pass by construction.
    """

    d_model: eqx.AbstractVar[int]

    @abc.abstractmethod
    def project(self, x: Float[Array, "t m"], positions: Int[Array, " t"]) -> tuple[PyTree, PyTree]:
        """(queries, entries) of tokens `x` at absolute `positions`.

        `entries` are all that a later token may see of these ones, hence the KV cache; axis 0 of every leaf is position.
        """

    @abc.abstractmethod
    def attend(self, queries: PyTree, entries: PyTree, mask: Mask) -> Float[Array, "t m"]:
        """Read `entries`, merge the heads, apply the output projection."""

    @final
    def __call__(self, x: Float[Array, "t {self.d_model}"]) -> Float[Array, "t m"]:
        """The forward pass over a whole sequence, as in training and scoring."""
        queries, entries = self.project(x, jnp.arange(x.shape[0]))
        return self.attend(queries, entries, "causal")

    @final
    def init_cache(self, max_seq_len: int) -> PyTree[Shaped[Array, "max_seq_len ..."]]:
        """An empty KV cache: zeros shaped like the `entries` of `max_seq_len` tokens, in the dtype of the weights."""
        dtype = jnp.result_type(*jax.tree.leaves(eqx.filter(self, eqx.is_inexact_array)))
        x = jax.ShapeDtypeStruct((max_seq_len, self.d_model), dtype)
        positions = jax.ShapeDtypeStruct((max_seq_len,), jnp.int32)
        _, entries = eqx.filter_eval_shape(type(self).project, self, x, positions)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), entries)

    @final
    def decode(
        self, x: Float[Array, "t {self.d_model}"], cache: PyTree[Shaped[Array, "s ..."]], position: Int[Array, ""] | int
    ) -> tuple[Float[Array, "t m"], PyTree[Shaped[Array, "s ..."]]]:
        """Outputs for `t` new tokens, the first of them at `position`, and the cache with their entries written in.

        A prompt and a single token alike. The caller keeps position + t <= max_seq_len.
        """
        positions = position + jnp.arange(x.shape[0])
        queries, entries = self.project(x, positions)
        cache = jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, position, axis=0), cache, entries)
        max_seq_len = jax.tree.leaves(cache)[0].shape[0]
        mask = jnp.arange(max_seq_len)[None, :] <= positions[:, None]
        return self.attend(queries, cache, mask), cache


def project_heads(x: Float[Array, "t in"], weight: Float[Array, "out in"], num_heads: int) -> Float[Array, "t heads width"]:
    """W x, its head-major rows cut into heads. One flat product: weights with a head axis would be laid out anew by XLA."""
    return jnp.einsum("ti,oi->to", x, weight).reshape(x.shape[0], num_heads, -1)


def merge_heads(heads: Float[Array, "t n width"], weight: Float[Array, "m in"]) -> Float[Array, "t m"]:
    """W [head 1; head 2; …]: the output projection of concatenated heads."""
    return jnp.einsum("ti,mi->tm", heads.reshape(heads.shape[0], -1), weight)


_records: contextvars.ContextVar[list[Array] | None] = contextvars.ContextVar("attention weights", default=None)


@contextlib.contextmanager
def record_weights() -> Iterator[list[Array]]:
    """A list that takes the softmax weights [n, t, s] of every causal attention computed (or traced) inside of the block.

    Fused kernels, which never hold their weights, are not used there.
    """
    records: list[Array] = []
    token = _records.set(records)
    try:
        yield records
    finally:
        _records.reset(token)


def recording() -> bool:
    return _records.get() is not None


def softmax(scores: Float[Array, "*heads t s"], mask: Bool[Array, "t s"], dtype: Any) -> Float[Array, "*heads t s"]:
    """Over the keys that `mask` lets a query read, in float32."""
    weights = jax.nn.softmax(jnp.where(mask, scores.astype(jnp.float32), -jnp.inf), axis=-1).astype(dtype)
    records = _records.get()
    if records is not None:
        records.append(weights)
    return weights


def fused_kernel(dtype: Any, width: int) -> bool:
    """Whether the causal case runs as cuDNN's fused attention: an NVIDIA GPU, 16-bit numbers, a head width it takes."""
    return (
        not recording()
        and jax.default_backend() == "gpu"
        and jnp.dtype(dtype).itemsize == 2
        and width % 8 == 0
        and width <= 128
    )


def dot_product_attention(
    queries: Float[Array, "t n d"],
    keys: Float[Array, "s k d"],
    values: Float[Array, "s k v"],
    mask: Mask,
    *,
    scale: float,
    shared: tuple[Float[Array, "t n e"], Float[Array, "s e"]] | None = None,
) -> Float[Array, "t n v"]:
    """softmax(scale * q·k) v, query head i reading key/value head floor(i / g); softmax in float32.

    `shared` is a further part of the queries, and of the keys one that all heads share: its products are added to the
    scores, as if the two parts were concatenated. Causality that is handed on as a fact reaches the fused kernel where there
    is one. Elsewhere XLA gets the formula itself, which on a CPU is faster than `jax.nn.dot_product_attention`
    (docs/results.md) and takes values of any width.
    """
    if isinstance(mask, str):
        if shared is not None:  # over many queries one long product beats a sum of two; over a single one, it is a copied cache
            everywhere = jnp.broadcast_to(shared[1][:, None], (*keys.shape[:2], shared[1].shape[-1]))
            queries = jnp.concatenate([queries, shared[0]], axis=-1)
            keys = jnp.concatenate([keys, everywhere], axis=-1)
            shared = None
        width = values.shape[-1]
        if width <= keys.shape[-1] and fused_kernel(queries.dtype, keys.shape[-1]):
            # The kernel wants one width: zeros added to the values come out as zeros
            values = jnp.pad(values, ((0, 0), (0, 0), (0, keys.shape[-1] - width)))
            out = jax.nn.dot_product_attention(queries, keys, values, scale=scale, is_causal=True, implementation="cudnn")
            return out[..., :width]
        mask = jnp.arange(keys.shape[0])[None, :] <= jnp.arange(queries.shape[0])[:, None]
        # Here scores outweigh keys: a copy of the few keys for every query head beats an axis of groups in the many scores.
        keys, values = (jnp.repeat(x, queries.shape[1] // x.shape[1], axis=1) for x in (keys, values))
    bias = None if shared is None else jnp.einsum("tne,se->nts", shared[0] * scale, shared[1])
    attend = _attend_heads if keys.shape[1] == queries.shape[1] else _attend_groups
    return attend(queries * scale, keys, values, bias, mask)


def _attend_heads(queries, keys, values, bias, mask) -> Float[Array, "t n v"]:
    scores = jnp.einsum("tnd,snd->nts", queries, keys)
    weights = softmax(scores if bias is None else scores + bias, mask, values.dtype)
    return jnp.einsum("nts,snv->tnv", weights, values)


def _attend_groups(queries, keys, values, bias, mask) -> Float[Array, "t n v"]:
    """Keys and values stay as few as they are: what a decoded token reads of the cache is read once."""
    grouped = queries.reshape(queries.shape[0], keys.shape[1], -1, queries.shape[-1])
    scores = jnp.einsum("tkgd,skd->kgts", grouped, keys)
    weights = softmax(scores if bias is None else scores + bias.reshape(scores.shape), mask, values.dtype)
    return jnp.einsum("kgts,skv->tkgv", weights, values).reshape(*queries.shape[:2], values.shape[-1])
