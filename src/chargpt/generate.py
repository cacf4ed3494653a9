"""Text from a model: a static KV cache, the whole loop compiled."""

import functools
from collections.abc import Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from chargpt.model import GPT


def sample_token(
    logits: Float[Array, " vocab"],
    key: PRNGKeyArray,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Int[Array, ""]:
    """A token drawn from softmax(logits / temperature), the most likely one at temperature 0.

    top_k keeps the k most likely tokens; top_p keeps the fewest most likely ones whose probabilities reach p (nucleus
    sampling, arXiv 1904.09751). Both may be given: top_k first.
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
    keys: Key[Array, " samples"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Iterator[Int[np.ndarray, "samples new"]]:
    """Continue `prompt` by `num_tokens` tokens, one sample per key, in pieces as they are made.

    The cache holds `max_seq_len` tokens, the context that the model was trained on. When it is full, the last half of it is
    read again into an empty cache, at positions from 0, and the text goes on from there: so every token is predicted from
    at least the last max_seq_len // 2 tokens, and a text of any length costs the same per token.
    """
    if len(prompt) == 0:
        raise ValueError("the prompt is empty: give at least one token to continue")
    keep = max(1, max_seq_len // 2)
    context = jnp.broadcast_to(jnp.asarray(prompt), (keys.shape[0], len(prompt)))
    if len(prompt) > max_seq_len - 1:
        context = context[:, -keep:]
    made = 0
    while made < num_tokens:
        new_tokens = max(1, max_seq_len - context.shape[1])
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, made)
        piece = _continue(model, context, step_keys, new_tokens, max_seq_len, temperature, top_k, top_p)
        yield np.asarray(piece[:, : num_tokens - made])
        made += new_tokens
        context = jnp.concatenate([context, piece], axis=1)[:, -keep:]


@eqx.filter_jit
def _continue(
    model: GPT,
    context: Int[Array, "samples t"],
    keys: Key[Array, " samples"],
    new_tokens: int,
    max_seq_len: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> Int[Array, "samples {new_tokens}"]:
    """Read `context` into a fresh cache and draw `new_tokens` more tokens; the last of them is not read back."""
    pick = functools.partial(sample_token, temperature=temperature, top_k=top_k, top_p=top_p)

    def one_sample(context, key):
        logits, cache = model.decode(context, model.init_cache(max_seq_len), 0)
        first = pick(logits[-1], jax.random.fold_in(key, 0))

        def step(carry, index):
            token, cache = carry
            logits, cache = model.decode(token[None], cache, context.shape[0] + index - 1)
            token = pick(logits[0], jax.random.fold_in(key, index))
            return (token, cache), token

        _, rest = jax.lax.scan(step, (first, cache), jnp.arange(1, new_tokens))
        return jnp.concatenate([first[None], rest])

    return jax.vmap(one_sample)(context, keys)
