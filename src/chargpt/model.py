"""The decoder-only transformer: FeedForward, Block, GPT. It never asks which attention type it carries."""

import dataclasses
import math
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from chargpt.attention import AbstractAttention, make_attention
from chargpt.attention.base import record_weights
from chargpt.config import Activation, AttentionType, Match, ModelConfig, Norm, NormPosition, require

Module = TypeVar("Module", bound=eqx.Module)

INIT_STD = 0.02  # GPT-2's; projections onto the residual stream take 1/sqrt(2 num_layers) of it


class FeedForward(eqx.Module):
    """down(act(up(x))); with swiglu (arXiv 2002.05202) down(silu(gate(x)) * up(x)); relu2 (arXiv 2109.08668) is relu²."""

    gate_proj: eqx.nn.Linear | None
    up_proj: eqx.nn.Linear
    down_proj: eqx.nn.Linear
    activation: Activation = eqx.field(static=True)

    def __init__(self, d_model: int, d_ff: int, activation: Activation, *, key: PRNGKeyArray):
        gate_key, up_key, down_key = jax.random.split(key, 3)
        gated = activation is Activation.swiglu
        self.gate_proj = eqx.nn.Linear(d_model, d_ff, use_bias=False, key=gate_key) if gated else None
        self.up_proj = eqx.nn.Linear(d_model, d_ff, use_bias=False, key=up_key)
        self.down_proj = eqx.nn.Linear(d_ff, d_model, use_bias=False, key=down_key)
        self.activation = activation

    def __call__(self, x: Float[Array, "t m"]) -> Float[Array, "t m"]:
        hidden = jnp.einsum("tm,fm->tf", x, self.up_proj.weight)
        match self.activation:
            case Activation.relu:
                hidden = jax.nn.relu(hidden)
            case Activation.gelu:
                hidden = jax.nn.gelu(hidden)
            case Activation.relu2:
                hidden = jnp.square(jax.nn.relu(hidden))
            case Activation.swiglu:
                hidden = jax.nn.silu(jnp.einsum("tm,fm->tf", x, self.gate_proj.weight)) * hidden
        return jnp.einsum("tf,mf->tm", hidden, self.down_proj.weight)


def make_norm(kind: Norm, width: int) -> eqx.nn.RMSNorm | eqx.nn.LayerNorm:
    match kind:
        case Norm.rmsnorm:
            return eqx.nn.RMSNorm(width, use_bias=False)
        case Norm.layernorm:
            return eqx.nn.LayerNorm(width, use_bias=False)


def matched_width(config: ModelConfig) -> int:
    """The d_ff that gives a block of this attention type as many weights as one of standard attention has with ff_width."""

    def attention_size(kind: AttentionType) -> int:
        plain = dataclasses.replace(config, mha_type=kind, match=Match.none)
        layer = eqx.filter_eval_shape(make_attention, plain, key=jax.random.key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(layer) if hasattr(leaf, "shape"))

    surplus = attention_size(config.mha_type) - attention_size(AttentionType.standard)
    matrices = 3 if config.activation is Activation.swiglu else 2
    width = config.ff_width - round(surplus / (matrices * config.d_model))
    require(
        width >= 1,
        f"model.match=params: {config.mha_type.name} attention has {surplus:,} more weights than standard, more than a "
        f"feed-forward layer of model.d_ff={config.ff_width} can give up; write a larger one, or model.match=none",
    )
    return width


class Block(eqx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); with post-norm, norm(x + branch(x)).

    `residual_scale` is a factor on both branches.

    Dropout is on the two residual branches alone: dropping attention weights would break the sum-to-one that selective
    attention's value half rests on, and fused kernels do not offer it.
    """

    attention: AbstractAttention
    feed_forward: FeedForward
    attention_norm: eqx.nn.RMSNorm | eqx.nn.LayerNorm
    feed_forward_norm: eqx.nn.RMSNorm | eqx.nn.LayerNorm
    norm_position: NormPosition = eqx.field(static=True)
    residual_scale: float = eqx.field(static=True)
    dropout: eqx.nn.Dropout

    def __init__(self, config: ModelConfig, *, key: PRNGKeyArray):
        attention_key, feed_forward_key = jax.random.split(key)
        self.attention = make_attention(config, key=attention_key)
        d_ff = matched_width(config) if config.match is Match.params else config.ff_width
        self.feed_forward = FeedForward(config.d_model, d_ff, config.activation, key=feed_forward_key)
        self.attention_norm = make_norm(config.norm, config.d_model)
        self.feed_forward_norm = make_norm(config.norm, config.d_model)
        self.norm_position = config.norm_position
        self.residual_scale = config.residual_scale
        self.dropout = eqx.nn.Dropout(config.dropout)

    def __call__(self, x: Float[Array, "t m"], *, key: PRNGKeyArray | None = None) -> Float[Array, "t m"]:
        """`key` None: no dropout."""
        return self._residual(x, self.attention, key)

    def decode(
        self, x: Float[Array, "t m"], cache: PyTree, position: Int[Array, ""] | int
    ) -> tuple[Float[Array, "t m"], PyTree]:
        """As `__call__`, for tokens that follow those in the cache."""

        def attend(x):
            nonlocal cache
            x, cache = self.attention.decode(x, cache, position)
            return x

        return self._residual(x, attend, None), cache

    def _residual(self, x, attend, key):
        keys = (None, None) if key is None else jax.random.split(key)
        branches = ((self.attention_norm, attend, keys[0]), (self.feed_forward_norm, self.feed_forward, keys[1]))
        for norm, branch, branch_key in branches:
            drop = lambda y, key=branch_key: self.dropout(self.residual_scale * y, key=key, inference=key is None)  # noqa: E731
            match self.norm_position:
                case NormPosition.pre:
                    x = x + drop(branch(jax.vmap(norm)(x)))
                case NormPosition.post:
                    x = jax.vmap(norm)(x + drop(branch(x)))
        return x


class GPT(eqx.Module):
    """Token logits of a sequence. `blocks` is one Block whose every leaf has a leading layer axis; unstacked, a tuple."""

    embedding: Float[Array, "vocab m"]
    position_embedding: Float[Array, "max_seq_len m"] | None
    blocks: Block | tuple[Block, ...]
    final_norm: eqx.nn.RMSNorm | eqx.nn.LayerNorm | None
    head: eqx.nn.Linear | None
    dropout: eqx.nn.Dropout
    num_layers: int = eqx.field(static=True)
    logit_softcap: float | None = eqx.field(static=True)

    def __init__(self, config: ModelConfig, vocab_size: int, max_seq_len: int, *, key: PRNGKeyArray):
        """`max_seq_len` is the training context: the size of the learned position table where there is one."""
        embedding_key, position_key, blocks_key, head_key, init_key = jax.random.split(key, 5)
        self.embedding = INIT_STD * jax.random.normal(embedding_key, (vocab_size, config.d_model))
        self.position_embedding = None
        if config.learned_positions:
            self.position_embedding = INIT_STD * jax.random.normal(position_key, (max_seq_len, config.d_model))
        make_block = eqx.filter_vmap(lambda key: Block(config, key=key))
        blocks = make_block(jax.random.split(blocks_key, config.num_layers))
        self.blocks = init_weights(blocks, key=init_key, zero_residual=config.zero_init)
        self.final_norm = make_norm(config.norm, config.d_model) if config.norm_position is NormPosition.pre else None
        self.head = None
        if not config.tie_embeddings:
            head = eqx.nn.Linear(config.d_model, vocab_size, use_bias=False, key=head_key)
            self.head = jax.tree.map(jnp.zeros_like, head) if config.zero_init else init_weights(head, key=head_key)
        self.dropout = eqx.nn.Dropout(config.dropout)
        self.num_layers = config.num_layers
        self.logit_softcap = config.logit_softcap

    def __call__(self, tokens: Int[Array, " t"], *, key: PRNGKeyArray | None = None) -> Float[Array, "t vocab"]:
        """Next-token logits at every position; `key` turns dropout on."""
        embed_key, blocks_key = (None, None) if key is None else jax.random.split(key)
        x = self._embed(tokens, jnp.arange(tokens.shape[0]))
        x = self.dropout(x, key=embed_key, inference=key is None)
        keys = None if key is None else jax.random.split(blocks_key, self.num_layers)
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        def apply_block(x, layer):
            arrays, key = layer
            return eqx.combine(arrays, static)(x, key=key), None

        # Weights are stacked for the optimizer's sake; the computation, unrolled, is one straight line.
        x, _ = jax.lax.scan(apply_block, x, (arrays, keys), unroll=self.num_layers)
        return self._logits(x)

    def attention_weights(self, tokens: Int[Array, " t"]) -> Float[Array, "layers n t s"]:
        """How much every head of every layer reads of each token, at every position; each row adds up to one."""
        with record_weights() as records:
            x = self._embed(tokens, jnp.arange(tokens.shape[0]))
            for block in self.layers():
                x = block(x)
        return jnp.stack(records)

    def layers(self) -> tuple[Block, ...]:
        """The blocks one by one."""
        if isinstance(self.blocks, tuple):
            return self.blocks
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        layer = lambda i: jax.tree.map(lambda leaf: leaf[i], arrays)  # noqa: E731
        return tuple(eqx.combine(layer(i), static) for i in range(self.num_layers))

    def unstack(self) -> "GPT":
        """The model with each block's weights in arrays of their own, for decoding: a slice of stacked weights inside of a
        compiled loop is a copy at every token."""
        return eqx.tree_at(lambda model: model.blocks, self, self.layers())

    def init_cache(self, max_seq_len: int) -> tuple[PyTree, ...]:
        """Every layer's empty KV cache."""
        return tuple(block.attention.init_cache(max_seq_len) for block in self.layers())

    def decode(
        self, tokens: Int[Array, " t"], cache: tuple[PyTree, ...], position: Int[Array, ""] | int
    ) -> tuple[Float[Array, "t vocab"], tuple[PyTree, ...]]:
        """Logits of `t` more tokens, the first at `position`, and the cache that has them: equal to the forward pass."""
        x = self._embed(tokens, position + jnp.arange(tokens.shape[0]))
        new_cache = []
        for block, entries in zip(self.layers(), cache, strict=True):
            x, entries = block.decode(x, entries, position)
            new_cache.append(entries)
        return self._logits(x), tuple(new_cache)

    def _embed(self, tokens: Int[Array, " t"], positions: Int[Array, " t"]) -> Float[Array, "t m"]:
        x = take_rows(self.embedding, tokens)
        return x if self.position_embedding is None else x + take_rows(self.position_embedding, positions)

    def _logits(self, x: Float[Array, "t m"]) -> Float[Array, "t vocab"]:
        x = x if self.final_norm is None else jax.vmap(self.final_norm)(x)
        logits = jnp.einsum("tm,om->to", x, self.embedding if self.head is None else self.head.weight)
        if self.logit_softcap is None:
            return logits
        return self.logit_softcap * jnp.tanh(logits / self.logit_softcap)  # Gemma 2, arXiv 2408.00118


def take_rows(table: Float[Array, "rows m"], indices: Int[Array, " t"]) -> Float[Array, "t m"]:
    """table[indices], for small tables as a one-hot product, whose gradient is a product too.

    The gradient of a gather is a scatter-add that all tokens of a batch contend for: on a GPU, with 65 rows, milliseconds.
    """
    if table.shape[0] > 512:
        return table[indices]
    one_hot = jax.nn.one_hot(indices, table.shape[0], dtype=table.dtype)
    return jnp.matmul(one_hot, table, precision=jax.lax.Precision.HIGHEST)


def init_weights(module: Module, *, key: PRNGKeyArray, zero_residual: bool = False) -> Module:
    """GPT-2's initialisation: every Linear weight normal(0, 0.02), those onto the residual stream / sqrt(2 num_layers).

    `zero_residual`: those onto the residual stream are 0 instead, so that every block begins as the identity.
    """
    residual = ("o_proj", "output_proj", "down_proj")
    is_linear = lambda node: isinstance(node, eqx.nn.Linear)  # noqa: E731
    leaves, structure = jax.tree_util.tree_flatten_with_path(module, is_leaf=is_linear)
    keys = jax.random.split(key, len(leaves))

    def init(path, leaf, key):
        if not is_linear(leaf):
            return leaf
        scale = INIT_STD
        if path and getattr(path[-1], "name", "") in residual:
            scale = 0.0 if zero_residual else INIT_STD / math.sqrt(2 * leaf.weight.shape[0])
        return eqx.tree_at(lambda linear: linear.weight, leaf, scale * jax.random.normal(key, leaf.weight.shape))

    return jax.tree.unflatten(structure, [init(path, leaf, k) for (path, leaf), k in zip(leaves, keys, strict=True)])
