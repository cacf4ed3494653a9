"""The decoder-only transformer, whatever its attention type: Block, GPT."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from chargpt.attention import AbstractAttention, abstract, make_attention, surplus_weights
from chargpt.attention.base import Position, Scores, Stream, Weights, projection
from chargpt.attention.modifiers import Modifiers
from chargpt.config import Activation, Match, ModelConfig, Norm, NormPosition, Positions
from chargpt.errors import require
from chargpt.experts import MixtureOfExperts, Routing
from chargpt.feed_forward import FeedForward
from chargpt.positions import sinusoidal

Module = TypeVar("Module", bound=eqx.Module)
NormLayer = eqx.nn.RMSNorm | eqx.nn.LayerNorm
Branch = Callable[[Stream], Stream]
DropoutKey = PRNGKeyArray | None
Tokens = Int[Array, " t"]
Logits = Float[Array, "t vocab"]


FEW_ROWS = 512  # of a table: its rows are taken by a product
INIT_STD = 0.02  # GPT-2's; projections onto the residual stream take 1/sqrt(2 num_layers) of it
POSITION_SCALE = math.sqrt(2) * INIT_STD  # sinusoidal positions are as large as embeddings then


def drop(x: Stream, rate: float, key: DropoutKey) -> Stream:
    """Dropout (arXiv 1207.0580): elements are zero at the `rate`, the others scaled up for it.

    16 random bits decide for each element, two from every word that is drawn, so the rate is
    rounded to a multiple of 2^-16. No key, no dropout.
    """
    if key is None or rate == 0:
        return x
    tokens, width = x.shape
    words = jax.random.bits(key, (tokens, -(-width // 2)))
    bits = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(tokens, -1)[:, :width]
    dropped = round(rate * 2**16)
    return jnp.where(bits < dropped, 0, x / (1 - dropped / 2**16))


def make_norm(kind: Norm, width: int) -> NormLayer:
    norm = eqx.nn.RMSNorm if kind is Norm.rmsnorm else eqx.nn.LayerNorm
    return norm(width, use_bias=False)


def feed_forward_width(config: ModelConfig) -> int:
    """d_ff; with model.match=params, for blocks as large as those of standard attention."""
    if config.match is Match.none:
        return config.ff_width
    surplus = surplus_weights(config)
    matrices = 3 if config.activation is Activation.swiglu else 2
    width = config.ff_width - round(surplus / (matrices * config.d_model))
    require(
        width >= 1,
        f"model.match=params: {config.mha_type.name} attention has {surplus:,} more weights than "
        f"standard, more than a feed-forward layer of model.d_ff={config.ff_width} can give up; "
        "write a larger one, or model.match=none",
    )
    return width


class Block(eqx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); with post-norm, norm(x + branch(x)).

    `residual_scale` is a factor on both branches. Dropout is on these two branches only: dropping
    attention weights would break the sum-to-one that selective attention's value half rests on,
    and fused kernels do not offer it.
    """

    attention: AbstractAttention
    feed_forward: FeedForward | MixtureOfExperts
    attention_norm: NormLayer
    feed_forward_norm: NormLayer
    norm_position: NormPosition = eqx.field(static=True)
    residual_scale: float = eqx.field(static=True)
    dropout: float = eqx.field(static=True)
    modifiers: Modifiers  # last: what it adds leaves the initial weights of the others as they are

    def __init__(self, config: ModelConfig, *, key: PRNGKeyArray):
        attention_key, ff_key = jax.random.split(key)
        self.attention = make_attention(config, key=attention_key)
        if config.num_experts is None:
            d_ff = feed_forward_width(config)
            self.feed_forward = FeedForward(config.d_model, d_ff, config.activation, key=ff_key)
        else:
            self.feed_forward = MixtureOfExperts(config, key=ff_key)
        self.attention_norm = make_norm(config.norm, config.d_model)
        self.feed_forward_norm = make_norm(config.norm, config.d_model)
        self.norm_position = config.norm_position
        self.residual_scale = config.residual_scale
        self.dropout = config.dropout
        modifiers_key = jax.random.fold_in(attention_key, 0)
        self.modifiers = Modifiers(config, self.attention, key=modifiers_key)

    def __call__(
        self, x: Stream, *, window: int | None = None, key: DropoutKey = None, sequences: int = 1
    ) -> Stream:
        """x holds `sequences` of equal length, one after another. `key` None: no dropout."""
        return self.routed(x, window=window, key=key, sequences=sequences)[0]

    def routed(
        self, x: Stream, *, window: int | None = None, key: DropoutKey = None, sequences: int = 1
    ) -> tuple[Stream, Routing | None]:
        """`__call__`, and what the router did, if there are experts."""
        keys = (None, None) if key is None else jax.random.split(key)
        reading, gate = self.modifiers.reading(window), self.modifiers.gate

        def attend(x: Stream) -> Stream:
            return self.attention.batch(x, sequences, reading, gate(x))

        routing = None

        def feed_forward(x: Stream) -> Stream:
            nonlocal routing
            y, routing = self.feed_forward.routed(x)
            return y

        x = self._add(x, self.attention_norm, attend, keys[0])
        return self._add(x, self.feed_forward_norm, feed_forward, keys[1]), routing

    def decode(
        self, x: Stream, cache: PyTree, position: Position, window: int | None = None
    ) -> tuple[Stream, PyTree]:
        """As `__call__`, for tokens that follow those in the cache."""
        reading, gate = self.modifiers.reading(window), self.modifiers.gate

        def attend(x: Stream) -> Stream:
            nonlocal cache
            y, cache = self.attention.decode(x, cache, position, reading, gate(x))
            return y

        x = self._add(x, self.attention_norm, attend, None)
        return self._add(x, self.feed_forward_norm, self.feed_forward, None), cache

    def attention_weights(self, x: Stream, window: int | None = None) -> Weights | None:
        """How much every head reads of each token; None if this attention has no weights."""
        x = self._branch_input(x, self.attention_norm)
        return self.attention.attention_weights(x, self.modifiers.reading(window))

    def query_bias(self, x: Stream, window: int | None = None) -> Scores | None:
        """What every query adds to its scores by position; None if this attention adds nothing."""
        x = self._branch_input(x, self.attention_norm)
        return self.attention.query_bias(x, self.modifiers.reading(window))

    def residual_projections(self) -> set[str]:
        """Paths of the projections onto the residual stream."""
        ours = {f"feed_forward.{path}" for path in self.feed_forward.outputs}
        return {f"attention.{self.attention.output}"} | ours

    def _branch_input(self, x: Stream, norm: NormLayer) -> Stream:
        return jax.vmap(norm)(x) if self.norm_position is NormPosition.pre else x

    def _add(self, x: Stream, norm: NormLayer, branch: Branch, key: DropoutKey) -> Stream:
        y = self.residual_scale * branch(self._branch_input(x, norm))
        x = x + drop(y, self.dropout, key)
        return x if self.norm_position is NormPosition.pre else jax.vmap(norm)(x)


def check(config: ModelConfig) -> None:
    """ConfigError if no block can be built from `config`; nothing is computed."""
    abstract(Block, config)


class GPT(eqx.Module):
    """Token logits of a sequence.

    `blocks` is one Block whose leaves have a leading layer axis, or, unstacked, a tuple.
    """

    embedding: Float[Array, "vocab m"]
    position_embedding: Float[Array, "max_seq_len m"] | None
    ngram_embedding: Float[Array, "before_vocab m"] | None  # of earlier tokens, nearest first
    blocks: Block | tuple[Block, ...]
    final_norm: NormLayer | None
    head: eqx.nn.Linear | None
    dropout: float = eqx.field(static=True)
    num_layers: int = eqx.field(static=True)
    logit_softcap: float | None = eqx.field(static=True)
    window: int | None = eqx.field(static=True)  # of the layers that are L in the pattern
    window_pattern: str = eqx.field(static=True)
    sinusoidal: bool = eqx.field(static=True)

    def __init__(
        self, config: ModelConfig, vocab_size: int, max_seq_len: int, *, key: PRNGKeyArray
    ):
        """`max_seq_len`, the training context, is the size of a learned position table."""
        embedding_key, position_key, blocks_key, head_key, init_key = jax.random.split(key, 5)
        self.embedding = INIT_STD * jax.random.normal(embedding_key, (vocab_size, config.d_model))
        self.position_embedding = None
        if config.has_learned_positions:
            table = jax.random.normal(position_key, (max_seq_len, config.d_model))
            self.position_embedding = INIT_STD * table
        self.ngram_embedding = None
        if config.ngram > 1:  # zeros, so that runs with and without it are pairs
            self.ngram_embedding = jnp.zeros(((config.ngram - 1) * vocab_size, config.d_model))
        make_block = eqx.filter_vmap(lambda key: Block(config, key=key))
        blocks = make_block(jax.random.split(blocks_key, config.num_layers))
        residual_std = 0.0 if config.zero_init else INIT_STD / math.sqrt(2 * config.num_layers)
        stds = dict.fromkeys(blocks.residual_projections(), residual_std)
        self.blocks = init_weights(blocks, stds, key=init_key)
        pre = config.norm_position is NormPosition.pre
        self.final_norm = make_norm(config.norm, config.d_model) if pre else None
        self.head = None
        if not config.tie_embeddings:
            head = projection(config.d_model, vocab_size, head_key)
            self.head = init_weights(head, {"": 0.0} if config.zero_init else {}, key=head_key)
        self.dropout = config.dropout
        self.num_layers = config.num_layers
        self.logit_softcap = config.logit_softcap
        self.window, self.window_pattern = config.window, config.window_pattern or "L"
        self.sinusoidal = config.positions is Positions.sinusoidal

    def __call__(self, tokens: Tokens, *, key: DropoutKey = None) -> Logits:
        """Next-token logits at every position; `key` turns dropout on."""
        return self.batch(tokens[None], key=key)[0]

    def batch(
        self, tokens: Int[Array, "b t"], *, key: DropoutKey = None
    ) -> Float[Array, "b t vocab"]:
        """`__call__` for every sequence; token-wise layers see all of their tokens at once."""
        return self.routed(tokens, key=key)[0]

    def routed(
        self, tokens: Int[Array, "b t"], *, key: DropoutKey = None
    ) -> tuple[Float[Array, "b t vocab"], Routing | None]:
        """`batch`, and what each layer's router did, if there are experts."""
        embed_key, blocks_key = (None, None) if key is None else jax.random.split(key)
        sequences, length = tokens.shape
        x = self._embed(tokens, jnp.arange(length))
        x = drop(x, self.dropout, embed_key)
        keys = None if blocks_key is None else jax.random.split(blocks_key, self.num_layers)
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        period = self._period()

        def apply_blocks(x: Stream, layers: Any) -> tuple[Stream, Routing | None]:
            routings = []
            for layer, window in zip(apart(layers, period), self.windows, strict=False):
                arrays, key = layer
                block = eqx.combine(arrays, static)
                x, routing = block.routed(x, window=window, key=key, sequences=sequences)
                routings.append(routing)
            return x, jax.tree.map(lambda *each: jnp.stack(each), *routings)

        # Weights are stacked for the optimizer; the computation is unrolled.
        rounds = jax.tree.map(
            lambda leaf: leaf.reshape(-1, period, *leaf.shape[1:]), (arrays, keys)
        )
        x, routing = jax.lax.scan(apply_blocks, x, rounds, unroll=self.num_layers // period)
        routing = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), routing)
        return self._logits(x).reshape(sequences, length, -1), routing

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many tokens a query reads, by layer; None: all."""
        pattern = self.window_pattern
        local = [pattern[i % len(pattern)] == "L" for i in range(self.num_layers)]
        return tuple(self.window if here else None for here in local)

    def _period(self) -> int:
        """The number of layers after which their windows repeat."""
        layers, windows = self.num_layers, self.windows
        repeats = (n for n in range(1, layers) if windows == windows[:n] * (layers // n))
        return next(repeats, layers)

    @property
    def stacked(self) -> Block:
        """The blocks as one, as they are trained: its leaves have a leading layer axis."""
        assert isinstance(self.blocks, Block)
        return self.blocks

    def attention_weights(self, tokens: Tokens) -> Float[Array, "layers n t s"] | None:
        """How much every head reads of each token; None if this attention has no weights."""
        return self._ask_layers(Block.attention_weights, tokens)

    def query_bias(self, tokens: Tokens) -> Float[Array, "layers n t s"] | None:
        """What every query adds to its scores by position; None if this attention adds nothing."""
        return self._ask_layers(Block.query_bias, tokens)

    def _ask_layers(
        self, ask: Callable[[Block, Stream, int | None], Array | None], tokens: Tokens
    ) -> Array | None:
        """Every layer's answer about its input, [layers, ...]; None if one has none."""
        x = self._embed(tokens[None], jnp.arange(tokens.shape[0]))
        answers = []
        for block, window in zip(self.layers(), self.windows, strict=True):
            if (answer := ask(block, x, window)) is None:
                return None
            answers.append(answer)
            x = block(x, window=window)
        return jnp.stack(answers)

    def layers(self) -> tuple[Block, ...]:
        """The blocks one by one."""
        if isinstance(self.blocks, tuple):
            return self.blocks
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        return tuple(eqx.combine(layer, static) for layer in apart(arrays, self.num_layers))

    def unstack(self) -> "GPT":
        """The model with separate weights for each block, for decoding.

        Inside a compiled loop, a slice of stacked weights is a copy at every token.
        """
        return eqx.tree_at(lambda model: model.blocks, self, self.layers())

    def init_cache(self, max_seq_len: int) -> tuple[PyTree, ...]:
        """Every layer's empty KV cache, and the last tokens, if an embedding is made of several."""
        layers = zip(self.layers(), self.windows, strict=True)
        caches = [block.attention.init_cache(max_seq_len, window) for block, window in layers]
        earlier = [jnp.zeros(self._before, jnp.int32)] if self._before else []
        return tuple(caches + earlier)

    def decode(
        self, tokens: Tokens, cache: tuple[PyTree, ...], position: Position
    ) -> tuple[Logits, tuple[PyTree, ...]]:
        """Logits of `t` more tokens, the first at `position`, and the cache with their entries."""
        caches, earlier = cache[: self.num_layers], cache[self.num_layers :]
        positions = position + jnp.arange(tokens.shape[0])
        x = self._embed(tokens[None], positions, *(last[None] for last in earlier))
        new_cache = []
        for block, entries, window in zip(self.layers(), caches, self.windows, strict=True):
            x, entries = block.decode(x, entries, position, window)
            new_cache.append(entries)
        new_cache += [jnp.concatenate([last, tokens])[-len(last) :] for last in earlier]
        return self._logits(x), tuple(new_cache)

    @property
    def _before(self) -> int:
        """How many tokens before its own an embedding is made of."""
        table = self.ngram_embedding
        return 0 if table is None else table.shape[-2] // self.embedding.shape[-2]

    def _embed(
        self,
        tokens: Int[Array, "b t"],
        positions: Int[Array, " t"],
        earlier: Int[Array, "b before"] | None = None,
    ) -> Float[Array, "bt m"]:
        """Vectors of tokens at `positions`, one sequence after another; `earlier` precede them.

        A token before position 0 does not exist, whatever `earlier` says.
        """
        sequences, length = tokens.shape
        x = take_rows(self.embedding, tokens.reshape(-1))
        if self.ngram_embedding is not None:
            number, vocab = self._before, self.embedding.shape[0]
            if earlier is None:
                earlier = jnp.zeros((sequences, number), tokens.dtype)
            line = jnp.concatenate([earlier, tokens], axis=1)
            rows = []
            for i in range(1, number + 1):
                before = line[:, number - i : number - i + length]
                rows.append(jnp.where(positions >= i, (i - 1) * vocab + before, -1))
            x = x + sum_rows(self.ngram_embedding, jnp.stack(rows, axis=-1).reshape(-1, number))
        if (vectors := self._position_vectors(positions)) is not None:
            x = x + jnp.tile(vectors, (sequences, 1))
        return x

    def _position_vectors(self, positions: Tokens) -> Stream | None:
        """What is added to the embeddings of tokens at `positions`, if anything is."""
        if self.position_embedding is not None:
            return take_rows(self.position_embedding, positions)
        if not self.sinusoidal:
            return None
        return POSITION_SCALE * sinusoidal(positions, self.embedding.shape[1]).astype(
            self.embedding.dtype
        )

    def _logits(self, x: Stream) -> Logits:
        x = x if self.final_norm is None else jax.vmap(self.final_norm)(x)
        weight = self.embedding if self.head is None else self.head.weight
        logits = jnp.einsum("tm,om->to", x, weight)
        if self.logit_softcap is None:
            return logits
        return self.logit_softcap * jnp.tanh(logits / self.logit_softcap)  # Gemma 2, 2408.00118


def apart(tree: Any, number: int) -> list[Any]:
    """The `number` trees whose arrays are stacked in those of `tree`; their gradients join again.

    Slicing would pad the gradient of each slice with zeros, and add them all up.
    """
    leaves, structure = jax.tree.flatten(tree)
    parts = [[part[0] for part in jax.lax.split(leaf, [1] * number)] for leaf in leaves]
    return [jax.tree.unflatten(structure, [part[i] for part in parts]) for i in range(number)]


def take_rows(table: Float[Array, "rows m"], indices: Tokens) -> Stream:
    """table[indices]; for small tables as a one-hot product, whose gradient is a product too.

    The gradient of a gather is a scatter-add in which all tokens of a batch contend for the rows:
    on a GPU, with 65 rows, this takes milliseconds.
    """
    if table.shape[0] > FEW_ROWS:
        return table[indices]
    one_hot = jax.nn.one_hot(indices, table.shape[0], dtype=table.dtype)
    return jnp.matmul(one_hot, table, precision=jax.lax.Precision.HIGHEST)


def sum_rows(table: Float[Array, "rows m"], indices: Int[Array, "t n"]) -> Stream:
    """The sum of n rows of a table for every token; an index below 0 is none. As `take_rows`."""
    if table.shape[0] > FEW_ROWS:
        return jnp.where(indices[..., None] < 0, 0, table[indices]).sum(axis=1)
    counts = jax.nn.one_hot(indices, table.shape[0], dtype=table.dtype).sum(axis=1)
    return jnp.matmul(counts, table, precision=jax.lax.Precision.HIGHEST)


def is_linear(node: Any) -> bool:
    return isinstance(node, eqx.nn.Linear)


def init_weights(module: Module, stds: dict[str, float], *, key: PRNGKeyArray) -> Module:
    """GPT-2's initialisation: Linear weights normal(0, std), INIT_STD unless `stds` has the path.

    TypeError if a path of `stds` is not a Linear of `module`: a misspelt declaration must not pass.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(module, is_leaf=is_linear)
    keys = jax.random.split(key, len(leaves))
    pending, initialised = set(stds), []
    for (path, leaf), leaf_key in zip(leaves, keys, strict=True):
        if is_linear(leaf):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            pending.discard(name)
            weight = jax.random.normal(leaf_key, leaf.weight.shape)
            weight = stds.get(name, INIT_STD) * weight
            leaf = eqx.tree_at(lambda linear: linear.weight, leaf, weight)
        initialised.append(leaf)
    if pending:
        raise TypeError(f"{type(module).__name__} has no projection {', '.join(sorted(pending))}")
    return jax.tree.unflatten(structure, initialised)
