"""Multi-head latent attention: keys and values live in one small latent per token."""

from typing import ClassVar, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from chargpt.attention import base, kernel
from chargpt.attention.base import AbstractAttention, Heads, Positions, Split, Stream
from chargpt.attention.kernel import Reading
from chargpt.attention.rope import apply_rope, require_even

Queries = tuple[Float[Array, "t n dn"], Float[Array, "t n dr"]]
Entries = tuple[Float[Array, "s r"], Float[Array, "s dr"]]


@final
class MultiHeadLatentAttention(AbstractAttention):
    """MLA (DeepSeek-V2, arXiv 2405.04434): the cache holds a latent c and one rotary key per token.

        [c~ ; k~] = W_kva x      c = RMSNorm(c~)      k_rope = RoPE(k~)    one vector for all heads
        [k_nope | v] = W_kvb c   [q_nope | q_rope] = W_q x, or W_qb RMSNorm(W_qa x), per head
        score = (q_nope·k_nope + RoPE(q_rope)·k_rope) / sqrt(dn + dr)

    Many tokens expand the latents to keys and values. A single decoded token uses the absorbed form
    instead: q_nope is carried into the latent space through W_kvb's key half, and the output back
    through its value half, so that attention is multi-query attention over the latents themselves
    and nothing is expanded. Without `latent_norm` c is c~, and such a layer can equal one of
    grouped-query attention (conversion.py).
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"rope"})
    refuses: ClassVar[dict[str, str]] = {
        "qk_norm": "normalised keys cannot be absorbed into the query",
        "head_dim": "its heads have the widths model.mla.*_head_dim",
    }
    common: ClassVar[tuple[str, ...]] = ("q_a_proj", "kv_a_proj")
    exported: ClassVar[dict[str, str]] = {
        "q_a_norm.": "q_a_layernorm.",
        "kv_a_proj.": "kv_a_proj_with_mqa.",
        "kv_a_norm.": "kv_a_layernorm.",
    }
    q_proj: eqx.nn.Linear | None
    q_a_proj: eqx.nn.Linear | None
    q_a_norm: eqx.nn.RMSNorm | None
    q_b_proj: eqx.nn.Linear | None
    kv_a_proj: eqx.nn.Linear
    kv_a_norm: eqx.nn.RMSNorm | None
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
        latent_norm: bool = True,
        key: PRNGKeyArray,
    ):
        require_even("model.mla.qk_rope_head_dim", qk_rope_head_dim, rope_theta)
        q_key, q_b_key, kv_a_key, kv_b_key, o_key = jax.random.split(key, 5)
        query_width = num_heads * (qk_nope_head_dim + qk_rope_head_dim)
        latent_width, kv_width = kv_lora_rank + qk_rope_head_dim, qk_nope_head_dim + v_head_dim
        self.q_proj = self.q_a_proj = self.q_a_norm = self.q_b_proj = None
        if q_lora_rank is None:
            self.q_proj = base.projection(d_model, query_width, q_key)
        else:
            self.q_a_proj = base.projection(d_model, q_lora_rank, q_key)
            self.q_a_norm = eqx.nn.RMSNorm(q_lora_rank, eps=1e-6, use_bias=False)
            self.q_b_proj = base.projection(q_lora_rank, query_width, q_b_key)
        self.kv_a_proj = base.projection(d_model, latent_width, kv_a_key)
        norm = eqx.nn.RMSNorm(kv_lora_rank, eps=1e-6, use_bias=False)
        self.kv_a_norm = norm if latent_norm else None
        self.kv_b_proj = base.projection(kv_lora_rank, num_heads * kv_width, kv_b_key)
        self.o_proj = base.projection(num_heads * v_head_dim, d_model, o_key)
        self.d_model, self.num_heads, self.rope_theta = d_model, num_heads, rope_theta
        self.kv_lora_rank, self.v_head_dim = kv_lora_rank, v_head_dim
        self.qk_nope_head_dim, self.qk_rope_head_dim = qk_nope_head_dim, qk_rope_head_dim

    def project(self, x: Stream, positions: Positions) -> tuple[Queries, Entries]:
        if self.q_proj is not None:
            queries = base.project_heads(x, self.q_proj.weight, self.num_heads)
        else:
            assert self.q_a_proj and self.q_a_norm and self.q_b_proj
            compressed = jax.vmap(self.q_a_norm)(jnp.einsum("tm,rm->tr", x, self.q_a_proj.weight))
            queries = base.project_heads(compressed, self.q_b_proj.weight, self.num_heads)
        q_nope, q_rope = jnp.split(queries, [self.qk_nope_head_dim], axis=-1)
        q_rope = apply_rope(q_rope, positions, self.rope_theta)
        down = jnp.einsum("sm,cm->sc", x, self.kv_a_proj.weight)
        latents, k_rope = jnp.split(down, [self.kv_lora_rank], axis=-1)
        latents = latents if self.kv_a_norm is None else jax.vmap(self.kv_a_norm)(latents)
        k_rope = apply_rope(k_rope[:, None, :], positions, self.rope_theta)[:, 0, :]
        return (q_nope, q_rope), (latents, k_rope)

    def attend(self, queries: Queries, entries: Entries, reading: Reading) -> Heads:
        read = self.read_absorbed if queries[0].shape[0] == 1 else self.read_expanded
        return read(queries, entries, reading)

    @property
    def scale(self) -> float:
        return (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5

    def expand(
        self, latents: Float[Array, "s r"]
    ) -> tuple[Float[Array, "s n dn"], Float[Array, "s n v"]]:
        """Keys (without their rotary part) and values of every head."""
        expanded = base.project_heads(latents, self.kv_b_proj.weight, self.num_heads)
        k_nope, values = jnp.split(expanded, [self.qk_nope_head_dim], axis=-1)
        return k_nope, values

    def read_expanded(self, queries: Queries, entries: Entries, reading: Reading) -> Heads:
        """Attention over keys and values expanded from the latents."""
        (q_nope, q_rope), (latents, k_rope) = queries, entries
        heads, shared = (q_nope, *self.expand(latents)), (q_rope, k_rope)
        return kernel.dot_product_attention(*heads, reading, self.scale, shared)

    def read_absorbed(self, queries: Queries, entries: Entries, reading: Reading) -> Heads:
        """The same without expansion: multi-query attention with the latents as keys and values."""
        (q_nope, q_rope), (latents, k_rope) = queries, entries
        key_half, value_half = self.kv_b_halves(self.kv_b_proj.weight)
        q_latent, keys = jnp.einsum("tnd,ndr->tnr", q_nope, key_half), latents[:, None, :]
        heads, shared = (q_latent, keys, keys), (q_rope, k_rope)
        out = kernel.dot_product_attention(*heads, reading, self.scale, shared)
        return jnp.einsum("tnr,nvr->tnv", out, value_half)

    def kv_b_halves(
        self, weight: Float[Array, "out r"]
    ) -> tuple[Float[Array, "n dn r"], Float[Array, "n v r"]]:
        """W_kvb per head: the rows that make keys, and the rows that make values."""
        per_head = weight.reshape(self.num_heads, -1, weight.shape[1])
        key_half, value_half = jnp.split(per_head, [self.qk_nope_head_dim], axis=1)
        return key_half, value_half

    def attention_weights(self, x: Stream, reading: Reading = kernel.CAUSAL) -> base.Weights:
        (q_nope, q_rope), (latents, k_rope) = self.project(x, jnp.arange(x.shape[0]))
        k_nope, _ = self.expand(latents)
        return kernel.attention_weights(q_nope, k_nope, reading, self.scale, (q_rope, k_rope))

    @property
    def widths(self) -> tuple[int, int]:
        score_width = self.num_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        return score_width, self.num_heads * self.v_head_dim

    def fused_projections(self) -> dict[str, Split]:
        def per_kind(weight: Float[Array, "out r"]) -> tuple[Float[Array, "_ r"], ...]:
            return tuple(half.reshape(-1, half.shape[-1]) for half in self.kv_b_halves(weight))

        rank = self.kv_lora_rank
        return {"kv_a_proj": lambda weight: (weight[:rank], weight[rank:]), "kv_b_proj": per_kind}
