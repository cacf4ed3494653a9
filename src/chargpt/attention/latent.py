"""Multi-head latent attention: keys and values live in one small latent per token."""

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from chargpt.attention.base import AbstractAttention, Mask, dot_product_attention, merge_heads, project_heads
from chargpt.attention.rope import apply_rope


@final
class MultiHeadLatentAttention(AbstractAttention):
    """MLA (DeepSeek-V2, arXiv 2405.04434): the cache holds a latent c and one shared rotary key, r + dr numbers per token.

        [c~ ; k~] = W_kva x      c = RMSNorm(c~)      k_rope = RoPE(k~)        one vector for all heads, not normed
        [k_nope | v] = W_kvb c   [q_nope | q_rope] = W_q x, or W_qb RMSNorm(W_qa x), per head
        score = (q_nope·k_nope + RoPE(q_rope)·k_rope) / sqrt(dn + dr)

    Many tokens expand the latents to keys and values. A single decoded token uses the absorbed form instead: q_nope is
    carried into the latent space through W_kvb's key half, and the output back through its value half, so that attention
    is multi-query attention over the latents themselves and nothing is expanded.
    """

    q_proj: eqx.nn.Linear | None
    q_a_proj: eqx.nn.Linear | None
    q_a_norm: eqx.nn.RMSNorm | None
    q_b_proj: eqx.nn.Linear | None
    kv_a_proj: eqx.nn.Linear
    kv_a_norm: eqx.nn.RMSNorm
    kv_b_proj: eqx.nn.Linear
    o_proj: eqx.nn.Linear
    d_model: int = eqx.field(static=True)
    num_heads: int = eqx.field(static=True)
    kv_lora_rank: int = eqx.field(static=True)
    qk_nope_head_dim: int = eqx.field(static=True)
    qk_rope_head_dim: int = eqx.field(static=True)
    v_head_dim: int = eqx.field(static=True)
    rope_theta: float | None = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        rope_theta: float | None,
        *,
        key: PRNGKeyArray,
    ):
        q_key, q_b_key, kv_a_key, kv_b_key, o_key = jax.random.split(key, 5)
        query_width = num_heads * (qk_nope_head_dim + qk_rope_head_dim)
        self.q_proj = self.q_a_proj = self.q_a_norm = self.q_b_proj = None
        if q_lora_rank is None:
            self.q_proj = eqx.nn.Linear(d_model, query_width, use_bias=False, key=q_key)
        else:
            self.q_a_proj = eqx.nn.Linear(d_model, q_lora_rank, use_bias=False, key=q_key)
            self.q_a_norm = eqx.nn.RMSNorm(q_lora_rank, eps=1e-6, use_bias=False)
            self.q_b_proj = eqx.nn.Linear(q_lora_rank, query_width, use_bias=False, key=q_b_key)
        self.kv_a_proj = eqx.nn.Linear(d_model, kv_lora_rank + qk_rope_head_dim, use_bias=False, key=kv_a_key)
        self.kv_a_norm = eqx.nn.RMSNorm(kv_lora_rank, eps=1e-6, use_bias=False)
        key_value_width = num_heads * (qk_nope_head_dim + v_head_dim)
        self.kv_b_proj = eqx.nn.Linear(kv_lora_rank, key_value_width, use_bias=False, key=kv_b_key)
        self.o_proj = eqx.nn.Linear(num_heads * v_head_dim, d_model, use_bias=False, key=o_key)
        self.d_model = d_model
        self.num_heads = num_heads
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.rope_theta = rope_theta

    def project(self, x: Float[Array, "t m"], positions: Int[Array, " t"]):
        if self.q_proj is not None:
            queries = project_heads(x, self.q_proj.weight, self.num_heads)
        else:
            compressed = jax.vmap(self.q_a_norm)(jnp.einsum("tm,rm->tr", x, self.q_a_proj.weight))
            queries = project_heads(compressed, self.q_b_proj.weight, self.num_heads)
        q_nope, q_rope = jnp.split(queries, [self.qk_nope_head_dim], axis=-1)
        q_rope = apply_rope(q_rope, positions, self.rope_theta)

        latents, k_rope = jnp.split(jnp.einsum("sm,cm->sc", x, self.kv_a_proj.weight), [self.kv_lora_rank], axis=-1)
        latents = jax.vmap(self.kv_a_norm)(latents)
        k_rope = apply_rope(k_rope[:, None, :], positions, self.rope_theta)[:, 0, :]
        return (q_nope, q_rope), (latents, k_rope)

    def attend(
        self,
        queries: tuple[Float[Array, "t n dn"], Float[Array, "t n dr"]],
        entries: tuple[Float[Array, "s r"], Float[Array, "s dr"]],
        mask: Mask,
    ) -> Float[Array, "t m"]:
        read = self.read_absorbed if queries[0].shape[0] == 1 else self.read_expanded
        return merge_heads(read(queries, entries, mask), self.o_proj.weight)

    @property
    def scale(self) -> float:
        return (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5

    def _kv_b_halves(self) -> tuple[Float[Array, "n dn r"], Float[Array, "n v r"]]:
        """W_kvb per head: the rows that make keys, and the rows that make values."""
        weight = self.kv_b_proj.weight
        per_head = weight.reshape(self.num_heads, -1, weight.shape[1])
        key_half, value_half = jnp.split(per_head, [self.qk_nope_head_dim], axis=1)
        return key_half, value_half

    def read_expanded(self, queries, entries, mask: Mask) -> Float[Array, "t n v"]:
        """Attention over keys and values expanded from the latents."""
        latents, k_rope = entries
        expanded = project_heads(latents, self.kv_b_proj.weight, self.num_heads)
        k_nope, values = jnp.split(expanded, [self.qk_nope_head_dim], axis=-1)
        return dot_product_attention(queries[0], k_nope, values, mask, scale=self.scale, shared=(queries[1], k_rope))

    def read_absorbed(self, queries, entries, mask: Mask) -> Float[Array, "t n v"]:
        """The same numbers without expansion: multi-query attention whose keys and values are the latents."""
        q_nope, q_rope = queries
        latents, k_rope = entries
        key_half, value_half = self._kv_b_halves()
        q_latent = jnp.einsum("tnd,ndr->tnr", q_nope, key_half)
        keys = values = latents[:, None, :]
        out = dot_product_attention(q_latent, keys, values, mask, scale=self.scale, shared=(q_rope, k_rope))
        return jnp.einsum("tnr,nvr->tnv", out, value_half)
