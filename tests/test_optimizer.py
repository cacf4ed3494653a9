"""Learning rate, weight decay, clipping, AdamW and Muon, each against its formula."""

import dataclasses
import functools
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import filled, small_config

from chargpt.config import AttentionType, OptimizerConfig, OptimizerName, Schedule
from chargpt.model import GPT
from chargpt.optimizer import (
    Hyperparameters,
    decay_mask,
    hyperparameters,
    make_optimizer,
    make_schedule,
)

PEAK, FINAL, WARMUP, STEPS = 0.1, 0.02, 10, 110
CONFIG: OptimizerConfig = dataclasses.replace(
    small_config().optimizer,
    learning_rate=PEAK,
    final_lr_fraction=FINAL / PEAK,
    warmup_steps=WARMUP,
    decay_fraction=0.2,
)


def numbers(config: OptimizerConfig, num_steps: int = STEPS) -> Hyperparameters:
    """Those of a run of `num_steps` steps."""
    trainer = dataclasses.replace(small_config().trainer, num_steps=num_steps)
    run = dataclasses.replace(small_config(), optimizer=config, trainer=trainer)
    return hyperparameters(run)


def make(config: OptimizerConfig, num_steps: int = STEPS) -> optax.GradientTransformation:
    return make_optimizer(config, numbers(config, num_steps))


def rates(
    schedule: Schedule, warmup_steps: int | None = WARMUP, num_steps: int = STEPS, **options: float
) -> np.ndarray:
    """The learning rate at steps 0 … num_steps, the end included."""
    config = dataclasses.replace(CONFIG, schedule=schedule, warmup_steps=warmup_steps, **options)
    rate = make_schedule(schedule, numbers(config, num_steps))
    return np.asarray(jax.vmap(rate)(jnp.arange(num_steps + 1)))


close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-9)

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


def test_by_default_a_run_warms_up_for_a_tenth_of_its_steps():
    close(rates(Schedule.wsd, warmup_steps=None, num_steps=80), rates(Schedule.wsd, 8, 80))
    assert float(numbers(dataclasses.replace(CONFIG, warmup_steps=None), 5000).warmup_steps) == 100


# --- weight decay

SIX = {  # types of which the names are known here, with options that put every kind of weight in
    "standard": ("model.qk_norm=true", "model.learned_positions=true"),
    "gqa": ("model.tie_embeddings=true", "model.norm=layernorm"),
    "mqa": (),
    "selective": (),
    "mla": ("model.mla.q_lora_rank=4", "model.activation=swiglu"),
    "equinox": (),
}
LINEAR = re.compile(r"(_proj|\.head)\.weight$")


def make_params(mha_type: AttentionType) -> GPT:
    """The parameters of a model, with arbitrary numbers in them: no initialiser is compiled."""
    options = SIX.get(mha_type.name, ())
    config = small_config(f"model.mha_type={mha_type.name}", *options).model
    build = functools.partial(GPT, config, 7, 8)
    model = filled(eqx.filter_eval_shape(build, key=jax.random.key(0)), 1.0)
    return eqx.filter(model, eqx.is_inexact_array)


def linear_weights(params: GPT) -> dict[str, eqx.nn.Linear]:
    """Every linear layer by the path of its weight."""
    nodes = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda node: isinstance(node, eqx.nn.Linear)
    )
    return {
        jax.tree_util.keystr(path) + ".weight": node
        for path, node in nodes
        if isinstance(node, eqx.nn.Linear)
    }


def by_name(tree) -> dict:
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_exactly_the_weights_of_linear_layers_decay(mha_type):
    params = make_params(mha_type)
    mask, linear = by_name(decay_mask(params)), linear_weights(params)
    assert mask == {name: name in linear for name in by_name(params)}
    assert jax.tree.structure(decay_mask(params)) == jax.tree.structure(params)
    assert ".blocks.feed_forward.up_proj.weight" in linear
    assert all(leaf.ndim >= 2 for name, leaf in by_name(params).items() if mask[name])


@pytest.mark.parametrize("kind", SIX)
def test_projections_and_head_decay_norms_and_embeddings_do_not(kind):
    mask = by_name(decay_mask(make_params(AttentionType[kind])))
    assert mask == {name: LINEAR.search(name) is not None for name in mask}
    spared = {name for name, decays in mask.items() if not decays}
    assert spared and all("norm" in name or "embedding" in name for name in spared)


def test_without_gradient_linear_weights_shrink_and_nothing_else_moves(mha_type):
    params = make_params(mha_type)
    config = dataclasses.replace(
        CONFIG, weight_decay=0.5, schedule=Schedule.constant, warmup_steps=0
    )
    optimizer = make(config)

    @jax.jit
    def update(params):
        updates, _ = optimizer.update(
            jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
        )
        return optax.apply_updates(params, updates)

    before, after = by_name(params), by_name(update(params))
    for name in before:
        if name in linear_weights(params):
            np.testing.assert_allclose(after[name], (1 - PEAK * 0.5) * before[name], rtol=1e-6)
        else:
            np.testing.assert_array_equal(after[name], before[name])


# --- clipping and AdamW

PARAMS = eqx.nn.Linear(3, 2, use_bias=False, key=jax.random.key(1))


def first_moment(norm: float, grad_clip: float | None) -> jax.Array:
    """What reached Adam of a gradient of global norm `norm`: its first moment / (1 - beta1)."""
    grads = jax.tree.map(lambda leaf: norm * leaf / optax.tree.norm(PARAMS), PARAMS)
    optimizer = make(dataclasses.replace(CONFIG, grad_clip=grad_clip))
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
    optimizer = make(config)
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


def orthogonalised(matrix: np.ndarray, steps: int = 5) -> np.ndarray:
    """Muon's Newton-Schulz iteration of one matrix, times 0.2 sqrt(max(in, out))."""
    x = matrix / (np.linalg.norm(matrix) + CONFIG.eps)
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
    return 0.2 * math.sqrt(max(matrix.shape)) * x


@pytest.mark.parametrize(
    ("out", "into", "steps"), [(3, 6, 5), (6, 3, 5), (4, 4, 2)], ids=["wide", "tall", "square"]
)
def test_muon_orthogonalises_the_momentum_of_every_layer_by_itself(out, into, steps):
    """Nesterov's momentum, each part with its own bias correction.

    The gradients of one layer are a thousand times those of another.
    """
    config = dataclasses.replace(MUON, newton_schulz_steps=steps, adam_learning_rate=123.0)
    weight = np.random.default_rng(9).normal(size=(3, out, into))
    linear = eqx.filter_eval_shape(
        lambda key: eqx.nn.Linear(into, out, use_bias=False, key=key), jax.random.key(0)
    )

    def stacked(numbers):
        return eqx.tree_at(lambda node: node.weight, linear, jnp.asarray(numbers, jnp.float32))

    optimizer, params = make(config), stacked(weight)
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
        # Which way round the matrix lies does not matter
        across = np.stack([orthogonalised(matrix.T, steps).T for matrix in momentum])
        np.testing.assert_allclose(across, directions, rtol=1e-9, atol=1e-12)


def fused(params: GPT) -> dict[str, list[np.ndarray]]:
    """Where the numbers of every matrix lie in the projections that are several in one, by path.

    The attention type says it; tests/test_attention.py checks it against the formulas.
    """
    attention, found = params.stacked.attention, {}
    for path, split in attention.fused_projections().items():
        shape = functools.reduce(getattr, path.split("."), attention).weight.shape[1:]
        numbers = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
        name = f".blocks.attention.{path}.weight"
        found[name] = [np.asarray(part, int) for part in split(numbers)]
    return found


def test_muon_moves_and_shrinks_the_matrices_of_the_blocks_and_adam_moves_everything_else(mha_type):
    """Adam's numbers move equally far at first, whatever the gradient, and do not decay."""
    params = make_params(mha_type)
    grads = jax.tree.map(lambda leaf: leaf[::-1] + 0.1, params)
    optimizer = make(dataclasses.replace(MUON, adam_learning_rate=0.01))
    updates = jax.jit(
        lambda grads, params: optimizer.update(grads, optimizer.init(params), params)[0]
    )(grads, params)
    weights, gradients, moves = by_name(params), by_name(grads), by_name(updates)
    hidden, parts = linear_weights(params).keys() - {".head.weight"}, fused(params)
    assert {f".blocks.feed_forward.{name}_proj.weight" for name in ("up", "down")} < hidden
    for name, move in moves.items():
        gradient = np.asarray(gradients[name], np.float64)
        if name in hidden:
            whole = np.arange(gradient[0].size).reshape(gradient[0].shape)
            directions = np.zeros_like(gradient)
            for layer, matrix in enumerate(gradient):
                for part in parts.get(name, [whole]):
                    directions[layer].flat[part] = orthogonalised(matrix.flat[part])
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
    optimizer = make(dataclasses.replace(config, beta1=0.0, beta2=0.0), 4)
    state, found = optimizer.init(PARAMS), []
    for _ in range(4):
        updates, state = optimizer.update(PARAMS, state, PARAMS)
        found.append(float(np.abs(updates.weight).mean()))
    expected = jax.vmap(make_schedule(config.schedule, numbers(config, 4)))(jnp.arange(4))
    close(found, (adam_learning_rate or PEAK) / PEAK * np.asarray(expected))
