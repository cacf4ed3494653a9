"""A training run as computation: a state, compiled steps, and reports. Writes and shows nothing."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import numpy as np

from chargpt.checkpoint import Header
from chargpt.config import Config
from chargpt.corpus import Corpus, make_windows
from chargpt.costs import count_parameters, flops_per_token, kv_cache_bytes_per_token
from chargpt.errors import RunFailed, require
from chargpt.generate import generate
from chargpt.model import GPT
from chargpt.parallel import choose_devices
from chargpt.run import cache, peers
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

Line = dict[str, int | float]
jitted: Any = eqx.filter_jit  # its annotations lack compiler options and `lower`


class NotFinite(RunFailed):
    """Loss or gradient was not finite too many times in a row."""


@dataclasses.dataclass
class Report:
    """What is known of the run at a step."""

    line: Line  # of metrics.jsonl
    sample: str = ""
    is_best: bool = False
    saves: tuple[str, ...] = ()  # checkpoints due now: the loop's state is that of this step

    @property
    def evaluated(self) -> bool:
        return "val/loss" in self.line


class Loop:
    """The training loop of `config` on `corpus`, from the first step or from a checkpoint."""

    def __init__(
        self, config: Config, corpus: Corpus, restored: tuple[TrainState, Header] | None = None
    ):
        self.config, self.corpus = config, corpus
        self.dtype = compute_dtype(config.trainer.precision)
        self.devices = choose_devices(config)
        self.inputs = self.devices.replicate(make_inputs(corpus.train, config))
        options = compiler_options(RUNS_ONCE)
        self.state: TrainState
        if restored is None:
            make = jitted(self._initial_state, compiler_options=options)
            self.state, header = make(self.inputs.seed), None
        else:
            state, header = restored
            self.state = self.devices.place(state)
        self.step = header.step if header else 0
        self.best_val_loss = header.best_val_loss if header else None
        self.best_step = header.best_step if header else None
        seq_len = config.dataset.seq_len
        self.val_windows = make_windows(corpus.val, seq_len, config.trainer.eval_tokens)
        self._entropy = jitted(attention_entropy, compiler_options=options)
        self.parameters = count_parameters(self.state.model)
        self.cache_bytes = kv_cache_bytes_per_token(self.state.model, self.dtype)
        self.flops_per_token = flops_per_token(self.state.model, seq_len)
        num_gpus = len(self.devices) if jax.default_backend() == "gpu" else 1
        self.peak_flops = measure_peak_flops(self.dtype) * num_gpus
        self.final_val_loss: float | None = None
        self.sample = ""
        self.trained_tokens, self.trained_seconds, self.last_fetch = 0, 0.0, 0.0
        self.stalls = peers.Stalls(config.parallel.stall_factor)
        self.compile_seconds, self.compile_cached = 0.0, False
        self.memory_bytes: int | None = None
        self.kernel = ""  # that computes attention
        self.seconds_before = header.seconds if header else 0.0
        self.began = time.perf_counter()

    def _initial_state(self, seed: Seed) -> TrainState:
        """Made where the layout keeps it: no device holds all of a state that is shared out."""
        return self.devices.place(init_state(self.config, len(self.corpus.tokenizer), seed))

    def compile(self) -> None:
        """Compile a chunk of every length that the run needs."""
        self.began, reads = time.perf_counter(), cache.reads
        steps = [self.step, *self._boundaries()]
        lengths = {end - begin for begin, end in itertools.pairwise(steps)}
        self.compiled = {length: self._compile_steps(length) for length in lengths}
        self.compile_seconds = time.perf_counter() - self.began
        self.memory_bytes = max(map(memory_bytes, self.compiled.values()), default=None)
        self.compile_cached = cache.reads > reads
        # What XLA made of it, rather than what was asked for
        texts = (steps.compiled.as_text() for steps in self.compiled.values())
        fused = jax.default_backend() == "gpu" and any("fmha" in text for text in texts)
        self.kernel = "cuDNN's fused kernel" if fused else "XLA"

    def _compile_steps(self, num_steps: int) -> Any:
        def steps(inputs: Inputs, state: TrainState) -> tuple[TrainState, StepMetrics]:
            return train_steps(state, inputs, self.config, num_steps, self.devices)

        make = jitted(steps, donate="all-except-first", compiler_options=self._options())
        return make.lower(self.inputs, self.state).compile()

    def _options(self) -> dict[str, Any] | None:
        """What XLA must be told to compile the same kernels, with the same sums, every time."""
        if not (self.config.trainer.deterministic and jax.default_backend() == "gpu"):
            return None
        found = compiler_options(DETERMINISTIC)
        rule = "this version of XLA has no such mode; write trainer.deterministic=false"
        require(len(found) > 1, f"trainer.deterministic=true: {rule}")
        return found

    def _boundaries(self) -> Iterator[int]:
        """The next steps at which something is due: multiples, wherever the run has started."""
        trainer, step = self.config.trainer, self.step
        intervals = (trainer.log_every, trainer.eval_every, trainer.checkpoint_every)
        while step < trainer.num_steps:
            step = min(trainer.num_steps, *((step // every + 1) * every for every in intervals))
            yield step

    def reports(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Report]:
        """Train to the end, or until `stop()`, reporting one chunk while the next is computed.

        Nothing is computed meanwhile if an evaluation or a checkpoint is due: `state` is then the
        state of that step, until the next report is asked for.
        """
        trainer, pending = self.config.trainer, None
        for end in self._boundaries():
            with self.stalls.watch("agreement"):
                stopped = stop()
            if stopped:
                break
            with self.stalls.watch("start of steps"):
                self.state, metrics = self.compiled[end - self.step](self.inputs, self.state)
            chunk = (end, metrics, time.perf_counter())
            self.step = end
            if pending is not None:
                yield Report(self._fetch(*pending))
            pending = chunk
            if end == trainer.num_steps or end % trainer.eval_every == 0:
                line = self._fetch(*pending)
                with self.stalls.watch("evaluation"):
                    report = self._evaluate(line)
                yield report
                pending = None
            elif end % trainer.checkpoint_every == 0:
                yield Report(self._fetch(*pending), saves=("last",))
                pending = None
        if pending is not None:
            yield Report(self._fetch(*pending), saves=("last",))

    def _fetch(self, step: int, metrics: StepMetrics, dispatched: float) -> Line:
        """Wait for the metrics of a chunk that ends at `step`, as a line for metrics.jsonl.

        NotFinite after too many skipped steps.
        """
        with self.stalls.watch("end of steps"):
            metrics = jax.tree.map(np.asarray, metrics)
        now = time.perf_counter()
        seconds = now - max(dispatched, self.last_fetch)
        self.last_fetch = now
        self.stalls.least = min(seconds, self.stalls.least or seconds)
        per_step = self.config.trainer.batch_size * self.config.dataset.seq_len
        tokens = len(metrics.loss) * per_step
        self.trained_tokens += tokens
        self.trained_seconds += seconds
        most = self.config.trainer.max_skipped_steps
        if metrics.skipped_in_a_row.max() >= most:
            reason = f"loss or gradient was not finite in {most} steps in a row"
            raise NotFinite(f"stopped at step {step}: {reason}")
        return {
            "trainer/step": step,
            "trainer/tokens": step * per_step,
            "trainer/seconds": self.seconds(),
            "trainer/skipped_steps": int(metrics.skipped[-1]),
            "train/loss": float(metrics.loss.mean(dtype=np.float64)),
            "train/grad_norm": float(metrics.grad_norm[-1]),
            **{f"grad_norm/{name}": float(norm[-1]) for name, norm in metrics.part_norms.items()},
            "optim/learning_rate": float(metrics.learning_rate[-1]),
            "throughput/tokens_per_second": tokens / seconds,
            "throughput/mfu": tokens / seconds * self.flops_per_token / self.peak_flops,
        }

    def _evaluate(self, line: Line) -> Report:
        """`line` with validation metrics, a sample of text, and whether this is the best so far."""
        line |= self._score(self.state.averaged)
        if self.state.ema is not None:
            line["val/raw_loss"] = self._score(self.state.model)["val/loss"]  # not averaged
        averaged = self.devices.first(self.state.averaged)
        entropies = self._entropy(averaged, self.val_windows.inputs[:ENTROPY_WINDOWS])
        for layer, heads in enumerate([] if entropies is None else np.asarray(entropies)):
            line[f"attention_entropy/layer_{layer}"] = float(heads.mean())
        self.final_val_loss = line["val/loss"]
        best = math.inf if self.best_val_loss is None else self.best_val_loss
        is_best = line["val/loss"] < best  # NaN never is
        if is_best:
            self.best_val_loss, self.best_step = line["val/loss"], self.step
        if self.best_val_loss is not None:
            line["best/val_loss"] = self.best_val_loss
        if self.config.trainer.sample_chars:
            self.sample = self.write_sample()
        return Report(line, self.sample, is_best, ("last", "best") if is_best else ("last",))

    def _score(self, model: GPT) -> dict[str, float]:
        batch_size = eval_batch_size(self.val_windows)
        precision = self.config.trainer.precision
        return evaluate(model, self.val_windows, batch_size, precision, self.devices)

    def write_sample(self) -> str:
        """`trainer.sample_chars` characters of text from the averaged weights."""
        tokenizer, seq_len = self.corpus.tokenizer, self.config.dataset.seq_len
        prompt = "\n" if "\n" in tokenizer.vocabulary else tokenizer.vocabulary[0]
        pieces = generate(
            cast(self.devices.first(self.state.averaged), self.dtype),
            tokenizer.encode(prompt),
            self.config.trainer.sample_chars,
            max_seq_len=seq_len,
            keys=random_key(self.config.seed, Stream.sample, self.step)[None],
            temperature=SAMPLE_TEMPERATURE,
            tokens_per_piece=max(1, seq_len // 2 - 1),  # always one length: one compilation
        )
        return "".join(tokenizer.decode(piece[0]) for piece in pieces)

    def decode_speed(self) -> float | None:
        """Tokens per second of the sampler; None if it has not run, and hence is not compiled."""
        if not self.sample:
            return None
        begin = time.perf_counter()
        self.write_sample()
        return self.config.trainer.sample_chars / (time.perf_counter() - begin)

    def seconds(self) -> float:
        """Wall time of training so far, including that before a resume."""
        return self.seconds_before + time.perf_counter() - self.began
