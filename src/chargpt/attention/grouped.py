"""Standard, grouped-query and multi-query attention: one class, told apart by the number of key/value heads."""

from typing import final

import equinox as eqx
import jax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from chargpt.attention.base import AbstractAttention, Mask, dot_product_attention, merge_heads, project_heads
from chargpt.attention.rope import apply_rope


@final
class GroupedQueryAttention(AbstractAttention):
    """softmax(q·k / sqrt(h)) v, where g = n/k adjacent query heads share one key/value head.

    num_kv_heads = num_heads: multi-head attention (arXiv 1706.03762); 1: multi-query (arXiv 1911.02150); between:
    grouped-query (arXiv 2305.13245). The cache holds 2·k·h numbers per token; keys and values are never repeated.
    `qk_norm` normalises queries and keys per head before RoPE (arXiv 2302.05442).
    """

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
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        self.q_proj = eqx.nn.Linear(d_model, num_heads * head_dim, use_bias=False, key=q_key)
        self.k_proj = eqx.nn.Linear(d_model, num_kv_heads * head_dim, use_bias=False, key=k_key)
        self.v_proj = eqx.nn.Linear(d_model, num_kv_heads * head_dim, use_bias=False, key=v_key)
        self.o_proj = eqx.nn.Linear(num_heads * head_dim, d_model, use_bias=False, key=o_key)
        self.q_norm = eqx.nn.RMSNorm(head_dim, use_bias=False) if qk_norm else None
        self.k_norm = eqx.nn.RMSNorm(head_dim, use_bias=False) if qk_norm else None
        self.d_model = d_model
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.rope_theta = rope_theta

    def project(self, x: Float[Array, "t m"], positions: Int[Array, " t"]):
        queries = project_heads(x, self.q_proj.weight, self.num_heads)
        keys = project_heads(x, self.k_proj.weight, self.num_kv_heads)
        values = project_heads(x, self.v_proj.weight, self.num_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            queries = jax.vmap(jax.vmap(self.q_norm))(queries)
            keys = jax.vmap(jax.vmap(self.k_norm))(keys)
        queries = apply_rope(queries, positions, self.rope_theta)
        keys = apply_rope(keys, positions, self.rope_theta)
        return queries, (keys, values)

    def attend(
        self,
        queries: Float[Array, "t n h"],
        entries: tuple[Float[Array, "s k h"], Float[Array, "s k h"]],
        mask: Mask,
    ) -> Float[Array, "t m"]:
        keys, values = entries
        out = dot_product_attention(queries, keys, values, mask, scale=self.head_dim**-0.5)
        return merge_heads(out, self.o_proj.weight)
