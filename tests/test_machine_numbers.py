"""What XLA computes wrongly on a CPU, and that chargpt does not ask it to.

jaxlib 0.10.2 computes wrongly some reductions that it fuses with a product
(https://github.com/jax-ml/jax/issues/39103). The shape to avoid:

    jax.vmap(lambda row: jnp.sum(matrix @ row))(rows)

with rows of width 3, 32,769 to about 43,500 of them, and a matrix of 2 or 3 rows. The results are
wrong from row 32,768 on; those of a mean, a norm and a maximum too. Plain reductions are right, and
so is the product laid out [rows, width], as every einsum of chargpt has it.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
from conftest import filled, small_config

from chargpt.model import GPT
from chargpt.train import loss_fn

ROWS = 40_000
WIDTHS = [*range(1, 9), 16, 64]
REDUCTIONS: dict[str, Callable] = {
    "sum": jnp.sum,
    "mean": jnp.mean,
    "norm": jnp.linalg.norm,
    "max": jnp.max,
}

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA on a CPU")


def whole_numbers(*shape: int) -> jax.Array:
    """Small ones: their sums are exact, in whatever order."""
    return jnp.asarray(np.random.default_rng(0).integers(-3, 4, shape), jnp.float32)


def assert_compiled_as_it_is_written(function: Callable, *inputs: jax.Array) -> None:
    """Compiled as a whole, `function` gives what its operations give one by one."""
    with jax.disable_jit():
        expected = function(*inputs)
    found = eqx.filter_jit(function)(*inputs)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        error = np.abs(np.asarray(one) - np.asarray(other)).max()
        assert error <= 1e-4 * np.abs(other).max() + 1e-9


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_rows_are_reduced_correctly(name: str, width: int) -> None:
    assert_compiled_as_it_is_written(jax.vmap(REDUCTIONS[name]), whole_numbers(ROWS, width))


def wrong_here(width: int) -> object:
    """A width, expected to fail where this version of jaxlib is wrong."""
    wrong = width == 3 and jaxlib.__version__ == "0.10.2"
    return pytest.param(width, marks=[pytest.mark.xfail(reason="jax issue 39103")] * wrong)


@pytest.mark.parametrize("width", [wrong_here(width) for width in WIDTHS])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_products_of_a_matrix_and_each_row_are_reduced_correctly(name: str, width: int) -> None:
    def reduce(matrix: jax.Array, rows: jax.Array) -> jax.Array:
        return jax.vmap(lambda row: REDUCTIONS[name](matrix @ row))(rows)

    assert_compiled_as_it_is_written(
        reduce, whole_numbers(width, width), whole_numbers(ROWS, width)
    )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_products_as_they_are_written_here_are_reduced_correctly(name: str, width: int) -> None:
    def reduce(matrix: jax.Array, batch: jax.Array) -> jax.Array:
        def one(sequence: jax.Array) -> jax.Array:
            return jax.vmap(REDUCTIONS[name])(jnp.einsum("tm,om->to", sequence, matrix))

        return jax.vmap(one)(batch)

    batch = whole_numbers(ROWS // 16, 16, width)
    assert_compiled_as_it_is_written(reduce, whole_numbers(width, width), batch)


@pytest.mark.parametrize("kind", ["standard", "selective", "mla"])
def test_loss_and_gradient_are_right_where_every_width_is_three(kind: str) -> None:
    """A model 3 wide, with latents and a vocabulary of 3, over as many rows as go wrong above."""
    latents = ["q_lora_rank=3", "kv_lora_rank=3", "qk_nope_head_dim=2", "qk_rope_head_dim=1"]
    options = ["d_model=3", "num_heads=1", "num_layers=1", "d_ff=3", "rope=false"]
    options += [f"mla.{latent}" for latent in [*latents, "v_head_dim=3"]]
    config = small_config(
        f"model.mha_type={kind}", *(f"model.{option}" for option in options), "dataset.seq_len=16"
    )
    build = eqx.Partial(GPT, config.model, 3, 16)
    model = filled(eqx.filter_eval_shape(build, key=jax.random.key(0)), 0.5)
    tokens = jnp.abs(whole_numbers(ROWS // 16, 17)).astype(jnp.int32) % 3
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def gradient(model: GPT) -> tuple:
        return eqx.filter_value_and_grad(loss_fn)(model, inputs, targets, None, jnp.float32)

    assert_compiled_as_it_is_written(gradient, model)
