"""Equinox's own multi-head attention behind our interface: a reference, as plain as possible."""

from typing import ClassVar, final

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from chargpt.attention import base, kernel
from chargpt.attention.base import AbstractAttention, Heads, Positions, Split, Stream
from chargpt.attention.kernel import Reading
from chargpt.attention.rope import apply_rope, require_even
from chargpt.config import require_divides

Queries = tuple[Stream, Positions]


@final
class EquinoxAttention(AbstractAttention):
    """`eqx.nn.MultiheadAttention` as it is, with our RoPE through its `process_heads` hook.

    Its entries are the tokens themselves: every decoded token projects all keys and values again.
    An honest reference for numbers, slow by design in decoding; its causal mask is an array.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"rope"})
    refuses: ClassVar[dict[str, str]] = dict.fromkeys(
        ("qk_norm", "sink", "output_gate", "alibi"),
        "eqx.nn.MultiheadAttention is the reference as it is",
    )
    output: ClassVar[str] = "mha.output_proj"
    exported: ClassVar[dict[str, str]] = {
        "mha.query_proj.": "q_proj.",
        "mha.key_proj.": "k_proj.",
        "mha.value_proj.": "v_proj.",
        "mha.output_proj.": "o_proj.",
    }
    mha: eqx.nn.MultiheadAttention
    d_model: int = eqx.field(static=True)
    num_heads: int = eqx.field(static=True)
    rope_theta: float | None = eqx.field(static=True)

    def __init__(
        self, d_model: int, num_heads: int, rope_theta: float | None, *, key: PRNGKeyArray
    ):
        require_divides("model.num_heads", num_heads, d_model, "model.d_model")
        require_even("model.d_model / model.num_heads", d_model // num_heads, rope_theta)
        self.mha = eqx.nn.MultiheadAttention(num_heads, d_model, key=key)
        self.d_model, self.num_heads, self.rope_theta = d_model, num_heads, rope_theta

    def project(self, x: Stream, positions: Positions) -> tuple[Queries, Stream]:
        return (x, positions), x

    def attend(self, queries: Queries, entries: Float[Array, "s m"], reading: Reading) -> Heads:
        x, positions = queries
        key_positions = reading.key_positions(len(entries))
        Projected = Float[Array, "_ n h"]

        def rotate(
            q: Projected, k: Projected, v: Projected
        ) -> tuple[Projected, Projected, Projected]:
            q = apply_rope(q, positions, self.rope_theta)
            return q, apply_rope(k, key_positions, self.rope_theta), v

        mask = reading.mask(len(x), len(entries))
        mha = eqx.tree_at(lambda mha: mha.output_proj, self.mha, eqx.nn.Identity())
        out = mha(x, entries, entries, mask=mask, process_heads=rotate)
        return out.reshape(len(x), self.num_heads, -1)

    def attention_weights(self, x: Stream, reading: Reading = kernel.CAUSAL) -> base.Weights:
        """The same formula again: Equinox keeps its weights to itself."""
        positions = jnp.arange(x.shape[0])
        queries = base.project_heads(x, self.mha.query_proj.weight, self.num_heads)
        keys = base.project_heads(x, self.mha.key_proj.weight, self.num_heads)
        queries = apply_rope(queries, positions, self.rope_theta)
        keys = apply_rope(keys, positions, self.rope_theta)
        return kernel.attention_weights(queries, keys, reading, queries.shape[-1] ** -0.5)

    @property
    def widths(self) -> tuple[int, int]:
        return self.d_model, self.d_model

    def fused_projections(self) -> dict[str, Split]:
        return {}
