"""The optimizer of a run: optax, put together."""

import copy
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float, Int, PyTree

from chargpt.attention import AbstractAttention, MultiHeadLatentAttention, SelectiveAttention
from chargpt.config import OptimizerConfig, OptimizerName, Schedule

# What searches vary. A compiled step takes these numbers as its input, so that it serves whole searches.
NUMBERS = ("learning_rate", "adam_learning_rate", "weight_decay", "warmup_steps", "decay_fraction", "final_lr_fraction")


def numbers_of(config: OptimizerConfig) -> dict[str, Float[Array, ""]]:
    """Those of NUMBERS that are set, as arrays."""
    values = {name: getattr(config, name) for name in NUMBERS}
    return {name: jnp.float32(value) for name, value in values.items() if value is not None}


def with_numbers(config: OptimizerConfig, numbers: Mapping[str, Float[Array, ""] | float]) -> OptimizerConfig:
    """`config` with arrays in place of its numbers; they are those of a configuration whose rules have been checked."""
    config = copy.copy(config)
    for name, value in numbers.items():
        setattr(config, name, value)
    return config


def make_schedule(config: OptimizerConfig, num_steps: Float[Array, ""] | int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then cosine, warm-up-stable-decay (a linear tail), or constant.

    The first step already moves: warm-up runs over 1/(w+1) … w/(w+1) of the peak.
    """
    warmup, final = config.warmup_steps, config.final_lr_fraction

    def learning_rate(count: Int[Array, "..."]) -> Float[Array, "..."]:
        done, after = count - warmup, jnp.maximum(1, num_steps - warmup)  # steps since the end of warm-up, of all
        match config.schedule:
            case Schedule.cosine:
                body = final + (1 - final) * (1 + jnp.cos(jnp.pi * jnp.clip(done / after, 0, 1))) / 2
            case Schedule.wsd:
                decay = jnp.maximum(1, after * config.decay_fraction)
                body = 1 - (1 - final) * jnp.clip((done - (after - decay)) / decay, 0, 1)
            case Schedule.constant:
                body = 1.0
        return config.learning_rate * jnp.where(done < 0, (count + 1) / (warmup + 1), body)

    return learning_rate


def is_linear(node: Any) -> bool:
    return isinstance(node, eqx.nn.Linear)


def decay_mask(params: PyTree) -> PyTree:
    """True for the weights of linear layers; embeddings and norms do not decay."""
    return jax.tree.map(lambda node: jax.tree.map(lambda _: is_linear(node), node), params, is_leaf=is_linear)


def hidden_matrices(params: PyTree) -> PyTree:
    """For every weight of a linear layer inside of the blocks, which axes are a matrix: the last two, each layer by itself.

    None for embeddings, head and norms. Equinox's weights are [layer, out, in], yet they are handed over as [layer,
    reduction, output]: orthogonalisation and the scale used here are the same for a matrix and its transpose, and XLA is
    slow at transposing.
    """
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)

    def axes(node):
        return jax.tree.map(lambda leaf: matrix if is_linear(node) and leaf.ndim == 3 else None, node)

    return jax.tree.map(axes, params, is_leaf=is_linear)


def split_fused(params: PyTree) -> PyTree:
    """`params` with every fused projection as the tuple of matrices that it is made of, for Muon to orthogonalise singly.

    Selective's keys and values have columns for the query and columns for the token; MLA's down-projection makes a latent
    and a rotary key, its up-projection keys and values.
    """

    def split(node):
        match node:
            case SelectiveAttention():
                halves = lambda weight: tuple(jnp.split(weight, 2, axis=2))  # noqa: E731
                return eqx.tree_at(lambda a: (a.k_proj.weight, a.v_proj.weight), node, replace_fn=halves)
            case MultiHeadLatentAttention(num_heads=heads, kv_lora_rank=rank, qk_nope_head_dim=nope):
                down, up = node.kv_a_proj.weight, node.kv_b_proj.weight
                per_head = up.reshape(up.shape[0], heads, -1, up.shape[2])
                ups = tuple(part.reshape(up.shape[0], -1, up.shape[2]) for part in jnp.split(per_head, [nope], axis=2))
                downs = tuple(jnp.split(down, [rank], axis=1))
                return eqx.tree_at(lambda a: (a.kv_a_proj.weight, a.kv_b_proj.weight), node, (downs, ups))
        return node

    return jax.tree.map(split, params, is_leaf=lambda node: isinstance(node, AbstractAttention))


def on_split(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer` seeing fused projections split; its state keeps them so."""

    def update(updates, state, params=None):
        join = jax.linear_transpose(split_fused, updates)  # splitting only rearranges: its transpose is its inverse
        updates, state = optimizer.update(split_fused(updates), state, split_fused(params))
        return join(updates)[0], state

    return optax.GradientTransformation(lambda params: optimizer.init(split_fused(params)), update)


def make_optimizer(config: OptimizerConfig, num_steps: Float[Array, ""] | int) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then AdamW (arXiv 1711.05101), or Muon, under the schedule.

    Muon (https://kellerjordan.github.io/posts/muon) replaces the momentum of a hidden matrix by the nearest orthogonal
    matrix, found by Newton-Schulz iteration. Scaled to the root mean square of Adam's updates, 0.2 (arXiv 2502.16982), it
    takes learning rates and weight decay of the same size as AdamW does. What is no hidden matrix keeps Adam,
    with Nesterov momentum as optax has it beside Muon.
    """
    clip = optax.identity() if config.grad_clip is None else optax.clip_by_global_norm(config.grad_clip)
    schedule = make_schedule(config, num_steps)
    match config.name:
        case OptimizerName.adamw:
            optimizer = optax.adamw(
                schedule, config.beta1, config.beta2, config.eps, weight_decay=config.weight_decay, mask=decay_mask
            )
        case OptimizerName.muon:
            own = config.adam_learning_rate
            rest = config if own is None else with_numbers(config, {"learning_rate": own})
            muon = optax.contrib.muon(
                schedule,
                ns_steps=config.newton_schulz_steps,
                beta=config.momentum,
                eps=config.eps,
                weight_decay=config.weight_decay,
                adam_b1=config.beta1,
                adam_b2=config.beta2,
                adam_learning_rate=make_schedule(rest, num_steps),
                muon_weight_dimension_numbers=hidden_matrices,
                consistent_rms=0.2,
            )
            optimizer = on_split(muon)
    return optax.chain(clip, optimizer)
