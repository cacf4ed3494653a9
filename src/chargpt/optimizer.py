"""The optimizer of a run: optax, put together."""

import math

import equinox as eqx
import jax
import optax
from jaxtyping import PyTree

from chargpt.config import OptimizerConfig, Schedule


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then cosine, warm-up-stable-decay (a linear tail), or constant."""
    peak, final, warmup = config.learning_rate, config.learning_rate * config.final_lr_fraction, config.warmup_steps
    after = max(1, num_steps - warmup)
    match config.schedule:
        case Schedule.cosine:
            body = optax.cosine_decay_schedule(peak, after, alpha=config.final_lr_fraction)
        case Schedule.wsd:
            decay = max(1, math.ceil(after * config.decay_fraction))
            body = optax.linear_schedule(peak, final, decay, transition_begin=after - decay)
        case Schedule.constant:
            body = optax.constant_schedule(peak)
    # The first step already moves: warm-up runs over 1/(w+1) … w/(w+1) of the peak.
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), body], [warmup])


def decay_mask(params: PyTree) -> PyTree:
    """True for the weights of linear layers; embeddings and norms do not decay."""
    is_linear = lambda node: isinstance(node, eqx.nn.Linear)  # noqa: E731
    return jax.tree.map(lambda node: jax.tree.map(lambda _: is_linear(node), node), params, is_leaf=is_linear)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then AdamW (arXiv 1711.05101) under the schedule."""
    schedule = make_schedule(config, num_steps)
    clip = optax.identity() if config.grad_clip is None else optax.clip_by_global_norm(config.grad_clip)
    adamw = optax.adamw(schedule, config.beta1, config.beta2, config.eps, weight_decay=config.weight_decay, mask=decay_mask)
    return optax.chain(clip, adamw)
