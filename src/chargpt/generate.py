"""Text from a model: a static KV cache, the whole loop compiled."""

from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, PyTree

from chargpt.model import GPT

Scalar = Int[Array, ""]
Samples = Int[Array, "samples t"]
Keys = Key[Array, " samples"]


def sample_token(
    logits: Float[Array, " vocab"],
    key: PRNGKeyArray,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Scalar:
    """A token drawn from softmax(logits / temperature), the most likely one at temperature 0.

    top_k keeps the k most likely tokens; top_p the fewest most likely ones whose probabilities
    reach p (nucleus sampling, arXiv 1904.09751). Both may be given: top_k comes first.
    """
    if temperature == 0:
        return jnp.argmax(logits)
    logits = logits.astype(jnp.float32) / temperature
    if top_k is not None and top_k < logits.shape[0]:
        kept = jax.lax.top_k(logits, top_k)[1]
        logits = jnp.full_like(logits, -jnp.inf).at[kept].set(logits[kept])
    if top_p is not None and top_p < 1:
        order = jnp.argsort(-logits)
        probabilities = jax.nn.softmax(logits)[order]
        dropped = jnp.cumsum(probabilities) - probabilities >= top_p
        logits = jnp.where(jnp.zeros_like(dropped).at[order].set(dropped), -jnp.inf, logits)
    return jax.random.categorical(key, logits)


def generate(
    model: GPT,
    prompt: Int[np.ndarray, " t"],
    num_tokens: int,
    *,
    max_seq_len: int,
    keys: Keys,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    tokens_per_piece: int = 32,
) -> Iterator[Int[np.ndarray, "samples new"]]:
    """Continue `prompt` by `num_tokens` tokens, one sample per key, in pieces as they are drawn.

    A model whose arrays have one more axis, the first, is several: each draws its key's sample.

    The cache holds `max_seq_len` tokens, the context that the model was trained on. When it is
    full, its last half is read again into an empty cache, at positions from 0, and the text
    continues from there: every token is predicted from at least the last max_seq_len // 2 tokens
    (of which layers with a window read less), and a text of any length costs the same per token.
    Token i of a sample is drawn with fold_in(key, i): the text depends neither on the size of the
    pieces nor on other samples.
    """
    if len(prompt) == 0:
        raise ValueError("the prompt is empty: give at least one token to continue")
    how = temperature, top_k, top_p
    model = _unstack(model)
    keep = max(1, max_seq_len // 2)
    context = jnp.broadcast_to(jnp.asarray(prompt, jnp.int32), (keys.shape[0], len(prompt)))
    if len(prompt) >= max_seq_len:
        context = context[:, -keep:]
    made = 0
    while made < num_tokens:
        position = context.shape[1]
        room = max(1, max_seq_len - position) - 1
        new, cache = _read(model, context, keys, jnp.asarray(made), max_seq_len, how)
        piece = new
        while True:
            yield np.asarray(piece[:, : num_tokens - made])
            made += piece.shape[1]
            if made >= num_tokens or room == 0:
                break
            length = min(tokens_per_piece, room)
            where = jnp.asarray(position), jnp.asarray(made)
            piece, cache = _advance((model, piece[:, -1], keys, *where, length, how), cache)
            new = jnp.concatenate([new, piece], axis=1)
            position, room = position + length, room - length
        context = jnp.concatenate([context, new], axis=1)[:, -keep:]


@eqx.filter_jit
def _unstack(model: GPT) -> GPT:
    if _models(model) is None:
        return model.unstack()
    return eqx.filter_vmap(lambda model: model.unstack())(model)


def _models(model: GPT) -> Any:
    """The axis of arrays that has several models; None if it is one."""
    return eqx.if_array(0) if model.embedding.ndim == 3 else None


@eqx.filter_jit
def _read(
    model: GPT, context: Samples, keys: Keys, index: Scalar, max_seq_len: int, how: Any
) -> tuple[Int[Array, "samples 1"], PyTree]:
    """Read `context` into a fresh cache and draw token number `index` of every sample."""

    def one_sample(
        model: GPT, context: Int[Array, " t"], key: PRNGKeyArray
    ) -> tuple[Array, PyTree]:
        logits, cache = model.decode(context, model.init_cache(max_seq_len), 0)
        return sample_token(logits[-1], jax.random.fold_in(key, index), *how)[None], cache

    return eqx.filter_vmap(one_sample, in_axes=(_models(model), 0, 0))(model, context, keys)


def _draw(kept: tuple[Any, ...], cache: PyTree) -> tuple[Samples, PyTree]:
    """Draw `length` more tokens, number `index` first; the newest so far goes in at `position`."""
    model, token, keys, position, index, length, how = kept

    def one_sample(
        model: GPT, cache: PyTree, token: Scalar, key: PRNGKeyArray
    ) -> tuple[Array, PyTree]:
        def step(carry: tuple[Scalar, PyTree], i: Scalar) -> tuple[tuple[Scalar, PyTree], Scalar]:
            token, cache = carry
            logits, cache = model.decode(token[None], cache, position + i)
            token = sample_token(logits[0], jax.random.fold_in(key, index + i), *how)
            return (token, cache), token

        (_, cache), tokens = jax.lax.scan(step, (token, cache), jnp.arange(length))
        return tokens, cache

    samples = eqx.filter_vmap(one_sample, in_axes=(_models(model), 0, 0, 0))
    return samples(model, cache, token, keys)


_advance: Any = eqx.filter_jit(_draw, donate="all-except-first")
