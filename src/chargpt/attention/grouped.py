"""Standard, grouped-query and multi-query attention: one class, by number of key/value heads."""

from typing import ClassVar, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from chargpt.attention import base, kernel
from chargpt.attention.base import AbstractAttention, Heads, Positions, Split, Stream
from chargpt.attention.kernel import Reading
from chargpt.attention.rope import apply_rope, require_even
from chargpt.config import require_divides

Queries = Float[Array, "t n h"]
Entries = tuple[Float[Array, "s k h"], Float[Array, "s k h"]]


@final
class GroupedQueryAttention(AbstractAttention):
    """softmax(q·k / sqrt(h)) v, where g = n/k adjacent query heads share one key/value head.

    num_kv_heads = num_heads: multi-head attention (arXiv 1706.03762); 1: multi-query (arXiv
    1911.02150); between: grouped-query (arXiv 2305.13245). The cache holds 2·k·h numbers per token;
    keys and values are never repeated in it. `qk_norm` normalises queries and keys per head before
    RoPE (arXiv 2302.05442).
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"qk_norm", "head_dim", "rope"})
    q_proj: eqx.nn.Linear
    k_proj: eqx.nn.Linear
    v_proj: eqx.nn.Linear
    o_proj: eqx.nn.Linear
    q_norm: eqx.nn.RMSNorm | None
    k_norm: eqx.nn.RMSNorm | None
    d_model: int = eqx.field(static=True)
    num_heads: int = eqx.field(static=True)
    num_kv_heads: int = eqx.field(static=True)
    head_dim: int = eqx.field(static=True)
    rope_theta: float | None = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope_theta: float | None,
        *,
        qk_norm: bool = False,
        key: PRNGKeyArray,
    ):
        require_divides("model.num_kv_heads", num_kv_heads, num_heads, "model.num_heads")
        require_even("model.head_dim", head_dim, rope_theta)
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        width, kv_width = num_heads * head_dim, num_kv_heads * head_dim
        self.q_proj = base.projection(d_model, width, q_key)
        self.k_proj = base.projection(d_model, kv_width, k_key)
        self.v_proj = base.projection(d_model, kv_width, v_key)
        self.o_proj = base.projection(width, d_model, o_key)
        self.q_norm = eqx.nn.RMSNorm(head_dim, use_bias=False) if qk_norm else None
        self.k_norm = eqx.nn.RMSNorm(head_dim, use_bias=False) if qk_norm else None
        self.d_model, self.num_heads, self.num_kv_heads = d_model, num_heads, num_kv_heads
        self.head_dim, self.rope_theta = head_dim, rope_theta

    def project(self, x: Stream, positions: Positions) -> tuple[Queries, Entries]:
        queries = base.project_heads(x, self.q_proj.weight, self.num_heads)
        keys = base.project_heads(x, self.k_proj.weight, self.num_kv_heads)
        values = base.project_heads(x, self.v_proj.weight, self.num_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            queries = jax.vmap(jax.vmap(self.q_norm))(queries)
            keys = jax.vmap(jax.vmap(self.k_norm))(keys)
        queries = apply_rope(queries, positions, self.rope_theta)
        return queries, (apply_rope(keys, positions, self.rope_theta), values)

    def attend(self, queries: Queries, entries: Entries, reading: Reading) -> Heads:
        return kernel.dot_product_attention(queries, *entries, reading, scale=self.head_dim**-0.5)

    def attention_weights(self, x: Stream, reading: Reading = kernel.CAUSAL) -> base.Weights:
        queries, (keys, _) = self.project(x, jnp.arange(x.shape[0]))
        return kernel.attention_weights(queries, keys, reading, scale=self.head_dim**-0.5)

    @property
    def widths(self) -> tuple[int, int]:
        return self.num_heads * self.head_dim, self.num_heads * self.head_dim

    def fused_projections(self) -> dict[str, Split]:
        return {}
