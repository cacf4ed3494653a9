"""Six attention types behind one interface; `make_attention` is the only place that knows them all."""

from typing import assert_never

from jaxtyping import PRNGKeyArray

from chargpt.attention.base import AbstractAttention
from chargpt.attention.grouped import GroupedQueryAttention
from chargpt.attention.latent import MultiHeadLatentAttention
from chargpt.attention.reference import EquinoxAttention
from chargpt.attention.selective import SelectiveAttention
from chargpt.config import AttentionType, ModelConfig

__all__ = [
    "AbstractAttention",
    "EquinoxAttention",
    "GroupedQueryAttention",
    "MultiHeadLatentAttention",
    "SelectiveAttention",
    "make_attention",
]


def make_attention(config: ModelConfig, *, key: PRNGKeyArray) -> AbstractAttention:
    """The attention layer that `config.mha_type` names."""
    rope_theta = config.rope_theta if config.rope else None
    match config.mha_type:
        case AttentionType.standard | AttentionType.gqa | AttentionType.mqa:
            return GroupedQueryAttention(
                d_model=config.d_model,
                num_heads=config.num_heads,
                num_kv_heads=config.kv_heads,
                head_dim=config.head_width,
                rope_theta=rope_theta,
                qk_norm=config.qk_norm,
                key=key,
            )
        case AttentionType.selective:
            return SelectiveAttention(d_model=config.d_model, num_heads=config.num_heads, rope_theta=rope_theta, key=key)
        case AttentionType.mla:
            return MultiHeadLatentAttention(
                d_model=config.d_model,
                num_heads=config.num_heads,
                q_lora_rank=config.mla.q_lora_rank,
                kv_lora_rank=config.mla.kv_lora_rank,
                qk_nope_head_dim=config.mla.qk_nope_head_dim,
                qk_rope_head_dim=config.mla.qk_rope_head_dim,
                v_head_dim=config.mla.v_head_dim,
                rope_theta=rope_theta,
                key=key,
            )
        case AttentionType.equinox:
            return EquinoxAttention(d_model=config.d_model, num_heads=config.num_heads, rope_theta=rope_theta, key=key)
        case _:
            assert_never(config.mha_type)
