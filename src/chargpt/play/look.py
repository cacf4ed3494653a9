"""Looking into a model: what it reads at a character, and how much each character surprises it."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from chargpt.corpus import sliding_windows
from chargpt.errors import require
from chargpt.model import GPT
from chargpt.play.engine import Player
from chargpt.train import cross_entropy

Rows = Float[Array, "layers n s"]
DIGITS = 4


@eqx.filter_jit
def read_at(
    model: GPT, tokens: Int[Array, " t"], index: Int[Array, ""]
) -> tuple[Rows | None, Rows | None]:
    """Of the query at `index`: (its attention weights, the bias that it adds to its scores)."""

    def row(scores: Float[Array, "layers n t s"] | None) -> Rows | None:
        return None if scores is None else scores[:, :, index]

    return row(model.attention_weights(tokens)), row(model.query_bias(tokens))


@eqx.filter_jit
def nats(model: GPT, inputs: Int[Array, "b t"], targets: Int[Array, "b t"]) -> Float[Array, "b t"]:
    return cross_entropy(model.batch(inputs), targets)


def offers(player: Player) -> tuple[bool, bool]:
    """Whether the model has attention weights, and a bias that its queries write."""
    one = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    weights, bias = eqx.filter_eval_shape(read_at, player.run.model, *one)
    return weights is not None, bias is not None


def attention(player: Player, text: str) -> dict[str, Any]:
    """What every head of every layer reads to predict the character after `text`.

    {"weights": [layers][heads][characters], "bias": the same}, null if the type has none. A
    character beyond a window has weight 0 and the bias null. ConfigError if `text` does not fit.
    """
    tokens = player.run.encode(text)
    fits = 1 <= len(tokens) <= player.context
    problem = f"text: has {len(tokens)} characters; {player.name} reads 1 to {player.context}"
    require(fits, problem)
    # Later tokens change nothing: few lengths are compiled
    length = min(player.context, 1 << (len(tokens) - 1).bit_length())
    padded = np.pad(tokens, (0, length - len(tokens)))
    last = jnp.asarray(len(tokens) - 1)
    found = jax.device_get(read_at(player.run.model, jnp.asarray(padded), last))
    weights, bias = (None if rows is None else rows[..., : len(tokens)] for rows in found)
    return {"weights": rounded(weights), "bias": rounded(bias)}


def rounded(rows: np.ndarray | None) -> Any:
    """As nested lists, null for what is not finite."""
    if rows is None:
        return None
    numbers = rows.astype(np.float64).round(DIGITS)
    listed = numbers.astype(object)
    listed[~np.isfinite(numbers)] = None
    return listed.tolist()


def surprise(player: Player, text: str) -> dict[str, Any]:
    """{"nats": of each character, "sum", "mean"}; null for the first, which nothing predicts.

    Each is predicted from half a context or more, but for the beginning, where there is less.
    """
    tokens = player.run.encode(text)
    require(len(tokens) > 1, "text: has one character; write two or more, the first is not scored")
    windows = sliding_windows(tokens, player.context, max(1, player.context // 2))
    scores = np.concatenate(
        [
            np.asarray(nats(player.run.model, inputs[None], targets[None]), np.float64)[0, new > 0]
            for inputs, targets, new in zip(
                windows.inputs, windows.targets, windows.weights, strict=True
            )
        ]
    )
    each = [None, *scores.round(DIGITS).tolist()]
    return {"nats": each, "sum": float(scores.sum()), "mean": float(scores.mean())}
