"""One training step, and many of them in one compiled call: pure functions only."""

import functools
from enum import Enum
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, UInt32

from chargpt.config import Config, ModelConfig, Precision, Router, Sampling
from chargpt.corpus import epoch_batch, sample_batch
from chargpt.experts import MixtureOfExperts, Routing, TopKRouter
from chargpt.model import GPT
from chargpt.optimizer import (
    Hyperparameters,
    hyperparameters,
    keep_unless,
    make_optimizer,
    make_schedule,
)
from chargpt.parallel import Devices

Tree = TypeVar("Tree")
Seed = UInt32[Array, ""] | int
Batch = Int[Array, "batch t"]


class TrainState(eqx.Module):
    """All that a run carries from step to step; the checkpoint holds exactly this."""

    model: GPT
    ema: GPT | None  # the average of the weights, if the configuration asks for one
    opt_state: PyTree
    step: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]
    skipped: Int[Array, ""]

    @property
    def averaged(self) -> GPT:
        """The model to evaluate, sample from and export: the average, if there is one."""
        return self.model if self.ema is None else self.ema


class Inputs(eqx.Module):
    """What a compiled step takes as input: runs that differ only in these share the executable.

    Those of a population, with an axis of members in `seed` and `numbers`, can be one program.
    """

    tokens: Int[Array, " corpus"]
    seed: UInt32[Array, "*members"]
    numbers: Hyperparameters


def make_inputs(tokens: Int[Any, " corpus"], config: Config) -> Inputs:
    """The inputs of a run on `tokens`, the training split."""
    return Inputs(jnp.asarray(tokens), jnp.uint32(config.seed), hyperparameters(config))


class StepMetrics(eqx.Module):
    loss: Float[Array, "*steps"]
    grad_norm: Float[Array, "*steps"]
    part_norms: dict[str, Float[Array, "*steps"]]  # of the gradient, by part of the model
    learning_rate: Float[Array, "*steps"]
    skipped: Int[Array, "*steps"]
    skipped_in_a_row: Int[Array, "*steps"]
    experts: dict[str, Float[Array, "*steps"]]  # what the routers did; empty if there are none


class Stream(Enum):
    """Independent random streams of one seed."""

    init = 0
    step = 1
    sample = 2
    epoch = 3


def random_key(seed: Seed, stream: Stream, step: Int[Array, ""] | int = 0) -> PRNGKeyArray:
    """The key of one purpose at one step: nothing random depends on what ran before."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream.value), step)


def init_state(config: Config, vocab_size: int, seed: Seed) -> TrainState:
    """The state before the first step; it follows from the configuration and `seed`."""
    model = GPT(config.model, vocab_size, config.dataset.seq_len, key=random_key(seed, Stream.init))
    optimizer = make_optimizer(config.optimizer, hyperparameters(config))
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    zero = functools.partial(jnp.zeros, (), jnp.int32)  # a buffer each: the state is donated
    ema = None
    if config.optimizer.ema_decay is not None:
        ema = jax.tree.map(lambda leaf: leaf + 0 if eqx.is_array(leaf) else leaf, model)
    return TrainState(model, ema, opt_state, step=zero(), skipped_in_a_row=zero(), skipped=zero())


def compute_dtype(precision: Precision | None) -> Any:
    """None: bfloat16 on a GPU, whose fused attention needs 16 bits, and float32 on a CPU."""
    if precision is None:
        precision = Precision.bfloat16 if jax.default_backend() == "gpu" else Precision.float32
    return jnp.dtype(precision.name)


def cast(tree: Tree, dtype: Any) -> Tree:
    """`tree` with floating-point arrays in `dtype`; parameters themselves stay float32.

    So do routers: rounding would send tokens to other experts, and undo a bias's small steps.
    """

    def narrow(node: Any) -> Any:
        return node.astype(dtype) if eqx.is_inexact_array(node) else node

    return jax.tree.map(narrow, tree, is_leaf=lambda node: isinstance(node, TopKRouter))


def cross_entropy(
    logits: Float[Array, "*batch vocab"], targets: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Nats per token, in float32. One-hot: the gradient of an integer-label gather is a scatter."""
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy(logits, jax.nn.one_hot(targets, logits.shape[-1]))


def loss_fn(
    model: GPT,
    inputs: Batch,
    targets: Batch,
    key: PRNGKeyArray | None,
    dtype: Any,
    devices: Devices | None = None,
) -> Float[Array, ""]:
    """Mean cross-entropy of a batch; `key` turns dropout on."""
    return routed_loss(model, inputs, targets, key, dtype, devices)[0]


def routed_loss(
    model: GPT,
    inputs: Batch,
    targets: Batch,
    key: PRNGKeyArray | None,
    dtype: Any,
    devices: Devices | None = None,
) -> tuple[Float[Array, ""], Routing | None]:
    """`loss_fn`, and what the routers did, if there are any."""
    model = cast(model, dtype)
    if devices is not None:
        model = devices.gather(model)
    logits, routing = model.routed(inputs, key=key)
    return cross_entropy(logits, targets).mean(), routing


def router_loss(routing: Routing, config: ModelConfig) -> Float[Array, ""]:
    """What training adds to the cross-entropy: means over the layers, times their coefficients."""
    balance = config.router_aux_loss if config.router is Router.softmax else 0.0
    return balance * routing.aux_loss.mean() + config.router_z_loss * routing.z_loss.mean()


def train_step(
    state: TrainState, inputs: Inputs, config: Config, devices: Devices | None = None
) -> tuple[TrainState, StepMetrics]:
    """One optimizer step; batch and dropout follow from (seed, step), so resuming repeats them.

    `devices` share the batch, and what else their layout says. If the loss or the gradient is not
    finite, parameters, moments and their count stay bit for bit as they were.
    """
    batch_key, dropout_key = jax.random.split(random_key(inputs.seed, Stream.step, state.step))
    batch = draw_batch(inputs, batch_key, state.step, config)
    (loss, routing), grads = accumulate_gradients(state.model, *batch, dropout_key, config, devices)
    if devices is not None:
        grads = devices.place(grads)
    part_norms = gradient_norms(grads)
    grad_norm = jnp.sqrt(sum(jnp.square(norm) for norm in part_norms.values()))
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    dtype = compute_dtype(config.trainer.precision)
    optimizer = make_optimizer(config.optimizer, inputs.numbers, dtype, devices)
    params = eqx.filter(state.model, eqx.is_inexact_array)
    updates, opt_state = optimizer.update(
        grads, state.opt_state, params, norm=grad_norm, finite=finite
    )
    model = eqx.apply_updates(state.model, updates)
    if routing is not None:
        model = move_biases(model, routing.load, config.model.router_bias_rate)
    model = keep_unless(finite, model, state.model)
    ema, count = state.ema, state.step - state.skipped  # skipped steps do not count
    if ema is not None:
        ema = keep_unless(finite, average(ema, model, config, count), ema)

    skipped = state.skipped + jnp.where(finite, 0, 1)
    in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
    new_state = TrainState(model, ema, opt_state, state.step + 1, in_a_row, skipped)
    if devices is not None:
        new_state = devices.place(new_state)
    schedule = make_schedule(config.optimizer.schedule, inputs.numbers)
    rate = jnp.asarray(schedule(count), jnp.float32)
    experts = {} if routing is None else describe(routing)
    return new_state, StepMetrics(loss, grad_norm, part_norms, rate, skipped, in_a_row, experts)


def move_biases(model: GPT, load: Float[Array, "layers e"], rate: float) -> GPT:
    """Up for experts with less than an even load, down for those with more, all by `rate`."""
    feed_forward = model.stacked.feed_forward
    assert isinstance(feed_forward, MixtureOfExperts)
    if feed_forward.router.bias is None:
        return model
    even = load.mean(axis=1, keepdims=True)
    bias = feed_forward.router.bias + rate * jnp.sign(even - load)
    return eqx.tree_at(lambda model: model.blocks.feed_forward.router.bias, model, bias)


def describe(routing: Routing) -> dict[str, Float[Array, ""]]:
    """The numbers of a step, of all layers: extremes of the load, dead experts, means."""
    return {
        "load_max": routing.load.max(),
        "load_min": routing.load.min(),
        "load_entropy": jax.scipy.special.entr(routing.load).sum(axis=1).mean(),
        "dead": jnp.sum(routing.load == 0).astype(jnp.float32),
        "router_entropy": routing.entropy.mean(),
        "aux_loss": routing.aux_loss.mean(),
        "z_loss": routing.z_loss.mean(),
    }


def draw_batch(
    inputs: Inputs, key: PRNGKeyArray, step: Int[Array, ""], config: Config
) -> tuple[Batch, Batch]:
    """(inputs, targets) of a step."""
    sizes = config.trainer.batch_size, config.dataset.seq_len
    match config.dataset.sampling:
        case Sampling.random:
            return sample_batch(inputs.tokens, key, *sizes)
        case Sampling.epochs:
            epoch_key = random_key(inputs.seed, Stream.epoch)
            return epoch_batch(inputs.tokens, epoch_key, step, *sizes)


def average(ema: GPT, model: GPT, config: Config, count: Int[Array, ""]) -> GPT:
    """decay * ema + (1 - decay) * model, with less decay in the first steps, which it forgets."""
    assert config.optimizer.ema_decay is not None
    decay = jnp.minimum(config.optimizer.ema_decay, (1 + count) / (10 + count))

    def step(old: Any, new: Any) -> Any:
        return decay * old + (1 - decay) * new if eqx.is_inexact_array(new) else new

    return jax.tree.map(step, ema, model)


def accumulate_gradients(
    model: GPT,
    inputs: Batch,
    targets: Batch,
    key: PRNGKeyArray,
    config: Config,
    devices: Devices | None = None,
) -> tuple[tuple[Float[Array, ""], Routing | None], PyTree]:
    """Loss and gradient of the batch mean, in `grad_accum_steps` equal parts to save memory.

    The gradient is that of the routers' losses too, which are those of each part. What the routers
    did is beside the loss.
    """
    parts, dtype = config.trainer.grad_accum_steps, compute_dtype(config.trainer.precision)

    def objective(model: GPT, *values: Any) -> tuple[Array, tuple[Array, Routing | None]]:
        loss, routing = routed_loss(model, *values)
        total = loss if routing is None else loss + router_loss(routing, config.model)
        return total, (loss, routing)

    def gradient(
        inputs: Batch, targets: Batch, key: PRNGKeyArray
    ) -> tuple[tuple[Array, Routing | None], PyTree]:
        dropout_key = key if config.model.dropout > 0 else None
        values = inputs, targets, dropout_key, dtype, devices
        (_, found), grads = eqx.filter_value_and_grad(objective, has_aux=True)(model, *values)
        return found, grads

    if parts == 1:
        if devices is not None:
            inputs, targets = devices.split((inputs, targets))
        return gradient(inputs, targets, key)

    def add(
        total: PyTree, part: tuple[Batch, Batch, PRNGKeyArray]
    ) -> tuple[PyTree, Routing | None]:
        (loss, routing), grads = gradient(*part)
        return jax.tree.map(jnp.add, total, (loss, grads)), routing

    inputs, targets = (batch.reshape(parts, -1, batch.shape[-1]) for batch in (inputs, targets))
    if devices is not None:
        inputs, targets = devices.split((inputs, targets), axis=1)
    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, eqx.filter(model, eqx.is_inexact_array)))
    total, routings = jax.lax.scan(add, zeros, (inputs, targets, jax.random.split(key, parts)))
    loss, grads = jax.tree.map(lambda leaf: leaf / parts, total)
    return (loss, jax.tree.map(lambda leaf: leaf.mean(axis=0), routings)), grads


def gradient_norms(grads: GPT) -> dict[str, Float[Array, ""]]:
    """Euclidean norms of the gradient by part: embedding, attention, feed-forward, head."""

    def norm(*tree: PyTree, per_layer: int = 0) -> Float[Array, "..."]:
        leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
        axes = [tuple(range(per_layer, leaf.ndim)) for leaf in leaves]
        squares = [jnp.sum(jnp.square(x), axis=a) for x, a in zip(leaves, axes, strict=True)]
        return jnp.sqrt(sum(squares))  # type: ignore[arg-type]

    blocks = grads.stacked
    attention = norm(blocks.attention, blocks.modifiers, blocks.attention_norm, per_layer=1)
    feed_forward = norm(blocks.feed_forward, blocks.feed_forward_norm, per_layer=1)
    norms = {"embedding": norm(grads.embedding, grads.position_embedding, grads.ngram_embedding)}
    norms |= {f"attention_{layer}": part for layer, part in enumerate(attention)}
    norms |= {f"feed_forward_{layer}": part for layer, part in enumerate(feed_forward)}
    has_head = grads.final_norm is not None or grads.head is not None
    return norms | ({"head": norm(grads.final_norm, grads.head)} if has_head else {})


def train_steps(
    state: TrainState,
    inputs: Inputs,
    config: Config,
    num_steps: int,
    devices: Devices | None = None,
    until: Int[Array, ""] | None = None,
) -> tuple[TrainState, StepMetrics]:
    """`num_steps` steps in one compiled computation; metrics carry a leading axis of steps.

    A state that has reached step `until` stays as it is; the metrics of further steps mean nothing.
    """
    arrays, static = eqx.partition(state, eqx.is_array)

    def body(arrays: PyTree, _: None) -> tuple[PyTree, StepMetrics]:
        old_state = eqx.combine(arrays, static)
        new_state, metrics = train_step(old_state, inputs, config, devices)
        if until is not None:
            new_state = keep_unless(old_state.step < until, new_state, old_state)
        return eqx.filter(new_state, eqx.is_array), metrics

    arrays, metrics = jax.lax.scan(body, arrays, length=num_steps)
    state = eqx.combine(arrays, static)
    if devices is None:
        return state, metrics
    # Again: XLA may cut the result of a loop more finely than what each round of it ends with
    return devices.place(state), devices.replicate(metrics)


def train_population(
    states: TrainState,
    inputs: Inputs,
    until: Int[Array, " members"],
    config: Config,
    num_steps: int,
    devices: Devices,
) -> tuple[TrainState, StepMetrics]:
    """`train_steps` for every member of a population: arrays have a leading axis of members.

    All read one text; each has its own seed, its own numbers, and its own step.
    """
    arrays, static = eqx.partition(states, eqx.is_array)

    def member(arrays: PyTree, seed: Array, numbers: Any, until: Array) -> tuple[PyTree, PyTree]:
        own = Inputs(inputs.tokens, seed, numbers)
        state = eqx.combine(arrays, static)
        state, metrics = train_steps(state, own, config, num_steps, devices, until)
        return eqx.filter(state, eqx.is_array), metrics

    arrays, metrics = devices.vmap(member)(arrays, inputs.seed, inputs.numbers, until)
    return eqx.combine(arrays, static), metrics
