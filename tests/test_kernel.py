"""The kernel: blocks against the formula, in values and gradients, and what they never compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from chargpt.attention.kernel import BLOCK, CAUSAL, MAX_BLOCKS, dot_product_attention


def normal(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def literal(queries, keys, values, scale):
    """Every score of every head, half of them thrown away."""
    keys, values = (jnp.repeat(x, queries.shape[1] // x.shape[1], axis=1) for x in (keys, values))
    scores = scale * jnp.einsum("tnd,snd->nts", queries, keys)
    scores = jnp.where(jnp.tri(len(queries), dtype=bool), scores, -jnp.inf)
    return jnp.einsum("nts,snv->tnv", jax.nn.softmax(scores, axis=-1), values)


def causal(queries, keys, values, scale):
    return dot_product_attention(queries, keys, values, CAUSAL, scale)


def with_gradients(function, *arrays):
    """(output, gradients) of a batch, for one random direction."""
    batched = jax.vmap(lambda *one: function(*one, 0.4))
    out, pull_back = jax.vjp(batched, *arrays)
    return out, pull_back(normal(*out.shape, seed=9).astype(out.dtype))


@pytest.mark.parametrize("num_kv_heads", [1, 4])
@pytest.mark.parametrize("length", [1, BLOCK, BLOCK + 1, 3 * BLOCK - 5, MAX_BLOCKS * BLOCK + 3])
def test_blocks_equal_the_formula_in_values_and_gradients(length, num_kv_heads):
    shapes = ((length, 4, 6), (length, num_kv_heads, 6), (length, num_kv_heads, 3))
    arrays = [normal(2, *shape, seed=seed) for seed, shape in enumerate(shapes)]
    found = jax.jit(lambda *a: with_gradients(causal, *a))(*arrays)
    expected = jax.jit(lambda *a: with_gradients(literal, *a))(*arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


def test_blocks_in_bfloat16_stay_near_float32():
    arrays = [normal(2, 150, 2, 8, seed=seed) for seed in range(3)]
    narrow = [array.astype(jnp.bfloat16) for array in arrays]
    gradients = jax.jit(lambda *a: with_gradients(causal, *a))
    wide = gradients(*[array.astype(jnp.float32) for array in narrow])
    found = gradients(*narrow)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wide), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.03 * float(jnp.abs(b).max()))


def test_large_scores_do_not_overflow():
    arrays = [100 * normal(1, 100, 1, 4, seed=seed) for seed in range(3)]
    assert all(
        jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(with_gradients(causal, *arrays))
    )


def test_no_square_of_scores_is_ever_held():
    length = 1024

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (np.prod(v.aval.shape) for v in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                yield from sizes(inner)

    arrays = [normal(1, length, 1, 4, seed=seed) for seed in range(3)]
    ours, squares = (
        max(sizes(jax.make_jaxpr(lambda *a, f=function: with_gradients(f, *a))(*arrays).jaxpr))
        for function in (causal, literal)
    )
    assert squares == length**2 and ours <= BLOCK * length
