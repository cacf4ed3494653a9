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
Logits = Float[Array, "samples t vocab"]
Keys = Key[Array, " samples"]
Number = float | int | Float[Array, ""] | Int[Array, ""]


def sample_token(
    logits: Float[Array, " vocab"],
    key: PRNGKeyArray,
    temperature: Number,
    top_k: Number | None = None,
    top_p: Number | None = None,
) -> Scalar:
    """A token drawn from softmax(logits / temperature), the most likely one at temperature 0.

    top_k keeps the k most likely tokens; top_p the fewest most likely ones whose probabilities
    reach p (nucleus sampling, arXiv 1904.09751). Both may be given: top_k comes first.
    """
    greedy = jnp.asarray(temperature) == 0
    scaled = logits.astype(jnp.float32) / jnp.where(greedy, 1, temperature)
    if top_k is not None or top_p is not None:
        order = jnp.argsort(-scaled)  # of equal ones the first comes first
        best = scaled[order]
        if top_k is not None:
            best = jnp.where(jnp.arange(best.shape[0]) < top_k, best, -jnp.inf)
        if top_p is not None:
            probabilities = jax.nn.softmax(best)
            before = jnp.cumsum(probabilities) - probabilities
            best = jnp.where((before < top_p) | (jnp.asarray(top_p) >= 1), best, -jnp.inf)
        scaled = jnp.zeros_like(scaled).at[order].set(best)
    return jnp.where(greedy, jnp.argmax(logits), jax.random.categorical(key, scaled))


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
    model = unstack(model)
    keep = first_context(max_seq_len, max_seq_len)
    context = jnp.broadcast_to(jnp.asarray(prompt, jnp.int32), (keys.shape[0], len(prompt)))
    context = context[:, -first_context(len(prompt), max_seq_len) :]
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
            piece, _, cache = advance((model, piece[:, -1], keys, *where, length, how), cache)
            new = jnp.concatenate([new, piece], axis=1)
            position, room = position + length, room - length
        context = jnp.concatenate([context, new], axis=1)[:, -keep:]


def first_context(prompt: int, max_seq_len: int) -> int:
    """How many of `prompt` tokens are read before the first is drawn: all, or half a context."""
    return prompt if prompt < max_seq_len else max(1, max_seq_len // 2)


@eqx.filter_jit
def unstack(model: GPT) -> GPT:
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


def _draw(kept: tuple[Any, ...], cache: PyTree) -> tuple[Samples, Logits, PyTree]:
    """Draw `length` more tokens, number `index` first; the newest so far goes in at `position`.

    Position, index and how to draw are the same for all samples, or arrays with one for each. The
    logits of all tokens come with them. Where `given`, [samples, length], is not below 0, that
    token is taken instead of one that is drawn: so a prompt is read beside texts that go on.
    """
    model, token, keys, position, index, length, how, *given = kept
    own = position, index, how, *given
    axes = jax.tree.map(lambda leaf: 0 if jnp.ndim(leaf) else None, own)

    def one_sample(model: GPT, cache: PyTree, token: Scalar, key: PRNGKeyArray, own: Any) -> Any:
        position, index, how, *given = own

        def step(carry: tuple[Scalar, PyTree], i: Scalar) -> Any:
            token, cache = carry
            logits, cache = model.decode(token[None], cache, position + i)
            token = sample_token(logits[0], jax.random.fold_in(key, index + i), *how)
            for tokens in given:
                token = jnp.where(tokens[i] < 0, token, tokens[i])
            return (token, cache), (token, logits[0])

        (_, cache), (tokens, logits) = jax.lax.scan(step, (token, cache), jnp.arange(length))
        return tokens, logits, cache

    samples = eqx.filter_vmap(one_sample, in_axes=(_models(model), 0, 0, 0, axes))
    return samples(model, cache, token, keys, own)


advance: Any = eqx.filter_jit(_draw, donate="all-except-first")


@eqx.filter_jit
def of_samples(cache: PyTree, samples: Int[Array, " new"]) -> PyTree:
    """The cache of those samples, in that order."""
    return jax.tree.map(lambda leaf: leaf[samples], cache)
