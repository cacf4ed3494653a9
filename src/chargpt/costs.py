"""What a model costs: parameters, cache bytes, floating-point operations."""

from typing import Any

import equinox as eqx
import jax

from chargpt.attention import is_shape
from chargpt.experts import MixtureOfExperts
from chargpt.model import GPT


def is_parameter(leaf: Any) -> bool:
    return eqx.is_inexact_array(leaf) or is_shape(leaf)


def count_parameters(model: GPT) -> dict[str, int]:
    """Numbers of parameters by part, of a model or of its shapes; their sum is the model's."""
    layers, blocks = f"{model.num_layers} layers", model.stacked
    parts = {
        "token embedding": model.embedding,
        "position embedding": model.position_embedding,
        "n-gram embedding": model.ngram_embedding,
        f"attention, {layers}": (blocks.attention, blocks.modifiers),
        f"feed-forward, {layers}": blocks.feed_forward,
        "norms": (blocks.attention_norm, blocks.feed_forward_norm, model.final_norm),
        "output head": model.head,
    }
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(part, is_parameter)))
        for name, part in parts.items()
    }
    return {name: size for name, size in sizes.items() if size}


def idle_parameters(model: GPT) -> int:
    """How many of the parameters a token does not meet: those of experts that it is not given."""
    layer = model.stacked.feed_forward
    if not isinstance(layer, MixtureOfExperts):
        return 0
    sizes = [leaf.size for leaf in jax.tree.leaves(eqx.filter(layer.experts, is_parameter))]
    number, given = layer.router.num_experts, layer.router.experts_per_token
    return sum(sizes) // number * (number - given)


def kv_cache_bytes(model: GPT, dtype: Any, seq_len: int) -> int:
    """Bytes of all layers' KV cache with `seq_len` tokens in it, at compute precision `dtype`.

    Of a model or of its shapes. A layer with a window keeps no more tokens than that.
    """
    arrays = eqx.filter(model, is_parameter)
    static = eqx.filter(model, is_parameter, inverse=True)
    narrow = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), arrays)
    cache = eqx.filter_eval_shape(
        lambda arrays: eqx.combine(arrays, static).init_cache(seq_len)[: model.num_layers], narrow
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def flops_per_token(model: GPT, seq_len: int) -> float:
    """Operations of a training step per token: 6 N + 6 (score width + value width) · t per layer.

    Floating-point, forward and backward. N counts the parameters that multiply (positions, n-grams
    and an untied embedding are looked up); the attention type declares the widths, of all heads
    together: 12 L · width · t if the two are equal (PaLM, arXiv 2204.02311, appendix B); of t at
    most the window. The causal half that a fused kernel skips is counted; of experts, those that a
    token is given.
    """
    parts = count_parameters(model)
    unused = sum(parts.get(f"{what} embedding", 0) for what in ("position", "n-gram"))
    unused += idle_parameters(model)
    unused += parts["token embedding"] if model.head else 0
    widths = sum(model.stacked.attention.widths)
    read = sum(min(seq_len, window or seq_len) for window in model.windows)
    return 6.0 * (sum(parts.values()) - unused) + 6.0 * widths * read
