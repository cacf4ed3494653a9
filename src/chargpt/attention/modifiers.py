"""What crosses the attention types: a gate on what heads read, sinks, ALiBi."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from chargpt.attention.base import AbstractAttention, Gate, Stream, projection
from chargpt.attention.kernel import Reading
from chargpt.config import ModelConfig, OutputGate, Sink


class Modifiers(eqx.Module):
    """How a layer reads, and the factors on what it has read, whatever its attention type.

    Gate: sigmoid(W_g x), x the layer's input, on the heads before o_proj; one factor for each head,
    or for each element of it (arXiv 2505.06708). Sink: a logit per head in the softmax, without a
    value, that is learned (gpt-oss) or zero: exp(s_j) / (1 + sum exp(s)).
    """

    gate_proj: eqx.nn.Linear | None
    sink: Float[Array, " n"] | None  # learned
    num_heads: int = eqx.field(static=True)
    zero_sink: bool = eqx.field(static=True)
    alibi: bool = eqx.field(static=True)

    def __init__(self, config: ModelConfig, attention: AbstractAttention, *, key: PRNGKeyArray):
        self.num_heads, width = attention.heads
        widths = {OutputGate.head: self.num_heads, OutputGate.element: self.num_heads * width}
        gated = config.output_gate is not OutputGate.none
        self.gate_proj = None
        if gated:
            self.gate_proj = projection(config.d_model, widths[config.output_gate], key)
        self.sink = jnp.zeros(self.num_heads) if config.sink is Sink.learned else None
        self.zero_sink = config.sink is Sink.zero
        self.alibi = config.has_alibi

    def reading(self, window: int | None) -> Reading:
        sink = jnp.zeros(self.num_heads) if self.zero_sink else self.sink
        return Reading(sink=sink, window=window, alibi=self.alibi)

    def gate(self, x: Stream) -> Gate:
        if self.gate_proj is None:
            return None
        gates = jax.nn.sigmoid(jnp.einsum("tm,gm->tg", x, self.gate_proj.weight))
        return gates.reshape(x.shape[0], self.num_heads, -1)
