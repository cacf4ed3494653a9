"""A training run: its directory, the loop over compiled chunks of steps, what is logged, saved and shown on the way."""

import contextlib
import dataclasses
import json
import math
import platform
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from omegaconf import OmegaConf

from chargpt import checkpoint, compilation
from chargpt.cli import RunFailed, command
from chargpt.config import AttentionType, Config, ConfigError, differences, quoted, to_plain
from chargpt.console import RunConsole
from chargpt.corpus import Corpus, load_corpus, make_windows
from chargpt.flops import count_parameters, flops_per_token, kv_cache_bytes_per_token
from chargpt.generate import generate
from chargpt.machine import device_name, measure_peak_flops, memory_bytes, package_versions
from chargpt.parallel import choose_devices, offer_cpu_devices
from chargpt.process import StopSignal, lock
from chargpt.report import draw_curves
from chargpt.resume import check_corpus, cut_records, record_sizes, restore
from chargpt.tracking import MetricsFile, WandbRun, read_metrics
from chargpt.train import (
    StepMetrics,
    Stream,
    TrainState,
    attention_entropy,
    cast,
    compute_dtype,
    eval_batch_size,
    evaluate,
    init_state,
    make_inputs,
    random_key,
    train_steps,
)

SAMPLE_TEMPERATURE = 0.8
ENTROPY_WINDOWS = 8  # of the validation split
# Compiler options of what takes longer to optimise than to run.
RUNS_ONCE = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


Watch = Callable[[int, float], bool]  # (step, validation loss), at every evaluation: whether to give the run up there


def train(config: Config, run_dir: Path, watch: Watch | None = None) -> float:
    """Train the model that `config` describes, leaving everything in `run_dir`; the best validation loss.

    SystemExit with the conventional code (128 + signal) where a signal asked it to stop; it has saved by then.
    """
    console = RunConsole()
    offer_cpu_devices()
    with lock(run_dir), compilation.kept_executables(console.say), StopSignal() as stop:
        if (run_dir / "metrics.jsonl").exists():
            raise ConfigError(f"{run_dir}: already holds a run; write resume={run_dir}, or another hydra.run.dir=DIR")
        return Run(config, run_dir, load_corpus(config.dataset), console, watch=watch).train(stop)


def resume(run_dir: Path, overrides: Sequence[str], watch: Watch | None = None) -> float:
    """Go on with the run in `run_dir`, its configuration changed by `overrides` alone; otherwise as `train`."""
    console = RunConsole()
    offer_cpu_devices()
    with lock(run_dir), compilation.kept_executables(console.say), StopSignal() as stop:
        config, restored = restore(run_dir, overrides, console.say)
        corpus = load_corpus(config.dataset)
        if restored is not None:
            header = restored[1]
            check_corpus(header, corpus)
            if header.step >= config.trainer.num_steps and header.best_val_loss is not None:
                console.say(f"already complete at step {header.step}: a larger trainer.num_steps goes on")
                return header.best_val_loss
        cut_records(run_dir, {} if restored is None else restored[1].record_sizes)
        return Run(config, run_dir, corpus, console, restored, watch).train(stop)


@dataclasses.dataclass
class Chunk:
    """Steps that have been dispatched and not yet looked at."""

    end: int
    num_steps: int
    metrics: StepMetrics
    dispatched: float


class Run:
    """One training run in its directory."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        corpus: Corpus,
        console: RunConsole,
        restored: tuple[TrainState, checkpoint.Header] | None = None,
        watch: Watch | None = None,
    ):
        self.watch, self.given_up = watch, False
        self.config, self.run_dir, self.corpus, self.console = config, run_dir, corpus, console
        self.dtype = compute_dtype(config.trainer.precision)
        self.devices = choose_devices(config.trainer)
        self._entropy = eqx.filter_jit(attention_entropy, compiler_options=RUNS_ONCE)
        self.versions = package_versions()
        self.step = 0
        self.seconds_before = 0.0
        self.best_val_loss: float | None = None
        self.best_step: int | None = None
        self.state: TrainState
        self.inputs = make_inputs(corpus.train, config)
        if restored is None:
            make = eqx.filter_jit(lambda seed: init_state(config, len(corpus.tokenizer), seed), compiler_options=RUNS_ONCE)
            self.state = make(self.inputs.seed)
        else:
            self.state, header = restored
            self.step, self.seconds_before = header.step, header.seconds
            self.best_val_loss, self.best_step = header.best_val_loss, header.best_step
        self.state = self.devices.replicate(self.state)
        self.final_val_loss: float | None = None
        self.unsaved: str | None = None  # why the newest checkpoint is not on disk
        self.sample = ""
        self.decode_speed: float | None = None  # tokens per second of the sampler
        self.trained_tokens, self.trained_seconds = 0, 0.0
        self.last_fetch = 0.0

        model = self.state.model
        self.parameters = count_parameters(model)
        self.cache_bytes = kv_cache_bytes_per_token(model, self.dtype)
        self.peak_flops = measure_peak_flops(self.dtype) * (len(self.devices) if jax.default_backend() == "gpu" else 1)
        self.flops_per_token = flops_per_token(model, config.model, config.dataset.seq_len)
        self.inputs = self.devices.replicate(self.inputs)
        self.val_windows = make_windows(corpus.val, config.dataset.seq_len, config.trainer.eval_tokens)
        (run_dir / "checkpoints").mkdir(exist_ok=True)
        checkpoint.write_durably(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(to_plain(config))).encode())
        self._show_start()
        self.metrics_file = MetricsFile(run_dir / "metrics.jsonl")
        self.wandb = WandbRun(config, self._derived(), run_dir, console.say)
        self.began = time.perf_counter()
        self._compile()

    # ---- the loop

    def train(self, stop: StopSignal) -> float:
        """Run to the end, or to the signal; the best validation loss."""
        try:
            with self.console.progress(self.config.trainer.num_steps, self.step):
                self.loop(stop)
            exit_code = 0 if stop.number is None else 128 + stop.number
            self.finish(exit_code)
        except BaseException:
            self.wandb.finish(self._summary(), exit_code=1)
            raise
        if self.unsaved is not None:
            raise RunFailed(f"the last checkpoint could not be written ({self.unsaved}); free the disk and resume")
        if exit_code:
            raise SystemExit(exit_code)
        if self.best_val_loss is None:
            raise RunFailed("the validation loss was never a finite number; try a smaller optimizer.learning_rate")
        return self.best_val_loss

    def loop(self, stop: StopSignal) -> None:
        """Dispatch chunk after chunk; look at one while the next is computed, except where something is due between."""
        trainer = self.config.trainer
        pending: Chunk | None = None
        while self.step < trainer.num_steps and stop.number is None and not self.given_up:
            num_steps = self._next_boundary() - self.step
            self.state, metrics = self.compiled[num_steps](self.inputs, self.state)
            self.step += num_steps
            chunk = Chunk(self.step, num_steps, metrics, time.perf_counter())
            if pending is not None:
                self._log(self._fetch(pending))
            pending = chunk
            at_end = self.step == trainer.num_steps
            evaluation_due = at_end or self.step % trainer.eval_every == 0
            if evaluation_due or self.step % trainer.checkpoint_every == 0:
                line = self._fetch(pending)
                pending = None
                is_best = self._evaluate(line) if evaluation_due else False
                self._log(line)
                if evaluation_due:
                    self.console.show_evaluation(line, is_best, self.sample)
                    self.given_up = not at_end and self.watch is not None and self.watch(self.step, line["val/loss"])
                self._save("last")
                if is_best:
                    self._save("best")
        if pending is not None:
            self._log(self._fetch(pending))
            self._save("last")

    def _next_boundary(self) -> int:
        """The next step, on a grid that does not depend on where the run began, at which something is due."""
        trainer = self.config.trainer
        intervals = (trainer.log_every, trainer.eval_every, trainer.checkpoint_every)
        return min(trainer.num_steps, *((self.step // interval + 1) * interval for interval in intervals))

    def _compile(self) -> None:
        """Compile the chunk of every length that the run will need."""
        begin, here, reads = time.perf_counter(), self.step, compilation.reads
        self.compiled: dict[int, Any] = {}
        while self.step < self.config.trainer.num_steps:
            length = self._next_boundary() - self.step
            if length not in self.compiled:
                steps = eqx.filter_jit(
                    lambda inputs, state, n=length: train_steps(state, inputs, self.config, n, self.devices),
                    donate="all-except-first",
                )
                self.compiled[length] = steps.lower(self.inputs, self.state).compile()
            self.step += length
        self.step = here
        self.compile_seconds = time.perf_counter() - begin
        self.memory_bytes = max(map(memory_bytes, self.compiled.values()), default=None)
        self.compile_cached = compilation.reads > reads
        how = "read the compiled training step" if self.compile_cached else "compiled the training step"
        self.console.say(f"{how} in {self.compile_seconds:.1f} s\n")

    def _fetch(self, chunk: Chunk) -> dict[str, int | float]:
        """Wait for a chunk's metrics, as a line for metrics.jsonl; RunFailed after too many skipped steps in a row."""
        metrics = jax.tree.map(np.asarray, chunk.metrics)
        now = time.perf_counter()
        seconds = now - max(chunk.dispatched, self.last_fetch)
        self.last_fetch = now
        per_step = self.config.trainer.batch_size * self.config.dataset.seq_len
        self.trained_tokens += chunk.num_steps * per_step
        self.trained_seconds += seconds
        if metrics.skipped_in_a_row.max() >= self.config.trainer.max_skipped_steps:
            self._stop_not_finite(chunk.end)
        speed = chunk.num_steps * per_step / seconds
        return {
            "trainer/step": chunk.end,
            "trainer/tokens": chunk.end * per_step,
            "trainer/seconds": self._seconds(),
            "trainer/skipped_steps": int(metrics.skipped[-1]),
            "train/loss": float(metrics.loss.mean(dtype=np.float64)),
            "train/grad_norm": float(metrics.grad_norm[-1]),
            **{f"grad_norm/{name}": float(norms[-1]) for name, norms in metrics.part_norms.items()},
            "optim/learning_rate": float(metrics.learning_rate[-1]),
            "throughput/tokens_per_second": speed,
            "throughput/mfu": speed * self.flops_per_token / self.peak_flops,
        }

    def _log(self, line: dict[str, int | float]) -> None:
        with self._disk_may_be_full():
            self.metrics_file.log(line)
        self.wandb.log(line)
        self.console.show_step(line, self.best_val_loss)

    def _evaluate(self, line: dict[str, int | float]) -> bool:
        """Add validation metrics to `line`, sample a text; whether this is the best so far."""
        batch_size, precision = eval_batch_size(self.val_windows), self.config.trainer.precision
        score = lambda model: evaluate(model, self.val_windows, batch_size, precision, self.devices)  # noqa: E731
        line |= score(self.state.averaged)
        if self.state.ema is not None:
            line["val/raw_loss"] = score(self.state.model)["val/loss"]  # of the weights that are not averaged
        entropies = self._entropy(self.devices.first(self.state.averaged), self.val_windows.inputs[:ENTROPY_WINDOWS])
        line |= {f"attention_entropy/layer_{layer}": float(heads.mean()) for layer, heads in enumerate(np.asarray(entropies))}
        self.final_val_loss = line["val/loss"]
        is_best = line["val/loss"] < (math.inf if self.best_val_loss is None else self.best_val_loss)  # NaN never is
        if is_best:
            self.best_val_loss, self.best_step = line["val/loss"], self.step
        if self.best_val_loss is not None:
            line["best/val_loss"] = self.best_val_loss
        if self.config.trainer.sample_chars:
            self.sample = self._sample()
            with self._disk_may_be_full(), open(self.run_dir / "samples.txt", "a", encoding="utf-8") as file:
                file.write(f"=== step {self.step}\n{self.sample}\n\n")
            self.wandb.log_sample(self.step, self.sample)
        return is_best

    def _sample(self) -> str:
        tokenizer = self.corpus.tokenizer
        prompt = "\n" if "\n" in tokenizer.vocabulary else tokenizer.vocabulary[0]
        pieces = generate(
            cast(self.devices.first(self.state.averaged), self.dtype),
            tokenizer.encode(prompt),
            self.config.trainer.sample_chars,
            max_seq_len=self.config.dataset.seq_len,
            keys=random_key(self.config.seed, Stream.sample, self.step)[None],
            temperature=SAMPLE_TEMPERATURE,
            tokens_per_piece=max(1, self.config.dataset.seq_len // 2 - 1),  # one length throughout: one compilation
        )
        return "".join(tokenizer.decode(piece[0]) for piece in pieces)

    @contextlib.contextmanager
    def _disk_may_be_full(self) -> Iterator[None]:
        """A record that cannot be written is said, and does not end the run."""
        try:
            yield
        except OSError as error:
            self.console.say(f"step {self.step}: not recorded ({error.strerror}); training goes on")

    def _save(self, name: str) -> None:
        """Write checkpoints/NAME.eqx; where the disk refuses, say so and keep the one that is there."""
        path = self._checkpoint(name)
        try:
            if name == "last" and path.exists():
                checkpoint.keep_as(path, self._checkpoint("previous"))
            checkpoint.save(path, self.state, self._header())
            self.unsaved = None
        except OSError as error:
            self.unsaved = error.strerror
            self.console.say(f"checkpoint not written ({error.strerror}); training goes on, the last good one stays")

    def _stop_not_finite(self, step: int) -> None:
        last = self._checkpoint("last")
        kept = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was written before"
        self._write_summary()
        raise RunFailed(
            f"stopped at step {step}: loss or gradient was not finite in {self.config.trainer.max_skipped_steps} steps "
            f"in a row; {kept}; try a smaller optimizer.learning_rate"
        )

    # ---- what it leaves behind

    def finish(self, exit_code: int) -> None:
        """Write the summary and the figure, hand over to W&B, show the end."""
        if self.sample and exit_code == 0:
            begin = time.perf_counter()
            self._sample()  # a second time: everything is compiled now
            self.decode_speed = self.config.trainer.sample_chars / (time.perf_counter() - begin)
        self._write_summary()
        title = f"{self.config.wandb.name}: {sum(self.parameters.values()):,} parameters, {self.config.dataset.name.name}"
        draw_curves(read_metrics(self.run_dir / "metrics.jsonl"), self.corpus.baselines, title, self.run_dir / "curves.png")
        self.wandb.finish(self._summary(), exit_code)
        self._show_end(exit_code)

    def _summary(self) -> dict[str, Any]:
        speed = self.trained_tokens / self.trained_seconds if self.trained_seconds else None
        return {
            "best/val_loss": self.best_val_loss,
            "best/step": self.best_step,
            "final/val_loss": self.final_val_loss,
            "final/step": self.step,
            "tokens_per_second": speed,
            "decode_tokens_per_second": self.decode_speed,
            "peak_memory_bytes": self.memory_bytes,
            "compile_seconds": self.compile_seconds,
            "compile_cached": self.compile_cached,  # read, and not compiled, in those seconds
            "train_seconds": self._seconds(),
            **self._derived(),
        }

    def _derived(self) -> dict[str, Any]:
        """What follows from the configuration and is worth comparing runs by."""
        return {
            "mha_type": self.config.model.mha_type.name,
            "num_params": sum(self.parameters.values()),
            "kv_cache_bytes_per_token": self.cache_bytes,
            "flops_per_token": self.flops_per_token,
            "device": device_name(),
            "num_devices": len(self.devices),
            "dataset": self.config.dataset.name.name,
            "corpus_sha256": self.corpus.sha256,
            "versions": {"python": platform.python_version(), **self.versions},
        }

    def _write_summary(self) -> None:
        checkpoint.write_durably(self.run_dir / "summary.json", (json.dumps(self._summary(), indent=2) + "\n").encode())

    def _header(self) -> checkpoint.Header:
        return checkpoint.Header(
            config=self.config,
            vocabulary=self.corpus.tokenizer.vocabulary,
            corpus_sha256=self.corpus.sha256,
            step=self.step,
            seconds=self._seconds(),
            best_val_loss=self.best_val_loss,
            best_step=self.best_step,
            versions=self.versions | {"devices": str(self.devices)},
            record_sizes=record_sizes(self.run_dir),
        )

    def _checkpoint(self, name: str) -> Path:
        return self.run_dir / "checkpoints" / f"{name}.eqx"

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began

    # ---- what a person sees

    def _show_start(self) -> None:
        model, corpus = self.config.model, self.corpus
        context_bytes = self.cache_bytes * self.config.dataset.seq_len
        baselines = corpus.baselines
        facts = {
            "attention": f"{model.mha_type.name} ({'rope' if model.rope else 'no rope'})",
            "options": " ".join(f"{name}={value}" for name, value in differences(self.config).items()) or "all defaults",
            "device": f"{device_name()}, batch shared by {len(self.devices)}, {self.config.trainer.precision.name}, "
            f"{self.peak_flops / 1e9:,.0f} GFLOP/s in matrix products",
            "corpus": f"{corpus.name}: {len(corpus.train):,} characters to train on, {len(corpus.val):,} to validate, "
            f"{len(corpus.tokenizer)} symbols",
            "baselines": f"ln V {baselines['uniform']:.3f}, unigram {baselines['unigram']:.3f}, "
            f"bigram {baselines['bigram']:.3f} nats per character",
            "KV cache": f"{self.cache_bytes:,} bytes per token, {context_bytes:,} at {self.config.dataset.seq_len} tokens",
            "writes to": str(self.run_dir),
        }
        self.console.show_start(facts, self.parameters)
        width = self.state.model.blocks.feed_forward.up_proj.out_features
        if width != model.ff_width:  # model.match=params
            self.console.say(
                f"note: d_ff is {width} instead of {model.ff_width}: as many weights as standard attention would give"
            )
        if model.mha_type is AttentionType.selective and not model.rope:
            self.console.say("note: without RoPE, selective attention's per-query keys are the same for all keys and cancel")

    def _show_end(self, exit_code: int) -> None:
        summary = self._summary()
        rows: dict[str, Any] = {"stopped": f"by a signal at step {self.step}"} if exit_code else {}
        if self.given_up:
            rows["stopped"] = f"at step {self.step}: others were better there"
        if self.best_val_loss is not None:
            rows["best validation loss"] = f"{self.best_val_loss:.4f} nats per character, at step {self.best_step}"
            rows["bigram baseline"] = f"{self.corpus.baselines['bigram']:.4f}"
        rows["training"] = f"{self.step:,} steps in {summary['train_seconds']:.1f} s, compilation and evaluation included"
        if summary["tokens_per_second"]:
            rows["speed"] = f"{summary['tokens_per_second']:,.0f} tokens/s"
        rows["figure"] = str(self.run_dir / "curves.png")
        here = Path.cwd()
        path = str(self.run_dir.relative_to(here) if self.run_dir.is_relative_to(here) else self.run_dir)
        where, resume = shlex.quote(path), f"resume={quoted(path)}"
        commands = {
            "write more text": f'chargpt sample run={where} prompt="HAMLET:"',
            "score another text": f"chargpt evaluate run={where} dataset.name=file dataset.filepath=TEXT",
        }
        if self.step < self.config.trainer.num_steps:
            commands = {"go on": command([resume])} | commands
        else:
            commands["train longer"] = command([resume, f"trainer.num_steps={2 * self.step}"])
        if self.wandb.sync_command:
            commands["send this offline run to Weights & Biases"] = self.wandb.sync_command
        self.console.show_end(rows, self.sample, commands)
