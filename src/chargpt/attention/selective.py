"""Selective attention: every query makes its own keys and values. docs/selective-attention.md derives the form used here."""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from chargpt.attention.base import AbstractAttention, Mask, dot_product_attention, merge_heads, project_heads
from chargpt.attention.rope import apply_rope, rope_angles


@final
class SelectiveAttention(AbstractAttention):
    """Keys and values per query: k_ij = W_k [q_i ; x_j], v_ij = W_v [q_i ; x_j], with q_i = W_q x_i at full width.

    Written literally this is a [t, s, m] tensor. But with W_k = [A | B] and W_v = [C | D],

        k_ij = A q_i + B x_j        v_ij = C q_i + D x_j        y_i = C q_i + sum_j p_ij D x_j

    (the weights p_ij sum to one), and under RoPE, R_i at the query and R_j at the key,

        (R_i q_i)·(R_j k_ij) = (R_i q_i)·(R_j B x_j) + (R_i q_i)·(R_j A q_i)

    where the second term is a relative-position bias that the query writes itself: linear in (cos, sin) of the key's
    angles. So this is ordinary attention with heads of width 2h over keys [R_j B x_j | cos, sin], plus the skip C q_i, and
    the cache is that of standard attention. Without RoPE the second term is the same for all j and cancels in the softmax.

    Not the "selective attention" of arXiv 2410.02703, which masks tokens and shares only the name.
    """

    q_proj: eqx.nn.Linear
    k_proj: eqx.nn.Linear
    v_proj: eqx.nn.Linear
    o_proj: eqx.nn.Linear
    d_model: int = eqx.field(static=True)
    num_heads: int = eqx.field(static=True)
    head_dim: int = eqx.field(static=True)
    rope_theta: float | None = eqx.field(static=True)

    def __init__(self, d_model: int, num_heads: int, rope_theta: float | None, *, key: PRNGKeyArray):
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        self.q_proj = eqx.nn.Linear(d_model, d_model, use_bias=False, key=q_key)
        self.k_proj = eqx.nn.Linear(2 * d_model, d_model, use_bias=False, key=k_key)
        self.v_proj = eqx.nn.Linear(2 * d_model, d_model, use_bias=False, key=v_key)
        self.o_proj = eqx.nn.Linear(d_model, d_model, use_bias=False, key=o_key)
        self.d_model = d_model
        self.num_heads = num_heads
        self.head_dim = d_model // num_heads
        self.rope_theta = rope_theta

    def project(self, x: Float[Array, "t m"], positions: Int[Array, " t"]):
        key_from_query, key_from_token = jnp.split(self.k_proj.weight, 2, axis=1)  # A, B
        value_from_query, value_from_token = jnp.split(self.v_proj.weight, 2, axis=1)  # C, D
        q = jnp.einsum("tm,om->to", x, self.q_proj.weight)
        skip = project_heads(q, value_from_query, self.num_heads)
        values = project_heads(x, value_from_token, self.num_heads)
        keys = apply_rope(project_heads(x, key_from_token, self.num_heads), positions, self.rope_theta)
        queries = apply_rope(q.reshape(*q.shape[:1], self.num_heads, self.head_dim), positions, self.rope_theta)
        bias_queries = None
        if self.rope_theta is not None:
            # R_j turns the pair (a1, a2) to (a1 cos - a2 sin, a2 cos + a1 sin), so (q1, q2)·R_j (a1, a2) =
            # cos (q1 a1 + q2 a2) + sin (q2 a1 - q1 a2): what multiplies the key's cos and sin.
            q1, q2 = jnp.split(queries, 2, axis=-1)
            a1, a2 = jnp.split(project_heads(q, key_from_query, self.num_heads), 2, axis=-1)
            bias_queries = jnp.concatenate([q1 * a1 + q2 * a2, q2 * a1 - q1 * a2], axis=-1)
        return (queries, bias_queries, skip), (keys, values)

    def attend(
        self,
        queries: tuple[Float[Array, "t n h"], Float[Array, "t n h"] | None, Float[Array, "t n h"]],
        entries: tuple[Float[Array, "s n h"], Float[Array, "s n h"]],
        mask: Mask,
    ) -> Float[Array, "t m"]:
        q, bias_queries, skip = queries
        keys, values = entries
        shared = None
        if bias_queries is not None:
            angles = rope_angles(jnp.arange(keys.shape[0]), self.head_dim, self.rope_theta)
            shared = bias_queries, jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1).astype(keys.dtype)
        out = skip + dot_product_attention(q, keys, values, mask, scale=self.head_dim**-0.5, shared=shared)
        return merge_heads(out, self.o_proj.weight)
