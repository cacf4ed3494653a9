"""What all attention types share: the glossary of axes, the interface, and the attention kernel.

Axes, in every einsum and every annotation of this package:

    t  query position        n  query heads            m  d_model, the width of the residual stream
    s  key position          k  key/value heads        r  kv_lora_rank, the width of MLA's latent
    h  head_dim              g  = n / k                f  d_ff
    d  width of queries and keys, v  of values, if they differ from h; e  of a key all heads share
"""

import abc
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped

Stream = Float[Array, "t m"]  # tokens as vectors of the residual stream
Positions = Int[Array, " t"]
Position = Int[Array, ""] | int
Weights = Float[Array, "n t s"]
# Which keys each query reads: a boolean array, True = attend; or the fact "causal", which needs
# no array and which fused kernels turn into skipped work.
Mask = Bool[Array, "t s"] | Literal["causal"]
Split = Callable[[Float[Array, "out in"]], tuple[Float[Array, "..."], ...]]


class AbstractAttention(eqx.Module):
    """Causal self-attention over one sequence; `jax.vmap` adds the batch.

    A variant says what tokens ask (`queries`), what they leave behind (`entries`), and how the
    asking reads what was left behind: `project` and `attend`. Training, scoring and decoding follow
    from them here, once, so that a cached decode equals the forward pass by construction.

    The class facts and the two declarations after `attend` are all that the rest of the program
    knows about a variant.
    """

    d_model: eqx.AbstractVar[int]
    # Which of the options in OPTIONAL the variant implements, and why it cannot implement others.
    accepts: ClassVar[frozenset[str]] = frozenset()
    refuses: ClassVar[Mapping[str, str]] = {}
    # Paths of the projections whose output is added to the residual stream.
    residual: ClassVar[tuple[str, ...]] = ("o_proj",)
    # How paths begin in exported weights, where the field has a name of its own.
    exported: ClassVar[Mapping[str, str]] = {}

    @abc.abstractmethod
    def project(self, x: Stream, positions: Positions) -> tuple[PyTree, PyTree]:
        """(queries, entries) of tokens `x` at absolute `positions`.

        `entries` are all that a later token may see of these, hence the KV cache; axis 0 of every
        leaf is position.
        """

    @abc.abstractmethod
    def attend(self, queries: PyTree, entries: PyTree, mask: Mask) -> Stream:
        """Read `entries`, merge the heads, apply the output projection."""

    @property
    @abc.abstractmethod
    def widths(self) -> tuple[int, int]:
        """Multiplications per (query, key) pair, all heads: (for the scores, with the values)."""

    @abc.abstractmethod
    def fused_projections(self) -> dict[str, Split]:
        """{path of a projection: how its weight [out, in] splits}, if that is several matrices."""

    def attention_weights(self, x: Stream) -> Weights | None:
        """How much every head reads of each token, rows adding up to one; None if it has none."""
        return None

    def remark(self) -> str | None:
        """What a person should know about this configuration before training it."""
        return None

    @final
    def __call__(self, x: Float[Array, "t {self.d_model}"]) -> Stream:
        """The forward pass over a whole sequence, as in training and scoring."""
        queries, entries = self.project(x, jnp.arange(x.shape[0]))
        return self.attend(queries, entries, "causal")

    @final
    def init_cache(self, max_seq_len: int) -> PyTree[Shaped[Array, "max_seq_len ..."]]:
        """An empty KV cache: zeros shaped like the `entries` of `max_seq_len` tokens."""
        dtype = jnp.result_type(*jax.tree.leaves(eqx.filter(self, eqx.is_inexact_array)))
        x = jax.ShapeDtypeStruct((max_seq_len, self.d_model), dtype)
        positions = jax.ShapeDtypeStruct((max_seq_len,), jnp.int32)
        _, entries = eqx.filter_eval_shape(type(self).project, self, x, positions)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), entries)

    @final
    def decode(
        self,
        x: Float[Array, "t {self.d_model}"],
        cache: PyTree[Shaped[Array, "s ..."]],
        position: Position,
    ) -> tuple[Stream, PyTree[Shaped[Array, "s ..."]]]:
        """Outputs for `t` new tokens, the first at `position`, and the cache with their entries.

        A prompt and a single token alike. The caller keeps position + t <= max_seq_len.
        """
        positions = position + jnp.arange(x.shape[0])
        queries, entries = self.project(x, positions)
        write = jax.lax.dynamic_update_slice_in_dim
        cache = jax.tree.map(lambda old, new: write(old, new, position, axis=0), cache, entries)
        max_seq_len = jax.tree.leaves(cache)[0].shape[0]
        mask = jnp.arange(max_seq_len)[None, :] <= positions[:, None]
        return self.attend(queries, cache, mask), cache


def projection(d_in: int, d_out: int, key: PRNGKeyArray) -> eqx.nn.Linear:
    """A linear map without bias."""
    return eqx.nn.Linear(d_in, d_out, use_bias=False, key=key)


def project_heads(
    x: Float[Array, "t in"], weight: Float[Array, "out in"], num_heads: int
) -> Float[Array, "t heads width"]:
    """W x, its head-major rows cut into heads.

    One flat product: XLA would lay out weights with a head axis again.
    """
    return jnp.einsum("ti,oi->to", x, weight).reshape(x.shape[0], num_heads, -1)


def merge_heads(heads: Float[Array, "t n width"], weight: Float[Array, "m in"]) -> Stream:
    """W [head 1; head 2; …]: the output projection of concatenated heads."""
    return jnp.einsum("ti,mi->tm", heads.reshape(heads.shape[0], -1), weight)


def fused_kernel(dtype: Any, width: int) -> bool:
    """Whether cuDNN's fused attention applies: a GPU, 16-bit numbers, a width that it takes."""
    narrow = jnp.dtype(dtype).itemsize == 2 and width % 8 == 0 and width <= 128
    return narrow and jax.default_backend() == "gpu"


Queries = Float[Array, "t n d"]
Keys = Float[Array, "s k d"]
Values = Float[Array, "s k v"]
Shared = tuple[Float[Array, "t n e"], Float[Array, "s e"]] | None


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


def causal_weights(queries: Queries, keys: Keys, scale: float, shared: Shared = None) -> Weights:
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
    reaches the fused kernel if there is one. Otherwise XLA gets the formula itself, which on a CPU
    is faster than `jax.nn.dot_product_attention` (docs/results.md) and takes values of any width.
    """
    if isinstance(mask, str):
        # Over many queries one long product beats a sum of two; over one, it would copy the cache.
        queries, keys = join_shared(queries, keys, shared)
        shared, width = None, values.shape[-1]
        if width <= keys.shape[-1] and fused_kernel(queries.dtype, keys.shape[-1]):
            # The kernel wants one width: zeros added to the values come out as zeros.
            values = jnp.pad(values, ((0, 0), (0, 0), (0, keys.shape[-1] - width)))
            fused = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
            return fused(queries, keys, values, scale=scale, is_causal=True)[..., :width]
        mask = jnp.arange(keys.shape[0])[None, :] <= jnp.arange(queries.shape[0])[:, None]
        # Scores outweigh keys here: a copy of the few keys for every query head beats an axis of
        # groups in the many scores.
        group = queries.shape[1] // keys.shape[1]
        keys, values = jnp.repeat(keys, group, axis=1), jnp.repeat(values, group, axis=1)
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
