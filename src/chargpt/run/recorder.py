"""What a run leaves behind and what a person sees of it: metrics, samples, checkpoints, summary, figure, W&B."""

import contextlib
import json
import platform
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chargpt import checkpoint
from chargpt.compose import command, quoted
from chargpt.config import differences
from chargpt.files import write_durably
from chargpt.run.console import RunConsole
from chargpt.run.curves import draw_curves
from chargpt.run.directory import log_metrics, read_metrics, record_sizes, write_config
from chargpt.run.loop import Loop, Report
from chargpt.run.machine import device_name, package_versions
from chargpt.run.tracking import WandbRun


class Recorder:
    """Writes and shows what `loop` reports. A full disk is mentioned and does not end the run."""

    def __init__(self, loop: Loop, run_dir: Path, console: RunConsole):
        self.loop, self.run_dir, self.console = loop, run_dir, console
        self.config = loop.config
        self.versions = package_versions()
        self.decode_speed: float | None = None
        self.unsaved: str | None = None  # why the newest checkpoint is not on disk
        self.derived = self._derived()
        (run_dir / "checkpoints").mkdir(exist_ok=True)
        write_config(run_dir, self.config)
        self._show_start()
        self.wandb = WandbRun(self.config, self.derived, run_dir, console.say)

    def take(self, report: Report) -> None:
        """Record and show a report of the loop."""
        line = report.line
        if report.evaluated and report.sample:
            step = int(line["trainer/step"])
            with (
                self._disk_may_be_full(),
                open(self.path("samples.txt"), "a", encoding="utf-8") as f,
            ):
                f.write(f"=== step {step}\n{report.sample}\n\n")
            self.wandb.log_sample(step, report.sample)
        with self._disk_may_be_full():
            log_metrics(self.run_dir, line)
        self.wandb.log(line)
        self.console.show_step(line, self.loop.best_val_loss)
        if report.evaluated:
            self.console.show_evaluation(line, report.is_best, report.sample)
        for name in report.saves:
            self._save(name)

    def path(self, name: str) -> Path:
        return self.run_dir / name

    def checkpoint_path(self, name: str) -> Path:
        return self.run_dir / "checkpoints" / f"{name}.eqx"

    @contextlib.contextmanager
    def _disk_may_be_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            step, reason = self.loop.step, error.strerror
            self.console.say(f"step {step}: not recorded ({reason}); training continues")

    def _save(self, name: str) -> None:
        """Write checkpoints/NAME.eqx; if the disk refuses, say so and keep the one that is there."""
        path = self.checkpoint_path(name)
        try:
            if name == "last" and path.exists():
                checkpoint.keep_as(path, self.checkpoint_path("previous"))
            checkpoint.save(path, self.loop.state, self._header())
            self.unsaved = None
        except OSError as error:
            self.unsaved = error.strerror
            self.console.say(
                f"checkpoint not written ({error.strerror}); training continues, the last good one stays"
            )

    def _header(self) -> checkpoint.Header:
        loop = self.loop
        return checkpoint.Header(
            config=self.config,
            vocabulary=loop.corpus.tokenizer.vocabulary,
            corpus_sha256=loop.corpus.sha256,
            step=loop.step,
            seconds=loop.seconds(),
            best_val_loss=loop.best_val_loss,
            best_step=loop.best_step,
            versions=self.versions | {"devices": str(loop.devices)},
            record_sizes=record_sizes(self.run_dir),
        )

    # ---- the end

    def finish(self, exit_code: int, pruned: bool) -> None:
        """Write the summary and the figure, hand over to W&B, show the end."""
        if exit_code == 0:
            self.decode_speed = self.loop.decode_speed()
        self.write_summary()
        name, dataset = self.config.wandb.name, self.config.dataset.name.name
        title = f"{name}: {self.derived['num_params']:,} parameters, {dataset}"
        metrics = read_metrics(self.path("metrics.jsonl"))
        draw_curves(metrics, self.loop.corpus.baselines, title, self.path("curves.png"))
        self.wandb.finish(self.summary(), exit_code)
        self._show_end(exit_code, pruned)

    def fail(self) -> None:
        """Hand over to W&B what there is of a run that an error ended."""
        self.wandb.finish(self.summary(), exit_code=1)

    def write_summary(self) -> None:
        text = json.dumps(self.summary(), indent=2) + "\n"
        write_durably(self.path("summary.json"), text.encode())

    def summary(self) -> dict[str, Any]:
        loop = self.loop
        speed = loop.trained_tokens / loop.trained_seconds if loop.trained_seconds else None
        return {
            "best/val_loss": loop.best_val_loss,
            "best/step": loop.best_step,
            "final/val_loss": loop.final_val_loss,
            "final/step": loop.step,
            "tokens_per_second": speed,
            "decode_tokens_per_second": self.decode_speed,
            "peak_memory_bytes": loop.memory_bytes,
            "compile_seconds": loop.compile_seconds,
            "compile_cached": loop.compile_cached,  # read in those seconds, not compiled
            "train_seconds": loop.seconds(),
            **self.derived,
        }

    def _derived(self) -> dict[str, Any]:
        """What follows from the configuration and is worth comparing runs by."""
        loop = self.loop
        return {
            "mha_type": self.config.model.mha_type.name,
            "num_params": sum(loop.parameters.values()),
            "kv_cache_bytes_per_token": loop.cache_bytes,
            "flops_per_token": loop.flops_per_token,
            "device": device_name(),
            "num_devices": len(loop.devices),
            "dataset": self.config.dataset.name.name,
            "corpus_sha256": loop.corpus.sha256,
            "versions": {"python": platform.python_version(), **self.versions},
        }

    # ---- what a person sees

    def _show_start(self) -> None:
        loop, model, corpus = self.loop, self.config.model, self.loop.corpus
        seq_len, baselines = self.config.dataset.seq_len, corpus.baselines
        changed = [f"{name}={value}" for name, value in differences(self.config).items()]
        facts = {
            "attention": f"{model.mha_type.name} ({'rope' if model.rope else 'no rope'})",
            "options": " ".join(changed) or "all defaults",
            "device": f"{device_name()}, batch shared by {len(loop.devices)}, "
            f"{self.config.trainer.precision.name}, "
            f"{loop.peak_flops / 1e9:,.0f} GFLOP/s in matrix products",
            "corpus": f"{corpus.name}: {len(corpus.train):,} characters to train on, "
            f"{len(corpus.val):,} to validate, {len(corpus.tokenizer)} symbols",
            "baselines": f"ln V {baselines['uniform']:.3f}, unigram {baselines['unigram']:.3f}, "
            f"bigram {baselines['bigram']:.3f} nats per character",
            "KV cache": f"{loop.cache_bytes:,} bytes per token, "
            f"{loop.cache_bytes * seq_len:,} at {seq_len} tokens",
            "writes to": str(self.run_dir),
        }
        self.console.show_start(facts, loop.parameters)
        blocks = loop.state.model.stacked
        width, usual = blocks.feed_forward.up_proj.out_features, model.ff_width
        if width != usual:  # model.match=params
            self.console.say(
                f"note: d_ff is {width} instead of {usual}: as many weights as standard attention would give"
            )
        if (remark := blocks.attention.remark()) is not None:
            self.console.say(f"note: {remark}")

    def say_compiled(self) -> None:
        how = "read the compiled" if self.loop.compile_cached else "compiled the"
        self.console.say(f"{how} training step in {self.loop.compile_seconds:.1f} s\n")

    def _show_end(self, exit_code: int, pruned: bool) -> None:
        loop, summary = self.loop, self.summary()
        rows: dict[str, Any] = {}
        if exit_code:
            rows["stopped"] = f"by a signal at step {loop.step}"
        elif pruned:
            rows["stopped"] = f"at step {loop.step}: others were better there"
        if loop.best_val_loss is not None:
            best = f"{loop.best_val_loss:.4f} nats per character, at step {loop.best_step}"
            rows["best validation loss"] = best
            rows["bigram baseline"] = f"{loop.corpus.baselines['bigram']:.4f}"
        seconds = f"{summary['train_seconds']:.1f} s, compilation and evaluation included"
        rows["training"] = f"{loop.step:,} steps in {seconds}"
        if summary["tokens_per_second"]:
            rows["speed"] = f"{summary['tokens_per_second']:,.0f} tokens/s"
        rows["figure"] = str(self.path("curves.png"))
        if self.wandb.url:
            rows["W&B"] = self.wandb.url
        here = Path.cwd()
        inside = self.run_dir.is_relative_to(here)
        path = str(self.run_dir.relative_to(here) if inside else self.run_dir)
        where, resume = shlex.quote(path), f"resume={quoted(path)}"
        commands = {
            "write more text": f'chargpt sample run={where} prompt="HAMLET:"',
            "score another text": f"chargpt evaluate run={where} dataset.name=file dataset.filepath=TEXT",
        }
        if loop.step < self.config.trainer.num_steps:
            commands = {"continue": command([resume])} | commands
        else:
            longer = f"trainer.num_steps={2 * loop.step}"
            commands["train longer"] = command([resume, longer])
        if self.wandb.sync_command:
            commands["send this offline run to Weights & Biases"] = self.wandb.sync_command
        self.console.show_end(rows, loop.sample, commands)
