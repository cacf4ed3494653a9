"""The learning rate by step, what decays, what is clipped, AdamW and Muon themselves, each against its formula."""

import dataclasses
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import small_config

from chargpt.config import AttentionType, OptimizerConfig, OptimizerName, Schedule
from chargpt.model import GPT
from chargpt.optimizer import decay_mask, make_optimizer, make_schedule

PEAK, FINAL, WARMUP, STEPS = 0.1, 0.02, 10, 110
CONFIG: OptimizerConfig = dataclasses.replace(
    small_config().optimizer,
    learning_rate=PEAK,
    final_lr_fraction=FINAL / PEAK,
    warmup_steps=WARMUP,
    decay_fraction=0.2,
)


def rates(
    schedule: Schedule, warmup_steps: int = WARMUP, num_steps: int = STEPS, **options: float
) -> np.ndarray:
    """The learning rate at steps 0 … num_steps, the end included."""
    config = dataclasses.replace(CONFIG, schedule=schedule, warmup_steps=warmup_steps, **options)
    return np.asarray(jax.vmap(make_schedule(config, num_steps))(jnp.arange(num_steps + 1)))


close = lambda actual, expected: np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-9)  # noqa: E731

# --- the schedule


@pytest.mark.parametrize("schedule", Schedule)
def test_warm_up_is_linear_moves_at_the_first_step_and_ends_at_the_peak(schedule):
    values = rates(schedule)
    close(values[:WARMUP], PEAK * np.arange(1, WARMUP + 1) / (WARMUP + 1))
    close(values[WARMUP], PEAK)
    assert values.max() == values[WARMUP]


def test_cosine_halves_its_way_in_the_middle_and_ends_at_the_final_rate():
    values = rates(Schedule.cosine)
    close(values[WARMUP + 50], (PEAK + FINAL) / 2)
    close(values[WARMUP + 25], FINAL + (PEAK - FINAL) * (1 + math.cos(math.pi / 4)) / 2)
    close(values[STEPS], FINAL)
    assert (np.diff(values[WARMUP:]) < 0).all()


def test_wsd_stays_at_the_peak_and_falls_linearly_over_its_decay_fraction():
    values = rates(Schedule.wsd)
    close(values[WARMUP : STEPS - 20 + 1], PEAK)
    close(values[STEPS - 20 :], np.linspace(PEAK, FINAL, 21))


@pytest.mark.parametrize(("decay_fraction", "stable"), [(0.0, 99), (1.0, 0), (0.001, 99)])
def test_wsd_takes_any_decay_fraction(decay_fraction, stable):
    values = rates(Schedule.wsd, decay_fraction=decay_fraction)
    close(values[WARMUP : WARMUP + stable + 1], PEAK)
    close(values[STEPS], FINAL)


def test_constant_stays():
    close(rates(Schedule.constant)[WARMUP:], PEAK)


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("num_steps", [1, 2, 100])
def test_without_warm_up_the_first_step_has_the_peak(schedule, num_steps):
    values = rates(schedule, warmup_steps=0, num_steps=num_steps, decay_fraction=0.5)
    close(values[0], PEAK)
    close(values[-1], PEAK if schedule is Schedule.constant else FINAL)


@pytest.mark.parametrize("schedule", Schedule)
def test_a_run_that_is_all_warm_up_rises_throughout(schedule):
    values = rates(schedule, warmup_steps=8, num_steps=8)
    close(values[:8], PEAK * np.arange(1, 9) / 9)


# --- weight decay

LINEAR = re.compile(r"(_proj|\.head)\.weight$")
OPTIONS = {
    AttentionType.standard: ("model.qk_norm=true", "model.learned_positions=true"),
    AttentionType.mla: ("model.mla.q_lora_rank=4", "model.activation=swiglu"),
    AttentionType.gqa: ("model.tie_embeddings=true", "model.norm=layernorm"),
}


def make_params(mha_type: AttentionType) -> GPT:
    """The parameters of a model, with arbitrary numbers in them: nothing is compiled to make them."""
    config = small_config(f"model.mha_type={mha_type.name}", *OPTIONS.get(mha_type, ())).model
    shapes = eqx.filter_eval_shape(lambda key: GPT(config, 7, 8, key=key), jax.random.key(0))
    random = np.random.default_rng(0)
    is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)  # noqa: E731
    numbers = lambda leaf: (
        jnp.asarray(random.normal(size=leaf.shape), leaf.dtype) if is_shape(leaf) else leaf
    )  # noqa: E731
    return eqx.filter(jax.tree.map(numbers, shapes), eqx.is_inexact_array)


def by_name(tree) -> dict:
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_exactly_the_weights_of_linear_layers_decay(mha_type):
    params = make_params(mha_type)
    mask = by_name(decay_mask(params))
    assert mask == {name: LINEAR.search(name) is not None for name in by_name(params)}
    assert jax.tree.structure(decay_mask(params)) == jax.tree.structure(params)
    spared = {name for name, decays in mask.items() if not decays}
    assert all("norm" in name or "embedding" in name for name in spared)
    assert all(leaf.ndim >= 2 for name, leaf in by_name(params).items() if mask[name])


def test_without_gradient_linear_weights_shrink_and_nothing_else_moves(mha_type):
    params = make_params(mha_type)
    config = dataclasses.replace(
        CONFIG, weight_decay=0.5, schedule=Schedule.constant, warmup_steps=0
    )
    optimizer = make_optimizer(config, STEPS)

    @jax.jit
    def update(params):
        updates, _ = optimizer.update(
            jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
        )
        return optax.apply_updates(params, updates)

    before, after = by_name(params), by_name(update(params))
    for name in before:
        if LINEAR.search(name):
            np.testing.assert_allclose(after[name], (1 - PEAK * 0.5) * before[name], rtol=1e-6)
        else:
            np.testing.assert_array_equal(after[name], before[name])


# --- clipping and AdamW

PARAMS = eqx.nn.Linear(3, 2, use_bias=False, key=jax.random.key(1))


def first_moment(norm: float, grad_clip: float | None) -> jax.Array:
    """Adam's first moment after one gradient of global norm `norm`, with beta1 divided out: the gradient that reached it."""
    grads = jax.tree.map(lambda leaf: norm * leaf / optax.tree.norm(PARAMS), PARAMS)
    optimizer = make_optimizer(dataclasses.replace(CONFIG, grad_clip=grad_clip), STEPS)
    _, state = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    return optax.tree_utils.tree_get(state, "mu").weight / (1 - CONFIG.beta1)


@pytest.mark.parametrize(
    ("norm", "grad_clip", "expected"),
    [(10.0, 1.0, 1.0), (10.0, 0.25, 0.25), (0.5, 1.0, 0.5), (10.0, None, 10.0)],
)
def test_gradients_are_scaled_down_to_the_largest_norm_allowed(norm, grad_clip, expected):
    np.testing.assert_allclose(
        first_moment(norm, grad_clip), expected * PARAMS.weight / optax.tree.norm(PARAMS), rtol=1e-5
    )


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_are_those_of_adamw(weight_decay):
    config = dataclasses.replace(
        CONFIG,
        weight_decay=weight_decay,
        grad_clip=None,
        beta1=0.8,
        beta2=0.95,
        eps=1e-3,
        schedule=Schedule.cosine,
    )
    optimizer = make_optimizer(config, STEPS)
    params, state = PARAMS, optimizer.init(PARAMS)
    weight, mean, square = np.asarray(PARAMS.weight, np.float64), 0.0, 0.0
    for step in range(4):
        gradient = np.random.default_rng(step).normal(size=weight.shape)
        grads = eqx.tree_at(
            lambda linear: linear.weight, PARAMS, jnp.asarray(gradient, jnp.float32)
        )
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)

        mean, square = 0.8 * mean + 0.2 * gradient, 0.95 * square + 0.05 * gradient**2
        direction = (mean / (1 - 0.8 ** (step + 1))) / (
            np.sqrt(square / (1 - 0.95 ** (step + 1))) + 1e-3
        )
        weight = weight - PEAK * (step + 1) / (WARMUP + 1) * (direction + weight_decay * weight)
        np.testing.assert_allclose(params.weight, weight, rtol=1e-5, atol=1e-7)


# --- Muon

MUON = dataclasses.replace(
    CONFIG,
    name=OptimizerName.muon,
    momentum=0.9,
    weight_decay=0.5,
    grad_clip=None,
    schedule=Schedule.constant,
    warmup_steps=0,
)
HIDDEN = re.compile(r"^\.blocks\..*_proj\.weight$")


def orthogonalised(matrix: np.ndarray, steps: int = 5) -> np.ndarray:
    """The Newton-Schulz iteration of Muon, one matrix, as it is written down, times 0.2 sqrt(max(in, out))."""
    x = matrix / (np.linalg.norm(matrix) + CONFIG.eps)
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
    return 0.2 * math.sqrt(max(matrix.shape)) * x


@pytest.mark.parametrize(
    ("out", "into", "steps"), [(3, 6, 5), (6, 3, 5), (4, 4, 2)], ids=["wide", "tall", "square"]
)
def test_muon_orthogonalises_the_momentum_of_every_layer_by_itself(out, into, steps):
    """Nesterov's momentum, each part with its own bias correction; one layer's gradients are a thousand times another's."""
    config = dataclasses.replace(MUON, newton_schulz_steps=steps, adam_learning_rate=123.0)
    weight = np.random.default_rng(9).normal(size=(3, out, into))
    linear = eqx.filter_eval_shape(
        lambda key: eqx.nn.Linear(into, out, use_bias=False, key=key), jax.random.key(0)
    )
    stacked = lambda numbers: eqx.tree_at(
        lambda node: node.weight, linear, jnp.asarray(numbers, jnp.float32)
    )  # noqa: E731
    optimizer, params = make_optimizer(config, STEPS), stacked(weight)
    update, state, mean = jax.jit(optimizer.update), optimizer.init(params), 0.0
    for step in range(3):
        gradient = (
            np.random.default_rng(step).normal(size=weight.shape)
            * np.array([1, 1e-3, 1])[:, None, None]
        )
        updates, state = update(stacked(gradient), state, params)
        params = optax.apply_updates(params, updates)

        mean = 0.9 * mean + 0.1 * gradient
        momentum = 0.9 * mean / (1 - 0.9 ** (step + 2)) + 0.1 * gradient / (1 - 0.9 ** (step + 1))
        directions = np.stack([orthogonalised(matrix, steps) for matrix in momentum])
        np.testing.assert_allclose(
            updates.weight, -PEAK * (directions + 0.5 * weight), rtol=1e-3, atol=1e-5
        )
        weight = weight - PEAK * (directions + 0.5 * weight)
        across = np.stack([orthogonalised(matrix.T, steps).T for matrix in momentum])
        np.testing.assert_allclose(
            across, directions, rtol=1e-9, atol=1e-12
        )  # orientation does not matter


def matrices_in(
    name: str, out: int, into: int, mha_type: AttentionType
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows and columns of each matrix that a projection is fused of."""
    rows, columns = np.arange(out), np.arange(into)
    projection = name.removesuffix(".weight").rpartition(".")[2]
    if mha_type is AttentionType.selective and projection in ("k_proj", "v_proj"):
        return [(rows, columns[: into // 2]), (rows, columns[into // 2 :])]
    if projection == "kv_a_proj":  # the latent, 8 wide, and the rotary key
        return [(rows[:8], columns), (rows[8:], columns)]
    if projection == "kv_b_proj":  # in every head 4 rows of keys and 8 of values
        return [(rows[rows % 12 < 4], columns), (rows[rows % 12 >= 4], columns)]
    return [(rows, columns)]


def test_muon_moves_and_shrinks_the_matrices_of_the_blocks_and_adam_moves_everything_else(mha_type):
    """Every number that Adam has goes as far at the first step, whatever its gradient, and does not decay."""
    params = make_params(mha_type)
    grads = jax.tree.map(lambda leaf: leaf[::-1] + 0.1, params)
    optimizer = make_optimizer(dataclasses.replace(MUON, adam_learning_rate=0.01), STEPS)
    updates = jax.jit(
        lambda grads, params: optimizer.update(grads, optimizer.init(params), params)[0]
    )(grads, params)
    weights, gradients, moves = by_name(params), by_name(grads), by_name(updates)
    hidden = {name for name in moves if HIDDEN.search(name)}
    assert (
        hidden == {name for name in moves if LINEAR.search(name)} - {".head.weight"}
        and len(hidden) >= 5
    )
    for name, move in moves.items():
        gradient = np.asarray(gradients[name], np.float64)
        if name in hidden:
            directions = np.zeros_like(gradient)
            for rows, columns in matrices_in(name, *gradient.shape[1:], mha_type):
                part = np.ix_(range(len(gradient)), rows, columns)
                directions[part] = np.stack([orthogonalised(matrix) for matrix in gradient[part]])
            np.testing.assert_allclose(move, -PEAK * (directions + 0.5 * weights[name]), atol=1e-4)
        else:
            nesterov = 1 + 0.9 / (1 + 0.9)  # optax's Muon gives its Adam Nesterov's momentum too
            np.testing.assert_allclose(move, -0.01 * nesterov * np.sign(gradient), rtol=1e-4)


@pytest.mark.parametrize("adam_learning_rate", [None, 0.03])
def test_adam_beside_muon_follows_the_same_schedule_from_its_own_peak(adam_learning_rate):
    """Without one of its own, from that of Muon."""
    config = dataclasses.replace(
        MUON, adam_learning_rate=adam_learning_rate, schedule=Schedule.wsd, warmup_steps=1
    )
    optimizer = make_optimizer(dataclasses.replace(config, beta1=0.0, beta2=0.0), 4)
    state, found = optimizer.init(PARAMS), []
    for _ in range(4):
        updates, state = optimizer.update(PARAMS, state, PARAMS)
        found.append(float(np.abs(updates.weight).mean()))
    close(
        found,
        (adam_learning_rate or PEAK)
        / PEAK
        * np.asarray(jax.vmap(make_schedule(config, 4))(jnp.arange(4))),
    )
