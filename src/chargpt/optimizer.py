"""The optimizer of a run, built from optax: clipping, schedule, AdamW or Muon."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Bool, Float, Int, PyTree

from chargpt.attention import AbstractAttention
from chargpt.config import Config, OptimizerConfig, OptimizerName, Schedule
from chargpt.experts import TopKRouter
from chargpt.model import is_linear
from chargpt.parallel import Devices

Tree = TypeVar("Tree")
Scalar = Float[Array, ""]
Flag = Bool[Array, ""] | bool
# `update` takes two facts of the step: the gradient's `norm`, and whether it is `finite`.
Optimizer: TypeAlias = optax.GradientTransformationExtraArgs


class Hyperparameters(eqx.Module):
    """The numbers that searches vary: inputs of a compiled step, which serves them all."""

    learning_rate: Float[Array, ""]
    weight_decay: Float[Array, ""]
    warmup_steps: Float[Array, ""]
    decay_fraction: Float[Array, ""]
    final_lr_fraction: Float[Array, ""]
    num_steps: Float[Array, ""]
    adam_learning_rate: Float[Array, ""] | None = None  # if it differs


def hyperparameters(config: Config) -> Hyperparameters:
    """Those that `config` asks for."""
    numbers = dataclasses.asdict(config.optimizer) | {
        "warmup_steps": config.warmup_steps,
        "num_steps": config.trainer.num_steps,
    }
    names = [field.name for field in dataclasses.fields(Hyperparameters)]
    chosen = {name: numbers[name] for name in names if numbers[name] is not None}
    return Hyperparameters(**{name: jnp.float32(number) for name, number in chosen.items()})


def make_schedule(kind: Schedule, numbers: Hyperparameters) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then cosine, stable with a linear tail, or constant.

    The first step already moves: warm-up runs over 1/(w+1) … w/(w+1) of the peak.
    """
    warmup, final = numbers.warmup_steps, numbers.final_lr_fraction

    def learning_rate(count: Int[Array, "..."]) -> Float[Array, "..."]:
        # Steps since the end of warm-up, and how many there are in all
        done, after = count - warmup, jnp.maximum(1, numbers.num_steps - warmup)
        match kind:
            case Schedule.cosine:
                turn = jnp.cos(jnp.pi * jnp.clip(done / after, 0, 1))
                body = final + (1 - final) * (1 + turn) / 2
            case Schedule.wsd:
                decay = jnp.maximum(1, after * numbers.decay_fraction)
                body = 1 - (1 - final) * jnp.clip((done - (after - decay)) / decay, 0, 1)
            case Schedule.constant:
                body = jnp.float32(1.0)
        return numbers.learning_rate * jnp.where(done < 0, (count + 1) / (warmup + 1), body)

    return learning_rate


def label(params: PyTree, rule: Callable[[bool, Any], Any]) -> PyTree:
    """`rule(linear, leaf)` for every leaf; `linear`: it is the weight of a linear layer."""

    def of_node(node: Any) -> Any:
        return jax.tree.map(lambda leaf: rule(is_linear(node), leaf), node)

    return jax.tree.map(of_node, params, is_leaf=is_linear)


def decay_mask(params: PyTree) -> PyTree:
    """True for the weights of linear layers; embeddings and norms do not decay."""
    return label(params, lambda linear, leaf: linear)


def label_hidden(params: PyTree, hidden: Any, other: Any) -> PyTree:
    """`hidden` for stacks of matrices [layer, …, out, in]: no embedding, head, norm or router.

    A router is a classifier, as the head is: its rows are trained to differ in size, which an
    orthogonal update would even out.
    """

    def of_node(node: Any) -> Any:
        def of_leaf(leaf: Any) -> Any:
            return hidden(leaf) if is_linear(node) and leaf.ndim >= 3 else other

        return jax.tree.map(of_leaf, node)

    def is_node(node: Any) -> bool:
        return is_linear(node) or isinstance(node, TopKRouter)

    return jax.tree.map(of_node, params, is_leaf=is_node)


def hidden_matrices(params: PyTree) -> PyTree:
    """Which axes of every hidden weight are a matrix: the last two, each layer by itself.

    So is each expert; None for everything else. Equinox's weights are [layer, out, in], yet they
    are passed as [layer, reduction, output]: orthogonalisation and the scale used here are the same
    for a matrix and its transpose, and XLA is slow at transposing.
    """

    def matrix(leaf: Any) -> Any:
        axes = leaf.ndim - 2, leaf.ndim - 1
        return optax.contrib.MuonDimensionNumbers(*axes)

    return label_hidden(params, matrix, None)


def split_fused(params: PyTree) -> PyTree:
    """`params` with every fused projection as the tuple of matrices that it consists of.

    Muon orthogonalises each of them by itself. The attention type says how its projections split.
    """

    def split(node: Any) -> Any:
        splits = node.fused_projections() if isinstance(node, AbstractAttention) else {}
        if not splits:
            return node

        def weights(node: Any) -> list[Any]:
            paths = [path.split(".") for path in splits]
            return [functools.reduce(getattr, path, node).weight for path in paths]

        parts = [jax.vmap(s)(w) for s, w in zip(splits.values(), weights(node), strict=True)]
        return eqx.tree_at(weights, node, parts)

    return jax.tree.map(split, params, is_leaf=lambda node: isinstance(node, AbstractAttention))


def on_split(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer` seeing fused projections split; its state keeps them so."""

    def init(params: PyTree) -> PyTree:
        return optimizer.init(split_fused(params))

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        # Splitting only rearranges: its transpose is its inverse.
        join = jax.linear_transpose(split_fused, updates)
        updates, state = optimizer.update(split_fused(updates), state, split_fused(params))
        return join(updates)[0], state

    return optax.GradientTransformation(init, update)


def keep_unless(condition: Flag, new: Tree, old: Tree) -> Tree:
    """`new` if the condition holds, `old` otherwise."""
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o) if eqx.is_array(n) else n, new, old)


def guarded(optimizer: optax.GradientTransformation) -> Optimizer:
    """`optimizer`; its state stays as it was after a step that is not finite."""

    def update(
        grads: PyTree, state: PyTree, params: PyTree = None, *, finite: Flag = True, **_: Any
    ) -> tuple[PyTree, PyTree]:
        updates, new = optimizer.update(grads, state, params)
        return updates, keep_unless(finite, new, state)

    return Optimizer(optimizer.init, update)


def clip(limit: float) -> Optimizer:
    """Gradients scaled to a global norm of at most `limit`.

    By one factor, which XLA multiplies by wherever a gradient is read. optax's quotient of every
    gradient would be stored.
    """

    def update(
        grads: PyTree, state: PyTree, params: PyTree = None, *, norm: Scalar | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        norm = optax.tree.norm(grads) if norm is None else norm
        factor = jnp.where(norm < limit, 1.0, limit / norm)
        return jax.tree.map(lambda grad: factor * grad, grads), state

    return Optimizer(lambda params: optax.EmptyState(), update)


def adamw(
    schedule: optax.Schedule, beta1: float, beta2: float, eps: float, weight_decay: Scalar
) -> Optimizer:
    """optax.adamw (arXiv 1711.05101), guarded, its updates computed from the moments that are kept.

    So XLA changes the moments in place. Updates from moments that a later guard may reject make it
    copy both, and take twice as long in all (docs/results.md).
    """
    adam = optax.adamw(schedule, beta1, beta2, eps, weight_decay=weight_decay, mask=decay_mask)
    moments = guarded(adam)

    def update(
        grads: PyTree, state: PyTree, params: PyTree = None, **step: Any
    ) -> tuple[PyTree, PyTree]:
        _, new = moments.update(grads, state, params, **step)
        count, rate = state[0].count + 1, schedule(state[0].count)
        bias1, bias2 = 1 - beta1**count, 1 - beta2**count

        def change(mean: Array, square: Array, param: Array, decays: bool) -> Array:
            direction = mean / bias1 / (jnp.sqrt(square / bias2) + eps)
            return -rate * (direction + weight_decay * param if decays else direction)

        return jax.tree.map(change, new[0].mu, new[0].nu, params, decay_mask(params)), new

    return Optimizer(moments.init, update)


def newton_schulz(
    matrices: PyTree,
    coefficients: Float[Array, "3"],
    steps: int,
    dtype: Any = jnp.float32,
    devices: Devices | None = None,
) -> PyTree:
    """Matrices of norm at most 1, in stacks […, _, _], each made orthogonal, approximately.

    X <- a X + (b A + c A²) X with A = X Xᵀ (https://kellerjordan.github.io/posts/muon). All
    matrices of one shape, either way round, are one stack: few large products. The devices share
    its matrices, with zeros added where they do not divide evenly.
    """
    stacks, structure = jax.tree.flatten(matrices)
    leaves = [stack.reshape(-1, *stack.shape[-2:]) for stack in stacks]
    tall = [leaf.shape[1] > leaf.shape[2] for leaf in leaves]
    wide = [leaf.mT if flip else leaf for leaf, flip in zip(leaves, tall, strict=True)]
    a, b, c = coefficients.astype(dtype)
    for shape in sorted({leaf.shape[1:] for leaf in wide}):
        places = [i for i, leaf in enumerate(wide) if leaf.shape[1:] == shape]
        ends = list(itertools.accumulate(len(wide[i]) for i in places))
        x = jnp.concatenate([wide[i] for i in places]).astype(dtype)
        if devices is not None:
            x = jnp.pad(x, ((0, -len(x) % (devices.shares * devices.tensor)), (0, 0), (0, 0)))
            x = devices.spread(devices.replicate(x))
        for _ in range(steps):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        if devices is not None:
            x = devices.replicate(x)[: ends[-1]]
        for i, part in zip(places, jnp.split(x, ends[:-1]), strict=True):
            wide[i] = part.astype(wide[i].dtype)
    leaves = [leaf.mT if flip else leaf for leaf, flip in zip(wide, tall, strict=True)]
    leaves = [leaf.reshape(stack.shape) for leaf, stack in zip(leaves, stacks, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def muon(
    config: OptimizerConfig, numbers: Hyperparameters, dtype: Any, devices: Devices | None
) -> optax.GradientTransformation:
    """optax.contrib.muon, its iterations by `newton_schulz`; everything else keeps Adam.

    Updates are scaled to the root mean square of Adam's, 0.2 (arXiv 2502.16982). Adam has
    Nesterov momentum here, as in optax.
    """
    # No iterations: momentum of norm 1
    momentum = optax.contrib.scale_by_muon(
        ns_steps=0, beta=config.momentum, eps=config.eps, weight_dimension_numbers=hidden_matrices
    )

    def update(grads: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, PyTree]:
        matrices, new = momentum.update(grads, state, params)
        steps = config.newton_schulz_steps
        return newton_schulz(matrices, state.ns_coeffs, steps, dtype, devices), new

    def scaled(matrices: Array) -> Array:
        return 0.2 * math.sqrt(max(matrices.shape[-2:])) * matrices

    def kinds(params: PyTree) -> PyTree:
        return label_hidden(params, lambda leaf: "muon", "adam")

    own = numbers.adam_learning_rate
    own = numbers.learning_rate if own is None else own
    rate = make_schedule(config.schedule, numbers)
    adam_rate = make_schedule(config.schedule, dataclasses.replace(numbers, learning_rate=own))
    betas = config.beta1, config.beta2
    matrices = optax.chain(
        optax.GradientTransformation(momentum.init, update),
        optax.stateless(lambda updates, _: jax.tree.map(scaled, updates)),
        optax.add_decayed_weights(numbers.weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    adam = optax.adamw(adam_rate, *betas, config.eps, weight_decay=0.0, nesterov=True)
    return on_split(optax.partition({"muon": matrices, "adam": adam}, kinds))


def make_optimizer(
    config: OptimizerConfig,
    numbers: Hyperparameters,
    dtype: Any = jnp.float32,
    devices: Devices | None = None,
) -> Optimizer:
    """Gradient clipping by global norm, then AdamW or Muon, under the schedule.

    `dtype` and `devices` are those of Muon's iterations. Its update of a hidden matrix is the
    nearest orthogonal matrix to the momentum. As updates are of the size of Adam's, learning rates
    and weight decay of the same size as AdamW's suit it.
    """
    match config.name:
        case OptimizerName.adamw:
            schedule, betas = make_schedule(config.schedule, numbers), (config.beta1, config.beta2)
            optimizer = adamw(schedule, *betas, config.eps, numbers.weight_decay)
        case OptimizerName.muon:
            optimizer = guarded(muon(config, numbers, dtype, devices))
    limit = config.grad_clip
    return optax.chain(optax.identity() if limit is None else clip(limit), optimizer)
