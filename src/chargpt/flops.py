"""What a model costs: parameters, cache bytes, floating-point operations per token."""

from typing import Any

import equinox as eqx
import jax

from chargpt.config import AttentionType, ModelConfig
from chargpt.model import GPT


def count_parameters(model: GPT) -> dict[str, int]:
    """Numbers of parameters by part; their sum is the model's."""
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)))  # noqa: E731
    layers = f"{model.num_layers} layers"
    blocks = model.blocks
    parts = {
        "token embedding": size(model.embedding),
        "position embedding": size(model.position_embedding),
        f"attention, {layers}": size(blocks.attention),
        f"feed-forward, {layers}": size(blocks.feed_forward),
        "norms": size((blocks.attention_norm, blocks.feed_forward_norm, model.final_norm)),
        "output head": size(model.head),
    }
    return {name: number for name, number in parts.items() if number}


def kv_cache_bytes_per_token(model: GPT, dtype: Any) -> int:
    """Bytes that one token leaves in the KV cache, all layers together, at compute precision `dtype`."""
    narrow = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), eqx.filter(model, eqx.is_inexact_array))
    cache = eqx.filter_eval_shape(lambda arrays: eqx.combine(arrays, model).init_cache(1), narrow)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def flops_per_token(model: GPT, config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations of a training step per token: 6 N + 12 L · width · t, forward and backward.

    N counts the parameters that multiply (positions and an untied embedding are looked up); width is that of all heads'
    queries together (PaLM, arXiv 2204.02311, appendix B; the causal half that a fused kernel skips is counted).
    """
    parts = count_parameters(model)
    parameters = sum(parts.values()) - parts.get("position embedding", 0) - (parts["token embedding"] if model.head else 0)
    width = config.num_heads * config.head_width
    if config.mha_type is AttentionType.mla:
        width = config.num_heads * (config.mla.qk_nope_head_dim + config.mla.qk_rope_head_dim)
    return 6.0 * parameters + 12.0 * config.num_layers * width * seq_len
