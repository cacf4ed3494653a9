"""Rotary position embedding (RoFormer, arXiv 2104.09864), half-split as in GPT-NeoX and Llama."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from chargpt.errors import require


def require_even(name: str, width: int, theta: float | None) -> None:
    """ConfigError if RoPE (theta not None) is asked to rotate an odd number of dimensions."""
    require(
        theta is None or width % 2 == 0,
        f"{name}={width}: RoPE rotates pairs, so it must be even; or write model.rope=false",
    )


def rope_angles(positions: Int[Array, " t"], head_dim: int, theta: float) -> Float[Array, "t half"]:
    """In radians: positions * theta^(-2i/head_dim) for the pairs i < head_dim / 2, in float32."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return positions[:, None] * frequencies


def apply_rope(
    x: Float[Array, "t heads h"], positions: Int[Array, " t"], theta: float | None
) -> Float[Array, "t heads h"]:
    """Rotate the pair (x[i], x[i + h/2]) of every head by its angle; theta None: leave x as it is.

    Computed in float32, returned in the dtype of `x`. Query·key then depends on positions only
    through their difference.
    """
    if theta is None:
        return x
    angles = rope_angles(positions, x.shape[-1], theta)[:, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
