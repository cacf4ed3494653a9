"""Positions that are added to the embeddings (Vaswani et al., arXiv 1706.03762)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sinusoidal(positions: Int[Array, " t"], width: int) -> Float[Array, "t width"]:
    """PE(p, 2i) = sin(p / 10000^(2i/width)), PE(p, 2i+1) = cos of the same, in float32."""
    even = jnp.arange(0, width, 2, dtype=jnp.float32)
    angles = positions[:, None] * 10000.0 ** (-even / width)
    pairs = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return pairs.reshape(len(positions), -1)[:, :width]
