"""What all attention types share: the glossary of axes and the interface.

Axes, in every einsum and every annotation of this package:

    t  query position        n  query heads            m  d_model, the width of the residual stream
    s  key position          k  key/value heads        r  kv_lora_rank, the width of MLA's latent
    h  head_dim              g  = n / k                f  d_ff
    d  width of queries and keys, v  of values, if they differ from h; e  of a key all heads share
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Shaped

from chargpt.attention.kernel import CAUSAL, Reading

Stream = Float[Array, "t m"]  # tokens as vectors of the residual stream
Heads = Float[Array, "t n v"]  # what every head has read
Gate = Float[Array, "t n #v"] | None  # factors on it
Positions = Int[Array, " t"]
Position = Int[Array, ""] | int
Weights = Float[Array, "n t s"]
Scores = Float[Array, "n t s"]
Split = Callable[[Float[Array, "out in"]], tuple[Float[Array, "..."], ...]]


class AbstractAttention(eqx.Module):
    """Causal self-attention over one sequence; `jax.vmap` adds the batch.

    A variant says what tokens ask (`queries`), what they leave behind (`entries`), and how the
    asking reads what was left behind: `project` and `attend`. Training, scoring and decoding follow
    from them here, once, so that a cached decode equals the forward pass by construction. What
    crosses all variants (windows, sinks, ALiBi) is in the `Reading` that `attend` hands on to the
    kernel; a gate is applied to the heads here.

    The class facts and the two declarations after `attend` are all that the rest of the program
    knows about a variant.
    """

    d_model: eqx.AbstractVar[int]
    # Which of the options in OPTIONAL the variant implements, and why it cannot implement others.
    accepts: ClassVar[frozenset[str]] = frozenset()
    refuses: ClassVar[Mapping[str, str]] = {}
    # Path of the projection that merges the heads: its output is added to the residual stream.
    output: ClassVar[str] = "o_proj"
    # Paths of the projections whose output is not divided among the heads, but read by all.
    common: ClassVar[tuple[str, ...]] = ()
    # How paths begin in exported weights, if the field has names of its own for them.
    exported: ClassVar[Mapping[str, str]] = {}

    @abc.abstractmethod
    def project(self, x: Stream, positions: Positions) -> tuple[PyTree, PyTree]:
        """(queries, entries) of tokens `x` at absolute `positions`, each token by itself.

        `entries` are all that a later token may see of these, hence the KV cache. Axis 0 of every
        leaf, of queries and of entries, is the token.
        """

    @abc.abstractmethod
    def attend(self, queries: PyTree, entries: PyTree, reading: Reading) -> Heads:
        """What every head reads of `entries`, for the output projection to merge."""

    @property
    @abc.abstractmethod
    def widths(self) -> tuple[int, int]:
        """Multiplications per (query, key) pair, all heads: (for the scores, with the values)."""

    @abc.abstractmethod
    def fused_projections(self) -> dict[str, Split]:
        """{path of a projection: how its weight [out, in] splits}, if that is several matrices."""

    def attention_weights(self, x: Stream, reading: Reading = CAUSAL) -> Weights | None:
        """How much every head reads of each token; None if it has no weights.

        Rows add up to one, less what a sink takes.
        """
        return None

    def query_bias(self, x: Stream, reading: Reading = CAUSAL) -> Scores | None:
        """What a query adds to its scores by position, whatever the tokens there are, in nats.

        None if nothing; -inf where it does not read.
        """
        return None

    def remark(self) -> str | None:
        """What a person should know about this configuration before training it."""
        return None

    @property
    def head_counts(self) -> dict[str, int]:
        """{name: number} of heads that must be cut evenly where tensor parallelism cuts them."""
        names = {"num_heads": "heads", "num_kv_heads": "key/value heads"}
        return {names[field]: getattr(self, field) for field in names if hasattr(self, field)}

    @final
    def __call__(
        self, x: Float[Array, "t {self.d_model}"], reading: Reading = CAUSAL, gate: Gate = None
    ) -> Stream:
        """The forward pass over a whole sequence, as in training and scoring."""
        queries, entries = self.project(x, jnp.arange(x.shape[0]))
        return self._merge(self.attend(queries, entries, reading), gate)

    @final
    def batch(
        self,
        x: Float[Array, "bt {self.d_model}"],
        sequences: int,
        reading: Reading = CAUSAL,
        gate: Gate = None,
    ) -> Float[Array, "bt m"]:
        """`__call__` for each of `sequences` sequences of equal length, one after another in x.

        All tokens are projected in one product: under `vmap`, XLA's CPU products and their
        gradients take up to twice as long (docs/results.md).
        """
        length = x.shape[0] // sequences
        projected = self.project(x, jnp.tile(jnp.arange(length), sequences))
        shape = (sequences, length)
        split = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), projected)
        heads = jax.vmap(functools.partial(self.attend, reading=reading))(*split)
        return self._merge(heads.reshape(x.shape[0], *heads.shape[2:]), gate)

    @final
    def init_cache(
        self, max_seq_len: int, window: int | None = None
    ) -> PyTree[Shaped[Array, "slots ..."]]:
        """An empty KV cache: zeros shaped like the `entries` of `max_seq_len` tokens.

        With a window, of as many tokens as it holds: a ring.
        """
        slots = max_seq_len if window is None else min(window, max_seq_len)
        _, entries = self._shapes(slots)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), entries)

    @final
    def decode(
        self,
        x: Float[Array, "t {self.d_model}"],
        cache: PyTree[Shaped[Array, "slots ..."]],
        position: Position,
        reading: Reading = CAUSAL,
        gate: Gate = None,
    ) -> tuple[Stream, PyTree[Shaped[Array, "slots ..."]]]:
        """Outputs for `t` new tokens, the first at `position`, and the cache with their entries.

        A prompt and a single token alike. The caller keeps position + t <= max_seq_len.
        """
        positions = position + jnp.arange(x.shape[0])
        queries, entries = self.project(x, positions)
        put = keep if reading.window is None else keep_newest
        cache, seen, key_positions = put(cache, entries, position)
        reading = dataclasses.replace(reading, positions=(positions, key_positions))
        return self._merge(self.attend(queries, seen, reading), gate), cache

    @final
    @property
    def heads(self) -> tuple[int, int]:
        """(number, width) of the heads that the output projection merges."""
        read = type(self).attend
        number, width = eqx.filter_eval_shape(read, self, *self._shapes(1), CAUSAL).shape[1:]
        return number, width

    def _shapes(self, tokens: int) -> tuple[PyTree, PyTree]:
        """Of (queries, entries)."""
        dtype = jnp.result_type(*jax.tree.leaves(eqx.filter(self, eqx.is_inexact_array)))
        x = jax.ShapeDtypeStruct((tokens, self.d_model), dtype)
        positions = jax.ShapeDtypeStruct((tokens,), jnp.int32)
        return eqx.filter_eval_shape(type(self).project, self, x, positions)

    def _merge(self, heads: Heads, gate: Gate) -> Stream:
        heads = heads if gate is None else heads * gate
        output: Any = functools.reduce(getattr, self.output.split("."), self)
        return merge_heads(heads, output.weight)


def keep(
    cache: PyTree[Shaped[Array, "s ..."]],
    entries: PyTree[Shaped[Array, "t ..."]],
    position: Position,
) -> tuple[PyTree, PyTree, Int[Array, " s"]]:
    """(cache with `entries` from `position` on, what is read, positions of what is read)."""
    write = jax.lax.dynamic_update_slice_in_dim
    cache = jax.tree.map(lambda old, new: write(old, new, position, axis=0), cache, entries)
    return cache, cache, jnp.arange(jax.tree.leaves(cache)[0].shape[0])


def keep_newest(
    cache: PyTree[Shaped[Array, "slots ..."]],
    entries: PyTree[Shaped[Array, "t ..."]],
    position: Position,
) -> tuple[PyTree, PyTree, Int[Array, " s"]]:
    """`keep` in a ring: position p is in slot p modulo their number, the newest in place of others.

    Entries that give way to a prompt's later tokens are read by its earlier ones: of several tokens
    at once, all that the ring held is read beside them.
    """
    slots, tokens = (jax.tree.leaves(tree)[0].shape[0] for tree in (cache, entries))

    def positions_when(newest: Position) -> Int[Array, " slots"]:
        """Below 0 where nothing has been written yet."""
        return newest - (newest - jnp.arange(slots)) % slots

    kept = min(tokens, slots)
    places = (position + jnp.arange(tokens - kept, tokens)) % slots
    ring = jax.tree.map(lambda old, new: old.at[places].set(new[-kept:]), cache, entries)
    if tokens == 1:
        return ring, ring, positions_when(position)
    both = jax.tree.map(lambda old, new: jnp.concatenate([old, new]), cache, entries)
    positions = [positions_when(position - 1), position + jnp.arange(tokens)]
    return ring, both, jnp.concatenate(positions)


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


def merge_heads(heads: Heads, weight: Float[Array, "m in"]) -> Stream:
    """W [head 1; head 2; …]: the output projection of concatenated heads."""
    return jnp.einsum("ti,mi->tm", heads.reshape(heads.shape[0], -1), weight)
