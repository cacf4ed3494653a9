"""Equinox's own multi-head attention behind our interface: a reference, as plain as it comes."""

from typing import final

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from chargpt.attention.base import AbstractAttention, Mask, recording, softmax
from chargpt.attention.rope import apply_rope


@final
class EquinoxAttention(AbstractAttention):
    """`eqx.nn.MultiheadAttention` as it is, with our RoPE through its `process_heads` hook.

    Its entries are the tokens themselves: every decoded token projects all keys and values again. An honest reference for
    numbers, slow by design in decoding, and its causal mask is an array.
    """

    mha: eqx.nn.MultiheadAttention
    d_model: int = eqx.field(static=True)
    rope_theta: float | None = eqx.field(static=True)

    def __init__(self, d_model: int, num_heads: int, rope_theta: float | None, *, key: PRNGKeyArray):
        self.mha = eqx.nn.MultiheadAttention(num_heads, d_model, key=key)
        self.d_model = d_model
        self.rope_theta = rope_theta

    def project(self, x: Float[Array, "t m"], positions: Int[Array, " t"]):
        return (x, positions), x

    def attend(
        self, queries: tuple[Float[Array, "t m"], Int[Array, " t"]], entries: Float[Array, "s m"], mask: Mask
    ) -> Float[Array, "t m"]:
        x, positions = queries
        key_positions = jnp.arange(entries.shape[0])
        if isinstance(mask, str):
            mask = key_positions[None, :] <= positions[:, None]

        def rotate(q, k, v):
            q, k = apply_rope(q, positions, self.rope_theta), apply_rope(k, key_positions, self.rope_theta)
            if recording():  # Equinox keeps its weights to itself: the same formula again
                softmax(jnp.einsum("tnh,snh->nts", q * q.shape[-1] ** -0.5, k), mask, q.dtype)
            return q, k, v

        return self.mha(x, entries, entries, mask=mask, process_heads=rotate)
