"""What a run leaves behind, and what a person sees of it."""

import json
import shlex
from pathlib import Path
from typing import Any

from chargpt import checkpoint
from chargpt.compose import command, quoted
from chargpt.config import differences, spelled
from chargpt.files import write_durably
from chargpt.model import feed_forward_width
from chargpt.run.console import RunConsole
from chargpt.run.curves import NAMES, draw_curves
from chargpt.run.directory import log_metrics, read_metrics, record_sizes, write_config
from chargpt.run.loop import NotFinite, Report, Run
from chargpt.run.machine import device_name, numerics, versions
from chargpt.run.tracking import WandbRun


class Follower:
    """In a process that writes nothing: its part of what the recorder's needs all processes for."""

    def __init__(self, run: Run):
        self.run = run
        self.unsaved: str | None = None  # why the newest checkpoint is not on disk

    def take(self, report: Report) -> None:
        for _ in report.saves:
            self._dump(None)

    def _dump(self, header: checkpoint.Header | None) -> memoryview:
        """The file of a checkpoint, which all processes must ask for."""
        assert self.run.state is not None
        return checkpoint.dump(self.run.state, header)

    def say_compiled(self) -> None:
        pass

    def finish(self, exit_code: int, stopped: str | None) -> None:
        pass

    def fail(self, error: BaseException) -> None:
        pass


class Recorder(Follower):
    """Writes and shows what is reported of `run`. A full disk is reported and does not end it."""

    def __init__(self, run: Run, run_dir: Path, console: RunConsole):
        super().__init__(run)
        self.run_dir, self.console = run_dir, console
        self.config, self.program = run.config, run.program
        # What follows from the configuration and is worth comparing runs by.
        self.derived: dict[str, Any] = {
            "mha_type": self.config.model.mha_type.name,
            "num_params": sum(self.program.parameters.values()),
            "kv_cache_bytes_per_token": round(
                self.program.cache_bytes / self.config.dataset.seq_len
            ),
            "flops_per_token": self.program.flops_per_token,
            "device": device_name(),
            "num_devices": len(self.program.devices),
            "population": self.program.members or 1,  # runs that the program has room for
            "dataset": self.config.dataset.name.name,
            "corpus_sha256": run.corpus.sha256,
            "versions": versions(),
        }
        if self.program.active_parameters < self.derived["num_params"]:
            self.derived["num_active_params"] = self.program.active_parameters
        if run.ended:  # and was killed before its summary
            lines = read_metrics(run_dir / "metrics.jsonl")
            run.final_val_loss = lines[-1].get("val/loss") if lines else None
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
        self.console.show_step(line, self.run.best_val_loss)
        if report.evaluated:
            self.console.show_evaluation(line, report.is_best, sample)
        for name in report.saves:
            self._save(name)

    def _save(self, name: str) -> None:
        """Write checkpoints/NAME.eqx; if the disk refuses, say so and keep the old one."""
        path = checkpoint.file_of(self.run_dir, name)
        data = self._dump(self._header())
        try:
            if name == "last" and path.exists():
                checkpoint.keep_as(path, checkpoint.file_of(self.run_dir, "previous"))
            checkpoint.write(path, data)
            self.unsaved = None
        except OSError as error:
            self.unsaved = error.strerror
            problem = f"checkpoint not written ({error.strerror})"
            self.console.say(f"{problem}; training continues, the last good one stays")

    def _header(self) -> checkpoint.Header:
        run = self.run
        return checkpoint.Header(
            config=self.config,
            vocabulary=run.corpus.tokenizer.vocabulary,
            corpus_sha256=run.corpus.sha256,
            step=run.step,
            seconds=run.seconds(),
            best_val_loss=run.best_val_loss,
            best_step=run.best_step,
            versions=numerics(run.program.devices, run.program.dtype),
            record_sizes=record_sizes(self.run_dir),
        )

    # ---- the end

    def finish(self, exit_code: int, stopped: str | None) -> None:
        """Write the summary and the figure, hand over to W&B, show the end."""
        summary, config = self.write_summary(), self.config
        parameters = f"{self.derived['num_params']:,} parameters"
        title = f"{config.wandb.name}: {parameters}, {config.dataset.name.name}"
        metrics, figure = read_metrics(self.run_dir / "metrics.jsonl"), self.run_dir / "curves.png"
        draw_curves(metrics, self.run.corpus.baselines, title, figure)
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
        run, program = self.run, self.program
        speed = run.trained_tokens / run.trained_seconds if run.trained_seconds else None
        return {
            "best/val_loss": run.best_val_loss,
            "best/step": run.best_step,
            "final/val_loss": run.final_val_loss,
            "final/step": run.step,
            "tokens_per_second": speed,
            "decode_tokens_per_second": run.decode_speed,
            "peak_memory_bytes": program.memory_bytes,
            "compile_seconds": program.compile_seconds,
            "compile_cached": program.compile_cached,  # read from the cache in those seconds
            "train_seconds": run.seconds(),
            **self.derived,
        }

    # ---- what a person sees

    def _show_start(self) -> None:
        program, model, corpus = self.program, self.config.model, self.run.corpus
        changed = spelled(differences(self.config))
        apart = program.devices.apart
        shared = f"room for {program.members} members" if program.members else ""
        shared += f" on {apart} groups of devices, " if apart > 1 else ", " if shared else ""
        shared += f"batch shared by {program.devices.shares} {program.devices.reason}".rstrip()
        shared += f", layers by {program.devices.tensor}" if program.devices.tensor > 1 else ""
        shared += ", the state too" if program.devices.fsdp else ""
        shared += f", {program.dtype.name}"
        splits = f"{len(corpus.train):,} characters to train on, {len(corpus.val):,} to validate"
        losses = [f"{NAMES[name]} {loss:.3f}" for name, loss in corpus.baselines.items()]
        peak = f"{program.peak_flops / 1e9:,.0f} GFLOP/s"
        size, seq_len = program.cache_bytes, self.config.dataset.seq_len
        facts = {
            "attention": f"{model.mha_type.name} ({model.positions_name})",
            "options": " ".join(changed) or "all defaults",
            "device": f"{self.derived['device']}, {shared}, {peak} in matrix products",
            "corpus": f"{corpus.name}: {splits}, {len(corpus.tokenizer)} symbols",
            "baselines": f"{', '.join(losses)} nats per character",
            "KV cache": f"{size / seq_len:,.0f} bytes per token, {size:,} at {seq_len} tokens",
            "writes to": str(self.run_dir),
        }
        notes, blocks = [], program.shapes.model.stacked
        width, usual = feed_forward_width(model), model.ff_width
        if width != usual:  # model.match=params
            why = "as many weights as standard attention would give"
            notes.append(f"d_ff is {width} instead of {usual}: {why}")
        if "num_active_params" in self.derived:
            experts = f"{model.experts_per_token} of {model.num_experts} experts"
            experts += f" and {model.shared_experts} shared" if model.shared_experts else ""
            active = f"{self.derived['num_active_params']:,} parameters"
            notes.append(f"each token uses {experts}: {active}")
        if (remark := blocks.attention.remark()) is not None:
            notes.append(remark)
        self.console.show_start(facts, program.parameters, notes)

    def say_compiled(self) -> None:
        if not self.program.compiled:  # nothing is left to train
            return
        how = "read the compiled" if self.program.compile_cached else "compiled the"
        by = f"attention by {self.program.kernel}"
        self.console.say(f"{how} training step in {self.program.compile_seconds:.1f} s; {by}\n")

    def _show_end(self, summary: dict[str, Any], stopped: str | None) -> None:
        run, best, speed = self.run, summary["best/val_loss"], summary["tokens_per_second"]
        early = run.ended and run.step < self.config.trainer.num_steps
        if early and stopped is None:
            evaluations = f"{self.config.trainer.patience} evaluations"
            stopped = f"at step {run.step}: no new best in {evaluations}"
        at_best = f"nats per character, at step {run.best_step}"
        seconds = f"{summary['train_seconds']:.1f} s, compilation and evaluation included"
        facts = {
            "stopped": stopped,
            "best validation loss": None if best is None else f"{best:.4f} {at_best}",
            "bigram baseline": f"{run.corpus.baselines['bigram']:.4f}",
            "training": f"{run.step:,} steps in {seconds}",
            "speed": None if speed is None else f"{speed:,.0f} tokens/s",
            "figure": str(self.run_dir / "curves.png"),
            "W&B": self.wandb.url,
        }
        path = str(self.run_dir).removeprefix(f"{Path.cwd()}/")
        this, text = f"run={shlex.quote(path)}", "dataset.name=file dataset.filepath=TEXT"
        resume, longer = f"resume={quoted(path)}", f"trainer.num_steps={2 * run.step}"
        if early:
            longer = "trainer.patience=null"
        commands = {
            "continue": None if run.ended else command([resume]),
            "write more text": f'chargpt sample {this} prompt="HAMLET:"',
            "score another text": f"chargpt evaluate {this} {text}",
            "train longer": command([resume, longer]) if run.ended else None,
            "send this offline run to Weights & Biases": self.wandb.sync_command,
        }
        self.console.show_end(facts, run.sample, commands)
