"""What a run leaves behind, and what a person sees of it."""

import json
import shlex
from pathlib import Path
from typing import Any

from chargpt import checkpoint
from chargpt.compose import command, quoted
from chargpt.config import differences, spell
from chargpt.files import write_durably
from chargpt.run.console import RunConsole
from chargpt.run.curves import NAMES, draw_curves
from chargpt.run.directory import log_metrics, read_metrics, record_sizes, write_config
from chargpt.run.loop import Loop, NotFinite, Report
from chargpt.run.machine import device_name, numerics, versions
from chargpt.run.tracking import WandbRun


class Follower:
    """In a process that writes nothing: its part of what the recorder's needs all processes for."""

    def __init__(self, loop: Loop):
        self.loop = loop
        self.unsaved: str | None = None  # why the newest checkpoint is not on disk

    def take(self, report: Report) -> None:
        for _ in report.saves:
            checkpoint.dump(self.loop.state, None)

    def say_compiled(self) -> None:
        pass

    def finish(self, exit_code: int, stopped: str | None) -> None:
        if exit_code == 0:
            self.loop.decode_speed()

    def fail(self, error: BaseException) -> None:
        pass


class Recorder(Follower):
    """Writes and shows what `loop` reports. A full disk is reported and does not end the run."""

    def __init__(self, loop: Loop, run_dir: Path, console: RunConsole):
        super().__init__(loop)
        self.run_dir, self.console = run_dir, console
        self.config = loop.config
        self.decode_speed: float | None = None
        # What follows from the configuration and is worth comparing runs by.
        self.derived: dict[str, Any] = {
            "mha_type": self.config.model.mha_type.name,
            "num_params": sum(loop.parameters.values()),
            "kv_cache_bytes_per_token": loop.cache_bytes,
            "flops_per_token": loop.flops_per_token,
            "device": device_name(),
            "num_devices": len(loop.devices),
            "dataset": self.config.dataset.name.name,
            "corpus_sha256": loop.corpus.sha256,
            "versions": versions(),
        }
        (run_dir / "checkpoints").mkdir(exist_ok=True)
        write_config(run_dir, self.config)
        self._show_start()
        self.wandb = WandbRun(self.config, self.derived, run_dir, console.say)

    def take(self, report: Report) -> None:
        """Record and show a report of the loop."""
        line, sample = report.line, report.sample
        step = int(line["trainer/step"])
        try:
            log_metrics(self.run_dir, line)
            if sample:
                with open(self.run_dir / "samples.txt", "a", encoding="utf-8") as file:
                    file.write(f"=== step {step}\n{sample}\n\n")
        except OSError as error:
            self.console.say(f"step {step}: not recorded ({error.strerror}); training continues")
        if sample:
            self.wandb.log_sample(step, sample)
        self.wandb.log(line)
        self.console.show_step(line, self.loop.best_val_loss)
        if report.evaluated:
            self.console.show_evaluation(line, report.is_best, sample)
        for name in report.saves:
            self._save(name)

    def checkpoint_path(self, name: str) -> Path:
        return self.run_dir / "checkpoints" / f"{name}.eqx"

    def _save(self, name: str) -> None:
        """Write checkpoints/NAME.eqx; if the disk refuses, say so and keep the old one."""
        path = self.checkpoint_path(name)
        data = checkpoint.dump(self.loop.state, self._header())
        try:
            if name == "last" and path.exists():
                checkpoint.keep_as(path, self.checkpoint_path("previous"))
            checkpoint.write(path, data)
            self.unsaved = None
        except OSError as error:
            self.unsaved = error.strerror
            problem = f"checkpoint not written ({error.strerror})"
            self.console.say(f"{problem}; training continues, the last good one stays")

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
            versions=numerics(loop.devices, loop.dtype),
            record_sizes=record_sizes(self.run_dir),
        )

    # ---- the end

    def finish(self, exit_code: int, stopped: str | None) -> None:
        """Write the summary and the figure, hand over to W&B, show the end."""
        if exit_code == 0:
            self.decode_speed = self.loop.decode_speed()
        summary, config = self.write_summary(), self.config
        parameters = f"{self.derived['num_params']:,} parameters"
        title = f"{config.wandb.name}: {parameters}, {config.dataset.name.name}"
        metrics, figure = read_metrics(self.run_dir / "metrics.jsonl"), self.run_dir / "curves.png"
        draw_curves(metrics, self.loop.corpus.baselines, title, figure)
        self.wandb.finish(summary, exit_code)
        self._show_end(summary, stopped)

    def fail(self, error: BaseException) -> None:
        """Hand over to W&B what there is of a run that an error ended."""
        summary = self.write_summary() if isinstance(error, NotFinite) else self.summary()
        self.wandb.finish(summary, exit_code=1)

    def write_summary(self) -> dict[str, Any]:
        summary = self.summary()
        text = json.dumps(summary, indent=2) + "\n"
        write_durably(self.run_dir / "summary.json", text.encode())
        return summary

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
            "compile_cached": loop.compile_cached,  # read from the cache in those seconds
            "train_seconds": loop.seconds(),
            **self.derived,
        }

    # ---- what a person sees

    def _show_start(self) -> None:
        loop, model, corpus = self.loop, self.config.model, self.loop.corpus
        changed = [f"{name}={spell(value)}" for name, value in differences(self.config).items()]
        shared = f"batch shared by {loop.devices.shares} {loop.devices.reason}".rstrip()
        shared += f", layers by {loop.devices.tensor}" if loop.devices.tensor > 1 else ""
        shared += ", the state too" if loop.devices.fsdp else ""
        shared += f", {loop.dtype.name}"
        splits = f"{len(corpus.train):,} characters to train on, {len(corpus.val):,} to validate"
        losses = [f"{NAMES[name]} {loss:.3f}" for name, loss in corpus.baselines.items()]
        peak = f"{loop.peak_flops / 1e9:,.0f} GFLOP/s"
        size, seq_len = loop.cache_bytes, self.config.dataset.seq_len
        facts = {
            "attention": f"{model.mha_type.name} ({'rope' if model.rope else 'no rope'})",
            "options": " ".join(changed) or "all defaults",
            "device": f"{self.derived['device']}, {shared}, {peak} in matrix products",
            "corpus": f"{corpus.name}: {splits}, {len(corpus.tokenizer)} symbols",
            "baselines": f"{', '.join(losses)} nats per character",
            "KV cache": f"{size:,} bytes per token, {size * seq_len:,} at {seq_len} tokens",
            "writes to": str(self.run_dir),
        }
        self.console.show_start(facts, loop.parameters)
        blocks = loop.state.model.stacked
        width, usual = blocks.feed_forward.up_proj.out_features, model.ff_width
        if width != usual:  # model.match=params
            why = "as many weights as standard attention would give"
            self.console.say(f"note: d_ff is {width} instead of {usual}: {why}")
        if (remark := blocks.attention.remark()) is not None:
            self.console.say(f"note: {remark}")

    def say_compiled(self) -> None:
        how = "read the compiled" if self.loop.compile_cached else "compiled the"
        by = f"attention by {self.loop.kernel}"
        self.console.say(f"{how} training step in {self.loop.compile_seconds:.1f} s; {by}\n")

    def _show_end(self, summary: dict[str, Any], stopped: str | None) -> None:
        loop, best, speed = self.loop, summary["best/val_loss"], summary["tokens_per_second"]
        at_best = f"nats per character, at step {loop.best_step}"
        seconds = f"{summary['train_seconds']:.1f} s, compilation and evaluation included"
        facts = {
            "stopped": stopped,
            "best validation loss": None if best is None else f"{best:.4f} {at_best}",
            "bigram baseline": f"{loop.corpus.baselines['bigram']:.4f}",
            "training": f"{loop.step:,} steps in {seconds}",
            "speed": None if speed is None else f"{speed:,.0f} tokens/s",
            "figure": str(self.run_dir / "curves.png"),
            "W&B": self.wandb.url,
        }
        path = str(self.run_dir).removeprefix(f"{Path.cwd()}/")
        run, text = f"run={shlex.quote(path)}", "dataset.name=file dataset.filepath=TEXT"
        resume, longer = f"resume={quoted(path)}", f"trainer.num_steps={2 * loop.step}"
        finished = loop.step >= self.config.trainer.num_steps
        commands = {
            "continue": None if finished else command([resume]),
            "write more text": f'chargpt sample {run} prompt="HAMLET:"',
            "score another text": f"chargpt evaluate {run} {text}",
            "train longer": command([resume, longer]) if finished else None,
            "send this offline run to Weights & Biases": self.wandb.sync_command,
        }
        self.console.show_end(facts, loop.sample, commands)
