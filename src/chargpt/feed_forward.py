"""The feed-forward layer of a block."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from chargpt.attention.base import Stream, projection
from chargpt.config import Activation


def relu2(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """relu² (arXiv 2109.08668)."""
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    Activation.relu: jax.nn.relu,
    Activation.gelu: jax.checkpoint(jax.nn.gelu),  # keeps its input for the gradient, no more
    Activation.relu2: relu2,
    Activation.swiglu: jax.nn.silu,  # of the gate
}


class FeedForward(eqx.Module):
    """down(act(up(x))); swiglu (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    gate_proj: eqx.nn.Linear | None
    up_proj: eqx.nn.Linear
    down_proj: eqx.nn.Linear
    activation: Activation = eqx.field(static=True)
    outputs: ClassVar[tuple[str, ...]] = ("down_proj",)  # paths of what adds to the stream

    def __init__(self, d_model: int, d_ff: int, activation: Activation, *, key: PRNGKeyArray):
        gate_key, up_key, down_key = jax.random.split(key, 3)
        gated = activation is Activation.swiglu
        self.gate_proj = projection(d_model, d_ff, gate_key) if gated else None
        self.up_proj = projection(d_model, d_ff, up_key)
        self.down_proj = projection(d_ff, d_model, down_key)
        self.activation = activation

    def __call__(self, x: Stream) -> Stream:
        return jnp.einsum("tf,mf->tm", self.hidden(x), self.down_proj.weight)

    def routed(self, x: Stream) -> tuple[Stream, None]:
        """The output; there is no router (experts.py has one)."""
        return self(x), None

    def hidden(self, x: Stream) -> Float[Array, "t f"]:
        """What down_proj reads; of stacked layers [e, f, m], of all of them, one after another.

        That is one product, for which XLA for a CPU takes less time than with an axis of layers.
        """

        def project(linear: eqx.nn.Linear) -> Float[Array, "t f"]:
            return jnp.einsum("tm,fm->tf", x, linear.weight.reshape(-1, x.shape[1]))

        hidden = project(self.up_proj)
        if self.gate_proj is None:
            return ACTIVATIONS[self.activation](hidden)
        return ACTIVATIONS[self.activation](project(self.gate_proj)) * hidden
