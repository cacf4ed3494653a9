"""What is measured of a model besides its loss: how widely its heads read."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from conftest import filled, small_config

from chargpt.config import AttentionType
from chargpt.model import GPT
from chargpt.run.evaluate import attention_entropy
from chargpt.train import init_state


def model_of(mha_type: AttentionType) -> GPT:
    config = small_config(f"model.mha_type={mha_type.name}")
    return filled(eqx.filter_eval_shape(init_state, config, 11, 0).model, 0.2)


def test_entropies_are_those_of_the_weights_of_every_layer(mha_type: AttentionType) -> None:
    model, text = model_of(mha_type), jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    weights = eqx.filter_jit(lambda text: jax.vmap(model.attention_weights)(text))(text)
    found = eqx.filter_jit(attention_entropy)(model, text)
    first = model.layers()[0]
    x = jax.vmap(first.attention_norm)(model._embed(text[1][None], jnp.arange(5)))
    expected = eqx.filter_jit(first.attention.attention_weights)(x)
    if expected is None:
        assert weights is None and found is None
        return
    assert weights.shape[:2] == (2, 2) and weights.shape[3:] == (5, 5)
    np.testing.assert_allclose(weights[1, 0], expected, rtol=1e-5, atol=1e-6)
    p = np.asarray(weights, np.float64)
    entropies = -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), axis=-1)
    np.testing.assert_allclose(found, entropies.mean(axis=(0, 3)), rtol=1e-4)


def test_heads_that_read_evenly_have_the_logarithm_of_their_number_of_tokens_as_entropy() -> None:
    def zeroed(leaf: object) -> object:
        return 0 * leaf if eqx.is_array(leaf) else leaf

    model = jax.tree.map(zeroed, model_of(AttentionType.standard))
    found = attention_entropy(model, jnp.zeros((1, 6), int))
    expected = np.mean(np.log(np.arange(1, 7)))
    np.testing.assert_allclose(found, np.full((2, 4), expected), rtol=1e-5)
