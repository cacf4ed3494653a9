"""Selective attention: every query makes its own keys and values.

docs/selective-attention.md derives the form used here.
"""

from typing import ClassVar, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from chargpt.attention import base, kernel
from chargpt.attention.base import AbstractAttention, Heads, Positions, Split, Stream
from chargpt.attention.kernel import Reading
from chargpt.attention.rope import apply_rope, require_even, rope_angles
from chargpt.config import require_divides

Queries = tuple[Float[Array, "t n h"], Float[Array, "t n _"], Float[Array, "t n h"]]

Entries = tuple[Float[Array, "s n h"], Float[Array, "s n h"]]


@final
class SelectiveAttention(AbstractAttention):
    """Keys and values per query: k_ij = W_k [q_i ; x_j], v_ij = W_v [q_i ; x_j]; q_i = W_q x_i.

    Queries have the full width. Written literally this is a [t, s, m] tensor. But with
    W_k = [A | B] and W_v = [C | D],

        k_ij = A q_i + B x_j        v_ij = C q_i + D x_j        y_i = C q_i + sum_j p_ij D x_j

    (the weights p_ij sum to one; with a sink, the skip is C q_i sum_j p_ij), and under RoPE, R_i at
    the query and R_j at the key,

        (R_i q_i)·(R_j k_ij) = (R_i q_i)·(R_j B x_j) + (R_i q_i)·(R_j A q_i)

    where the second term is a relative-position bias that the query writes itself: linear in
    (cos, sin) of the key's angles. So this is ordinary attention with heads of width 2h over keys
    [R_j B x_j | cos, sin], plus the skip C q_i, and its cache is that of standard attention.
    Without RoPE the second term is the same for all j and cancels in the softmax, but for a sink.

    Not the "selective attention" of arXiv 2410.02703, which masks tokens and shares only the name.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"rope"})
    refuses: ClassVar[dict[str, str]] = {
        "qk_norm": "its keys must stay linear in query and token, or they cannot be factorised"
    }
    q_proj: eqx.nn.Linear
    k_proj: eqx.nn.Linear
    v_proj: eqx.nn.Linear
    o_proj: eqx.nn.Linear
    d_model: int = eqx.field(static=True)
    num_heads: int = eqx.field(static=True)
    head_dim: int = eqx.field(static=True)
    rope_theta: float | None = eqx.field(static=True)

    def __init__(
        self, d_model: int, num_heads: int, rope_theta: float | None, *, key: PRNGKeyArray
    ):
        require_divides("model.num_heads", num_heads, d_model, "model.d_model")
        require_even("model.d_model / model.num_heads", d_model // num_heads, rope_theta)
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        self.q_proj = base.projection(d_model, d_model, q_key)
        self.k_proj = base.projection(2 * d_model, d_model, k_key)
        self.v_proj = base.projection(2 * d_model, d_model, v_key)
        self.o_proj = base.projection(d_model, d_model, o_key)
        self.d_model, self.num_heads, self.head_dim = d_model, num_heads, d_model // num_heads
        self.rope_theta = rope_theta

    def project(self, x: Stream, positions: Positions) -> tuple[Queries, Entries]:
        key_from_query, key_from_token = jnp.split(self.k_proj.weight, 2, axis=1)  # A, B
        value_from_query, value_from_token = jnp.split(self.v_proj.weight, 2, axis=1)  # C, D
        q = jnp.einsum("tm,om->to", x, self.q_proj.weight)
        skip = base.project_heads(q, value_from_query, self.num_heads)
        values = base.project_heads(x, value_from_token, self.num_heads)
        keys = base.project_heads(x, key_from_token, self.num_heads)
        keys = apply_rope(keys, positions, self.rope_theta)
        queries = q.reshape(*q.shape[:1], self.num_heads, self.head_dim)
        queries = apply_rope(queries, positions, self.rope_theta)
        added = base.project_heads(q, key_from_query, self.num_heads)
        if self.rope_theta is None:
            bias_queries = jnp.sum(queries * added, axis=-1, keepdims=True)
        else:
            # R_j rotates the pair (a1, a2) to (a1 cos - a2 sin, a2 cos + a1 sin), so
            # (q1, q2)·R_j (a1, a2) = cos (q1 a1 + q2 a2) + sin (q2 a1 - q1 a2):
            # this is what multiplies the key's cos and sin.
            q1, q2 = jnp.split(queries, 2, axis=-1)
            a1, a2 = jnp.split(added, 2, axis=-1)
            bias_queries = jnp.concatenate([q1 * a1 + q2 * a2, q2 * a1 - q1 * a2], axis=-1)
        return (queries, bias_queries, skip), (keys, values)

    def attend(self, queries: Queries, entries: Entries, reading: Reading) -> Heads:
        (q, bias_queries, skip), (keys, values) = queries, entries
        if reading.sink is not None:  # a value of 1 everywhere: its average is sum_j p_ij
            values = jnp.concatenate([values, jnp.ones_like(values[..., :1])], axis=-1)
        shared, scale = self._shared(bias_queries, keys, reading), self.head_dim**-0.5
        out = kernel.dot_product_attention(q, keys, values, reading, scale, shared)
        if reading.sink is not None:
            out, total = jnp.split(out, [self.head_dim], axis=-1)
            skip = total * skip
        return skip + out

    def _shared(
        self, bias_queries: Float[Array, "t n _"], keys: Float[Array, "s n h"], reading: Reading
    ) -> kernel.Shared:
        """The queries and keys of the relative-position bias; the keys are cos and sin.

        Without RoPE it is the same for all keys: it counts only against a sink.
        """
        if self.rope_theta is None:
            ones = jnp.ones((len(keys), 1), keys.dtype)
            return None if reading.sink is None else (bias_queries, ones)
        positions = reading.key_positions(len(keys))
        angles = rope_angles(positions, self.head_dim, self.rope_theta)
        table = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return bias_queries, table.astype(keys.dtype)

    def attention_weights(self, x: Stream, reading: Reading = kernel.CAUSAL) -> base.Weights:
        (q, bias_queries, _), (keys, _) = self.project(x, jnp.arange(x.shape[0]))
        shared = self._shared(bias_queries, keys, reading)
        return kernel.attention_weights(q, keys, reading, self.head_dim**-0.5, shared)

    def query_bias(self, x: Stream, reading: Reading = kernel.CAUSAL) -> base.Scores | None:
        """The second term of the score."""
        (_, bias_queries, _), (keys, _) = self.project(x, jnp.arange(x.shape[0]))
        shared = self._shared(bias_queries, keys, reading)
        scores = kernel.shared_scores(shared, self.head_dim**-0.5)
        if scores is None:
            return None
        return jnp.where(reading.mask(*scores.shape[1:]), scores, -jnp.inf)

    def remark(self) -> str | None:
        if self.rope_theta is not None:
            return None
        same = "without RoPE, what a query adds to its keys is the same for all keys and cancels"
        return f"{same}, unless there is a sink"

    @property
    def widths(self) -> tuple[int, int]:
        return self.d_model * (1 if self.rope_theta is None else 2), self.d_model

    def fused_projections(self) -> dict[str, Split]:
        return dict.fromkeys(("k_proj", "v_proj"), lambda w: tuple(jnp.split(w, 2, axis=1)))
