"""One training step, many of them in one compiled call, and the evaluation of a whole split. Pure functions only."""

import functools
from enum import Enum
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, UInt32

from chargpt.config import Config, OptimizerName, Precision, Sampling
from chargpt.corpus import Windows, epoch_batch, sample_batch
from chargpt.model import GPT
from chargpt.optimizer import make_optimizer, make_schedule, numbers_of, with_numbers
from chargpt.parallel import Devices

Tree = TypeVar("Tree")
Seed = UInt32[Array, ""] | int

EVAL_TOKENS_PER_BATCH = 16_384


class TrainState(eqx.Module):
    """All that a run carries from step to step; the checkpoint holds exactly this."""

    model: GPT
    ema: GPT | None  # the average of the weights, where the configuration asks for one
    opt_state: PyTree
    step: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]
    skipped: Int[Array, ""]

    @property
    def averaged(self) -> GPT:
        """The model to evaluate, sample from and export: the average where there is one."""
        return self.model if self.ema is None else self.ema


class Inputs(eqx.Module):
    """What a compiled step is told, not made for: runs that differ in these alone share what is compiled."""

    tokens: Int[Array, " corpus"]
    seed: UInt32[Array, ""]
    num_steps: Float[Array, ""]
    numbers: dict[str, Float[Array, ""]]  # of the optimizer


def make_inputs(tokens: Int[Any, " corpus"], config: Config) -> Inputs:
    """The inputs of a run on `tokens`, the training split."""
    seed, num_steps = jnp.uint32(config.seed), jnp.float32(config.trainer.num_steps)
    return Inputs(jnp.asarray(tokens), seed, num_steps, numbers_of(config.optimizer))


class StepMetrics(eqx.Module):
    loss: Float[Array, "*steps"]
    grad_norm: Float[Array, "*steps"]
    part_norms: dict[str, Float[Array, "*steps"]]  # of the gradient, by part of the model
    learning_rate: Float[Array, "*steps"]
    skipped: Int[Array, "*steps"]
    skipped_in_a_row: Int[Array, "*steps"]


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
    """The state before the first step: everything in it follows from the configuration and `seed`."""
    model = GPT(config.model, vocab_size, config.dataset.seq_len, key=random_key(seed, Stream.init))
    optimizer = make_optimizer(config.optimizer, config.trainer.num_steps)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    zero = functools.partial(jnp.zeros, (), jnp.int32)  # a buffer each: the state is donated
    ema = None if config.optimizer.ema_decay is None else jax.tree.map(lambda x: x + 0 if eqx.is_array(x) else x, model)
    return TrainState(model, ema, opt_state, step=zero(), skipped_in_a_row=zero(), skipped=zero())


def compute_dtype(precision: Precision) -> Any:
    return jnp.bfloat16 if precision is Precision.bfloat16 else jnp.float32


def cast(tree: Tree, dtype: Any) -> Tree:
    """`tree` with its floating-point arrays in `dtype`: parameters stay float32, only the computation is narrower."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, tree)


def cross_entropy(logits: Float[Array, "*batch vocab"], targets: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Nats per token, in float32. One-hot targets: the gradient of an integer-label gather would be a scatter."""
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy(logits, jax.nn.one_hot(targets, logits.shape[-1]))


def loss_fn(
    model: GPT,
    inputs: Int[Array, "batch t"],
    targets: Int[Array, "batch t"],
    key: PRNGKeyArray | None,
    dtype: Any,
) -> Float[Array, ""]:
    """Mean cross-entropy of a batch; `key` turns dropout on."""
    model = cast(model, dtype)
    keys = None if key is None else jax.random.split(key, inputs.shape[0])
    logits = jax.vmap(lambda tokens, key: model(tokens, key=key))(inputs, keys)
    return cross_entropy(logits, targets).mean()


def train_step(
    state: TrainState, inputs: Inputs, config: Config, devices: Devices | None = None
) -> tuple[TrainState, StepMetrics]:
    """One optimizer step. Batch and dropout follow from (seed, step) alone, so an interrupted run repeats them exactly.

    `devices` share the batch; the rest each of them does alike. Where loss or gradient is not finite, parameters, moments
    and their count stay bit for bit as they were.
    """
    batch_key, dropout_key = jax.random.split(random_key(inputs.seed, Stream.step, state.step))
    batch = draw_batch(inputs, batch_key, state.step, config)
    loss, grads = accumulate_gradients(state.model, *batch, dropout_key, config, devices)
    part_norms = gradient_norms(grads)
    grad_norm = jnp.sqrt(sum(jnp.square(norm) for norm in part_norms.values()))
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    settings = with_numbers(config.optimizer, inputs.numbers)
    optimizer = make_optimizer(settings, inputs.num_steps)
    params = eqx.filter(state.model, eqx.is_inexact_array)
    if devices is not None and config.optimizer.name is OptimizerName.muon:
        grads = devices.split_layers(grads)  # orthogonalising is dear: each device does some layers
    updates, opt_state = optimizer.update(grads, state.opt_state, params)
    if devices is not None:
        updates = devices.replicate(updates)
    model = keep_unless(finite, eqx.apply_updates(state.model, updates), state.model)
    opt_state = keep_unless(finite, opt_state, state.opt_state)
    ema = state.ema
    if ema is not None:
        ema = keep_unless(finite, average(ema, model, config.optimizer.ema_decay, state.step - state.skipped), ema)

    new_state = TrainState(
        model,
        ema,
        opt_state,
        step=state.step + 1,
        skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        skipped=state.skipped + jnp.where(finite, 0, 1),
    )
    schedule = make_schedule(settings, inputs.num_steps)
    learning_rate = jnp.asarray(schedule(state.step - state.skipped), jnp.float32)  # skipped steps do not count
    return new_state, StepMetrics(loss, grad_norm, part_norms, learning_rate, new_state.skipped, new_state.skipped_in_a_row)


def draw_batch(
    inputs: Inputs, key: PRNGKeyArray, step: Int[Array, ""], config: Config
) -> tuple[Int[Array, "batch t"], Int[Array, "batch t"]]:
    batch_size, seq_len = config.trainer.batch_size, config.dataset.seq_len
    match config.dataset.sampling:
        case Sampling.random:
            return sample_batch(inputs.tokens, key, batch_size, seq_len)
        case Sampling.epochs:
            return epoch_batch(inputs.tokens, random_key(inputs.seed, Stream.epoch), step, batch_size, seq_len)


def average(ema: GPT, model: GPT, decay: float, count: Int[Array, ""]) -> GPT:
    """The average one step on: decay * ema + (1 - decay) * model, with less decay in the first steps, which it forgets."""
    decay = jnp.minimum(decay, (1 + count) / (10 + count))
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new if eqx.is_inexact_array(new) else new, ema, model)


def accumulate_gradients(
    model: GPT,
    inputs: Int[Array, "batch t"],
    targets: Int[Array, "batch t"],
    key: PRNGKeyArray,
    config: Config,
    devices: Devices | None = None,
) -> tuple[Float[Array, ""], PyTree]:
    """Loss and gradient of the batch mean, `trainer.grad_accum_steps` equal parts after one another: less memory."""
    parts = config.trainer.grad_accum_steps
    dtype = compute_dtype(config.trainer.precision)
    dropout = config.model.dropout > 0
    value_and_grad = eqx.filter_value_and_grad(loss_fn)
    if parts == 1:
        if devices is not None:
            inputs, targets = devices.split((inputs, targets))
        return value_and_grad(model, inputs, targets, key if dropout else None, dtype)

    def add(total, part):
        inputs, targets, key = part
        return jax.tree.map(jnp.add, total, value_and_grad(model, inputs, targets, key if dropout else None, dtype)), None

    inputs, targets = (batch.reshape(parts, -1, batch.shape[-1]) for batch in (inputs, targets))
    if devices is not None:
        inputs, targets = devices.split((inputs, targets), axis=1)
    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, eqx.filter(model, eqx.is_inexact_array)))
    total, _ = jax.lax.scan(add, zeros, (inputs, targets, jax.random.split(key, parts)))
    return jax.tree.map(lambda leaf: leaf / parts, total)


def gradient_norms(grads: GPT) -> dict[str, Float[Array, ""]]:
    """Euclidean norms of the gradient's parts: embedding, attention and feed-forward of every layer, head."""

    def squares(tree: PyTree, per_layer: bool = False) -> Float[Array, "..."]:
        leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
        return sum(jnp.sum(jnp.square(leaf), axis=tuple(range(int(per_layer), leaf.ndim))) for leaf in leaves)

    blocks = grads.blocks
    norms = {"embedding": jnp.sqrt(squares((grads.embedding, grads.position_embedding)))}
    parts = {
        "attention": (blocks.attention, blocks.attention_norm),
        "feed_forward": (blocks.feed_forward, blocks.feed_forward_norm),
    }
    for name, part in parts.items():
        norms |= {f"{name}_{layer}": norm for layer, norm in enumerate(jnp.sqrt(squares(part, per_layer=True)))}
    last = (grads.final_norm, grads.head)
    return norms | ({"head": jnp.sqrt(squares(last))} if jax.tree.leaves(eqx.filter(last, eqx.is_inexact_array)) else {})


def attention_entropy(model: GPT, inputs: Int[Array, "windows t"]) -> Float[Array, "layers n"]:
    """Entropy in nats of what each head reads, its mean over all positions: ln of the number of tokens it reads, if evenly."""
    weights = jax.vmap(model.attention_weights)(inputs).astype(jnp.float32)
    return jax.scipy.special.entr(weights).sum(axis=-1).mean(axis=(0, 3))


def keep_unless(condition: Bool[Array, ""], new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o) if eqx.is_array(n) else n, new, old)


def train_steps(
    state: TrainState, inputs: Inputs, config: Config, num_steps: int, devices: Devices | None = None
) -> tuple[TrainState, StepMetrics]:
    """`num_steps` steps in one compiled computation; metrics carry a leading axis of steps."""
    arrays, static = eqx.partition(state, eqx.is_array)

    def body(arrays, _):
        new_state, metrics = train_step(eqx.combine(arrays, static), inputs, config, devices)
        return eqx.filter(new_state, eqx.is_array), metrics

    arrays, metrics = jax.lax.scan(body, arrays, length=num_steps)
    state = eqx.combine(arrays, static)
    return state if devices is None else devices.replicate(state), metrics


def score(
    model: GPT, inputs: Int[Array, "windows t"], targets: Int[Array, "windows t"], weights: Float[Array, "windows t"]
) -> tuple[Float[Array, " windows"], Float[Array, " windows"]]:
    """Summed nats and correct predictions of each window."""
    logits = jax.vmap(model)(inputs)
    losses = cross_entropy(logits, targets) * weights
    correct = (jnp.argmax(logits, axis=-1) == targets) * weights
    return losses.sum(axis=-1), correct.sum(axis=-1)


@eqx.filter_jit
def _score_jit(model: GPT, inputs, targets, weights, dtype):
    return score(cast(model, dtype), inputs, targets, weights)


def eval_batch_size(windows: Windows) -> int:
    """Windows to score at once: about EVAL_TOKENS_PER_BATCH tokens of them."""
    count, seq_len = windows.inputs.shape
    return min(max(1, EVAL_TOKENS_PER_BATCH // seq_len), count)


def evaluate(
    model: GPT, windows: Windows, batch_size: int, precision: Precision, devices: Devices | None = None
) -> dict[str, float]:
    """Loss (nats per character), bits per character and accuracy over all windows: exact, and the same every time."""
    count = len(windows.inputs)
    batch_size += 0 if devices is None else -batch_size % len(devices)
    padding = -count % batch_size
    losses, correct = 0.0, 0.0
    pad = lambda rows: np.pad(rows, ((0, padding), (0, 0)))  # noqa: E731
    inputs, targets, weights = pad(windows.inputs), pad(windows.targets), pad(windows.weights)
    for start in range(0, count + padding, batch_size):
        rows = slice(start, start + batch_size)
        batch = inputs[rows], targets[rows], weights[rows]
        if devices is not None:
            batch = devices.split(jax.tree.map(jnp.asarray, batch))
        batch = _score_jit(model, *batch, compute_dtype(precision))
        losses += float(np.asarray(batch[0], np.float64).sum())
        correct += float(np.asarray(batch[1], np.float64).sum())
    loss = losses / windows.num_targets
    return {"val/loss": loss, "val/accuracy": correct / windows.num_targets, "val/bpc": loss / float(np.log(2))}
