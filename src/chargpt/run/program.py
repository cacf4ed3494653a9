"""What is compiled for a run, or for a population: runs that differ only in `train.Inputs`."""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from chargpt.attention import is_shape
from chargpt.config import Config
from chargpt.corpus import Corpus, make_windows
from chargpt.costs import count_parameters, flops_per_token, idle_parameters, kv_cache_bytes
from chargpt.errors import require
from chargpt.generate import generate
from chargpt.model import GPT
from chargpt.origin import adopt
from chargpt.parallel import MEMBERS, choose_devices
from chargpt.run import cache
from chargpt.run.evaluate import attention_entropy, eval_batch_size, evaluate
from chargpt.run.machine import compiler_options, measure_peak_flops, memory_bytes
from chargpt.train import (
    Inputs,
    Seed,
    StepMetrics,
    Stream,
    TrainState,
    cast,
    compute_dtype,
    init_state,
    make_inputs,
    random_key,
    train_population,
    train_steps,
)

SAMPLE_TEMPERATURE = 0.8
ENTROPY_WINDOWS = 8  # of the validation split
# For computations that take longer to optimise than to run.
RUNS_ONCE = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}

# The first or the second, whatever this XLA calls it; and no kernels chosen by timing them.
DETERMINISTIC = {
    "xla_gpu_deterministic_ops": True,
    "xla_gpu_exclude_nondeterministic_ops": True,
    "xla_gpu_autotune_level": 0,
}

jitted: Any = eqx.filter_jit  # its annotations lack compiler options
each_entropy = eqx.filter_vmap(attention_entropy, in_axes=(eqx.if_array(0), None))


class Program:
    """The computations of a run of `config` on `corpus`, or of as many `members` at once.

    Each member has a lane: a place along the first axis of every array of `states`. Without members
    there is one lane, and no such axis.
    """

    def __init__(self, config: Config, corpus: Corpus, members: int | None = None):
        self.config, self.corpus, self.members = config, corpus, members
        self.dtype = compute_dtype(config.trainer.precision)
        self.devices = choose_devices(config, members)
        seq_len = config.dataset.seq_len
        self.val_windows = make_windows(corpus.val, seq_len, config.trainer.eval_tokens)
        self.shapes = self._make_shapes()
        model = self.shapes.model  # of one member, with shapes in place of arrays
        self.parameters = count_parameters(model)
        self.active_parameters = sum(self.parameters.values()) - idle_parameters(model)
        self.cache_bytes = kv_cache_bytes(model, self.dtype, seq_len)  # of a full context
        self.flops_per_token = flops_per_token(model, seq_len)
        num_gpus = len(self.devices) if jax.default_backend() == "gpu" else 1
        self.peak_flops = measure_peak_flops(self.dtype) * num_gpus
        self.compiled: dict[int, Any] = {}  # training, by the number of steps
        self.compile_seconds, self.compile_cached = 0.0, False
        self.memory_bytes: int | None = None
        self.kernel = ""  # that computes attention
        self._tokens = self.devices.replicate(jnp.asarray(corpus.train))

    # ---- states

    def _make_shapes(self) -> TrainState:
        """The state of one run, each array's shape with the place that the layout gives it."""
        vocab_size = len(self.corpus.tokenizer)
        shapes = eqx.filter_eval_shape(init_state, self.config, vocab_size, self.config.seed)

        def place(path: Any, leaf: Any) -> Any:
            if not is_shape(leaf):
                return leaf
            sharding = self.devices.sharding(path, leaf)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree_util.tree_map_with_path(place, shapes)

    def _of_lanes(self, leaf: Any) -> Any:
        """The shape of one run's array, with all lanes of it."""
        mesh, spec = self.devices.mesh, leaf.sharding.spec
        first = MEMBERS if self.devices.apart > 1 else None
        sharding = NamedSharding(mesh, PartitionSpec(first, *spec))
        return jax.ShapeDtypeStruct((self.members, *leaf.shape), leaf.dtype, sharding=sharding)

    def initial_state(self, seed: int) -> TrainState:
        """The state of a run before its first step."""
        state = self._initial(self.devices.replicate(jnp.uint32(seed)))
        if self.config.init_from is None:
            return state
        begun = [state.model] if state.ema is None else [state.model, state.ema]
        models = [self.devices.place(self._adopted) for _ in begun]  # a buffer each, to donate
        return eqx.tree_at(lambda state: [state.model, state.ema][: len(begun)], state, models)

    @functools.cached_property
    def _adopted(self) -> GPT:
        """The model to begin from; its numbers are NumPy's."""
        return jax.tree.map(
            lambda leaf: np.asarray(leaf) if eqx.is_array(leaf) else leaf, adopt(self.config)
        )

    def put(self, states: TrainState | None, lane: int, state: TrainState) -> TrainState:
        """`states` with that of one lane replaced; by None, lanes that are all alike."""
        if self.members is None:
            return state
        if states is None:
            return self._alike(state)
        return self._put(states, state, self.devices.replicate(jnp.int32(lane)))

    def take(self, states: TrainState, lane: int) -> TrainState:
        """The state of one lane."""
        return states if self.members is None else self._take(states, jnp.int32(lane))

    def _on_states(self, function: Callable[..., TrainState], **options: Any) -> Any:
        """`function` of states and arrays, compiled.

        By JAX, which forgets it together with this program: Equinox would keep both.
        """
        static = eqx.filter(self.shapes, is_shape, inverse=True)

        def on_arrays(*given: Any) -> Any:
            return eqx.filter(function(*given), eqx.is_array)

        compiled: Any = jax.jit(on_arrays, **options)
        return lambda *given: eqx.combine(compiled(*eqx.filter(given, eqx.is_array)), static)

    @functools.cached_property
    def _initial(self) -> Any:
        def initial(seed: Seed) -> TrainState:
            """Made where the layout keeps it: no device holds all of a state that is shared out."""
            return self.devices.place(init_state(self.config, len(self.corpus.tokenizer), seed))

        return self._on_states(initial, compiler_options=compiler_options(RUNS_ONCE))

    @functools.cached_property
    def _alike(self) -> Any:
        def alike(state: TrainState) -> TrainState:
            lanes = jnp.arange(self.members)
            return self.devices.vmap(lambda _: self.devices.place(state))(lanes)

        return self._on_states(alike)

    @functools.cached_property
    def _put(self) -> Any:
        def put(states: TrainState, state: TrainState, lane: Array) -> TrainState:
            states = jax.tree.map(lambda old, new: old.at[lane].set(new), states, state)
            return self.devices.vmap(self.devices.place)(states)

        return self._on_states(put, donate_argnums=0)

    @functools.cached_property
    def _take(self) -> Any:
        def take(states: TrainState, lane: Array) -> TrainState:
            return jax.tree.map(lambda leaf: leaf[lane], states)

        return self._on_states(take)

    # ---- training

    def inputs(self, configs: Sequence[Config]) -> Inputs:
        """The inputs of a step: of the one run, or stacked, of each lane's."""
        each = [make_inputs(self._tokens, config) for config in configs]
        own = [(inputs.seed, inputs.numbers) for inputs in each]
        if self.members is not None:
            own = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)]
        return Inputs(self._tokens, *self.devices.replicate(own[0]))

    def compile(self, lengths: Iterable[int], inputs: Inputs) -> None:
        """Compile training by so many steps, each of `lengths`, where that is not done yet."""
        for length in sorted({*lengths} - {*self.compiled}):
            begin, reads = time.perf_counter(), cache.reads
            steps = self.compiled[length] = self._compile(length, inputs)
            self.compile_seconds += time.perf_counter() - begin
            self.compile_cached |= cache.reads > reads
            self.memory_bytes = max(self.memory_bytes or 0, memory_bytes(steps))
            # What XLA made of it, rather than what was asked for
            fused = jax.default_backend() == "gpu" and "fmha" in steps.as_text()
            self.kernel = "cuDNN's fused kernel" if fused else "XLA"

    def _compile(self, num_steps: int, inputs: Inputs) -> Any:
        static = eqx.filter(self.shapes, is_shape, inverse=True)

        def steps(
            arrays: TrainState, inputs: Inputs, until: Array | None
        ) -> tuple[TrainState, StepMetrics]:
            state = eqx.combine(arrays, static)
            if until is None:
                state, metrics = train_steps(state, inputs, self.config, num_steps, self.devices)
            else:
                chunk = self.config, num_steps, self.devices
                state, metrics = train_population(state, inputs, until, *chunk)
            return eqx.filter(state, eqx.is_array), metrics

        make: Any = jax.jit(steps, donate_argnums=0)
        shapes, until = eqx.filter(self.shapes, is_shape), None
        if self.members is not None:
            shapes = jax.tree.map(self._of_lanes, shapes)
            until = self.devices.replicate(jnp.zeros(self.members, jnp.int32))
        return make.lower(shapes, inputs, until).compile(self._options())

    def train(
        self, num_steps: int, states: TrainState, inputs: Inputs, until: Sequence[int]
    ) -> tuple[TrainState, StepMetrics]:
        """Start `num_steps` steps; each member ends at its own step in `until`."""
        ends = None
        if self.members is not None:
            ends = self.devices.replicate(jnp.asarray(until, jnp.int32))
        arrays, static = eqx.partition(states, eqx.is_array)
        arrays, metrics = self.compiled[num_steps](arrays, inputs, ends)
        return eqx.combine(arrays, static), metrics

    def _options(self) -> dict[str, Any] | None:
        """What XLA must be told to compile the same kernels, with the same sums, every time."""
        if not (self.config.trainer.deterministic and jax.default_backend() == "gpu"):
            return None
        found = compiler_options(DETERMINISTIC)
        rule = "this version of XLA has no such mode; write trainer.deterministic=false"
        require(len(found) > 1, f"trainer.deterministic=true: {rule}")
        return found

    # ---- what is known of the models, of each lane

    def scores(self, model: GPT) -> list[dict[str, float]]:
        """Loss, bits and accuracy on the validation split."""
        batch_size, precision = eval_batch_size(self.val_windows), self.config.trainer.precision
        found = evaluate(model, self.val_windows, batch_size, precision, self.devices)
        columns = {name: np.atleast_1d(values) for name, values in found.items()}
        return [
            {name: float(values[lane]) for name, values in columns.items()}
            for lane in range(self.members or 1)
        ]

    def entropies(self, model: GPT) -> list[list[float]]:
        """Of attention, the mean over heads of each layer; empty if the type has no weights."""
        entropy = attention_entropy if self.members is None else each_entropy
        find = jitted(entropy, compiler_options=compiler_options(RUNS_ONCE))
        entropies = find(self._own(model), self.val_windows.inputs[:ENTROPY_WINDOWS])
        if entropies is None:
            return [[]] * (self.members or 1)
        heads = np.asarray(entropies)
        heads = heads[None] if self.members is None else heads
        return [[float(layer.mean()) for layer in lane] for lane in heads]

    def samples(self, model: GPT, keys: Sequence[tuple[int, int]], num_chars: int) -> list[str]:
        """Text of `num_chars` characters from each lane, drawn with its key: (seed, step)."""
        tokenizer, seq_len = self.corpus.tokenizer, self.config.dataset.seq_len
        prompt = "\n" if "\n" in tokenizer.vocabulary else tokenizer.vocabulary[0]
        pieces = generate(
            cast(self._own(model), self.dtype),
            tokenizer.encode(prompt),
            num_chars,
            max_seq_len=seq_len,
            keys=jnp.stack([random_key(seed, Stream.sample, step) for seed, step in keys]),
            temperature=SAMPLE_TEMPERATURE,
            tokens_per_piece=max(1, seq_len // 2 - 1),  # always one length: one compilation
        )
        rows = np.concatenate(list(pieces), axis=1)
        return [tokenizer.decode(row) for row in rows]

    def _own(self, model: GPT) -> GPT:
        """Where one device can work on it; members stay on the device that trains them."""
        return self.devices.first(model) if self.members is None else model
