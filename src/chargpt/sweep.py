"""Sweeps that finish: a folder that follows from the command, jobs that go on where they stopped, a table at the end.

The same command continues a sweep: a job that is done is skipped, one that was interrupted resumes from its checkpoint, one
that failed is tried again, and neither stops the others. It holds for every Hydra launcher, because it is the job that looks.
"""

import dataclasses
import math
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict

from chargpt.cli import RunFailed, fail
from chargpt.config import Config, ConfigError, require
from chargpt.records import natural, read_run, runs_under

FAILED = "failed.txt"  # in a job's directory: why it ended
started: list[Path] = []  # the folder of the sweep that this process began


class SweepCallback(Callback):
    """Fixes the sweep's folder before Hydra composes its jobs, each of which would derive one of its own."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        folder = str(config.hydra.sweep.dir)
        with open_dict(config):
            config.hydra.sweep.dir = folder
            quoted = folder.replace("\\", "\\\\").replace("'", "\\'")
            config.hydra.overrides.hydra = [*config.hydra.overrides.hydra, f"hydra.sweep.dir='{quoted}'"]
        started.append(Path(folder))


def run_job(
    settings: Config, run_dir: Path, train: Callable[[Config, Path], float], resume: Callable[[Path, Sequence[str]], float]
) -> float:
    """One job of a sweep: skipped, resumed or trained; its best validation loss, infinity where it failed."""
    (run_dir / FAILED).unlink(missing_ok=True)
    try:
        if not (run_dir / "config.yaml").exists():
            return train(settings, run_dir)
        record = read_run(run_dir)
        require(
            dataclasses.replace(record.config, mode=settings.mode) == settings,
            f"{run_dir}: holds a run of another configuration; write another hydra.sweep.dir=DIR",
        )
        if record.finished:
            print(f"{run_dir}: done before, best validation loss {record.number('best/val_loss'):.4f}", flush=True)
            return record.number("best/val_loss") or math.inf
        return resume(run_dir, [])
    except Exception as error:  # whatever it was, the other jobs run
        if isinstance(error, ConfigError | RunFailed):
            fail(error)
        else:
            traceback.print_exc()
        reason = " ".join(f"{type(error).__name__}: {error}".split()) or type(error).__name__
        (run_dir / FAILED).write_text(f"{reason}\n", encoding="utf-8")
        return math.inf


def report() -> int:
    """What the sweep of this process came to: table, page, what failed and how to go on; the exit code."""
    if not started:
        return 0
    from chargpt import compare  # figures, and what they need

    folder = started.pop()
    command = f"python main.py {shlex.join(sys.argv[1:])}"
    failed = {run: (run / FAILED).read_text().strip() for run in job_folders(folder) if (run / FAILED).exists()}
    failed = {run: why for run, why in failed.items() if not (runs_under(run) and read_run(run).finished)}
    try:
        compare.compare(compare.CompareOptions(paths=(str(folder),), title=f"Sweep: {folder.name}"), ranked=True)
    except ConfigError as error:
        print(error)
    for run, why in failed.items():
        print(f"failed: {run}: {why}\n  rerun: {rerun_command(run)}")
    if failed:
        print(f"{len(failed)} of {len(job_folders(folder))} jobs failed; they are tried again by\n  {command}")
    return 1 if failed else 0


def job_folders(folder: Path) -> list[Path]:
    """Every job's directory that Hydra made, in order."""
    return sorted((path.parent for path in folder.glob("*/.hydra")), key=lambda path: natural(path.name))


def rerun_command(run: Path) -> str:
    """The job alone: resumed where it left a checkpoint, begun anew where not."""
    if list((run / "checkpoints").glob("*.eqx")):
        return f"python main.py resume={shlex.quote(str(run))}"
    overrides = yaml.safe_load((run / ".hydra" / "overrides.yaml").read_text())
    return f"python main.py {shlex.join([*overrides, 'hydra.mode=RUN', f'hydra.run.dir={run}'])}"
