"""Sweeps that finish: the folder follows from the command, so the same command continues them.

A job that is done is skipped, one that was interrupted resumes from its checkpoint, one that failed
is tried again, and neither stops the others. This holds for every Hydra launcher, because it is the
job that looks.
"""

import contextlib
import dataclasses
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict

from chargpt.compose import command, jobs, launched, parse, quoted, task_overrides
from chargpt.config import Config
from chargpt.errors import ConfigError, RunFailed, fail, require
from chargpt.run.directory import natural, read_run, runs_under
from chargpt.run.process import lock
from chargpt.study import workers

FAILED = "failed.txt"  # in a job's directory: why it ended, and the command that runs only this job
started: list[Path] = []  # the folder of the sweep that this process started
stopped: list[int] = []  # the signal that ends it

Train = Callable[[Config, Path], float]
Resume = Callable[[Path, Sequence[str]], float]


class SweepCallback(Callback):
    """Checks the jobs of a sweep before it starts, and fixes its folder for all of them."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        folder = str(config.hydra.sweep.dir)
        with open_dict(config):
            config.hydra.sweep.dir = folder
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted(folder)}")
        side_by_side = workers.launches_workers(config.hydra)
        try:
            alone = launched() is None and config.distributed.coordinator is None
            choice = "write launcher=slurm hydra.launcher.tasks_per_node=N, outside of srun"
            require(alone, f"--multirun: starts in one process, which starts others; {choice}")
            if side_by_side:
                workers.check(config.hydra.launcher)
            if gathers(config.hydra):
                check_members(config.hydra.launcher.members)
            check_jobs(config, begun=any(Path(folder).glob("*/config.yaml")))
        except ConfigError as error:
            sys.exit(fail(error))
        started.append(Path(folder))
        if side_by_side:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, stop_workers)


def check_jobs(sweep: DictConfig, begun: bool) -> None:
    """ConfigError if the configuration of any job breaks a rule.

    Jobs of a sweep that has begun need not begin from another model any more.
    """
    from chargpt import origin  # imports JAX

    for number, (overrides, settings) in enumerate(jobs(sweep)):
        try:
            config = parse(settings)
            if config.init_from is not None and not begun:
                origin.check(config)
        except ConfigError as error:
            raise ConfigError(f"job {number} ({overrides}): {error}") from None


def stop_workers(number: int, _frame: object) -> None:
    """Let the jobs of this sweep save and end; the second time, end at once."""
    if stopped:
        raise KeyboardInterrupt
    stopped.append(number)
    print("stopping: the jobs save and end; a second Ctrl-C ends at once", flush=True)
    workers.stop_all(started[-1])


def runners() -> tuple[Train, Resume]:
    """How the jobs of this process's sweep are trained and resumed."""
    os.environ.pop("WANDB_RUN_ID", None)  # one W&B run for each job
    if (worker := workers.worker()) is not None:
        return worker.train, worker.resume
    from chargpt.run.start import resume, train

    return train, resume


def run_job(settings: Config, run_dir: Path, train: Train, resume: Resume) -> float:
    """Skip, resume or train a job; its best validation loss, infinity if it failed."""
    shared = launched() is not None  # by processes on a cluster, which train() lets decide together
    if not shared:
        hold(run_dir).close()
    (run_dir / FAILED).unlink(missing_ok=True)
    try:
        if shared or not (run_dir / "config.yaml").exists():
            return train(settings, run_dir)
        loss = done_before(settings, run_dir)
        return resume(run_dir, []) if loss is None else loss
    except SystemExit:
        if workers.worker() is None:
            raise
        return math.inf  # its worker is stopped; the others save before the sweep ends
    except Exception as error:  # whatever it was, the other jobs run
        return failed(error, run_dir, first_command(settings, run_dir))


def done_before(settings: Config, run_dir: Path) -> float | None:
    """The loss of a job that is done; ConfigError if the run in its directory is another."""
    record = read_run(run_dir)
    is_same = dataclasses.replace(record.config, mode=settings.mode) == settings.alone()
    problem = "holds a run of another configuration; write another hydra.sweep.dir=DIR"
    require(is_same, f"{run_dir}: {problem}")
    if not record.finished:
        return None
    print(f"{run_dir}: done before, best validation loss {record.best_loss:.4f}", flush=True)
    return record.best_loss


def failed(error: Exception, run_dir: Path, first: str) -> float:
    """Say why a job failed, and leave it in its directory; infinity, its loss.

    `first` is the command that begins this job alone; one that has begun is resumed instead.
    """
    if isinstance(error, ConfigError | RunFailed):
        fail(error)
    else:
        traceback.print_exception(error)
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    begun = (run_dir / "config.yaml").exists()
    rerun = command([f"resume={quoted(str(run_dir))}"]) if begun else first
    (run_dir / FAILED).write_text(f"{reason}\n{rerun}\n", encoding="utf-8")
    return math.inf


# ---- launcher=vmap


def gathers(hydra: Any) -> bool:
    """Whether Hydra's configuration asks for populations: jobs train when all are known."""
    return "PopulationLauncher" in str(hydra.launcher["_target_"])


def check_members(members: Any) -> None:
    """ConfigError if this is not a number of members."""
    rule = "must be a whole number, at least 1; leave it out for as many as fit in memory"
    known = members is None or (type(members) is int and members >= 1)
    require(known, f"hydra.launcher.members={members}: {rule}")


def gather(settings: Config, run_dir: Path) -> Any:
    """What a job would train; infinity if it has failed already."""
    from chargpt.run.population import Job

    held = hold(run_dir)  # until the job has ended: the same command may be typed twice
    first = first_command(settings, run_dir)
    (run_dir / FAILED).unlink(missing_ok=True)
    try:
        begun = (run_dir / "config.yaml").exists()
        loss = done_before(settings, run_dir) if begun else None
    except Exception as error:
        held.close()
        return failed(error, run_dir, first)
    if loss is not None:
        held.close()
    return Job(settings, run_dir, loss, held, first_command=first)


def train_gathered(jobs: Sequence[Any], members: int | None) -> list[float]:
    """Train what `gather` found; the best validation loss of each, infinity if it failed."""
    from chargpt.run.population import Job, train_jobs

    os.environ.pop("WANDB_RUN_ID", None)  # one W&B run for each job
    pending = [job for job in jobs if isinstance(job, Job)]
    losses: dict[int, Any] = {id(job): job.loss for job in pending}
    for job, outcome in train_jobs(pending, members):
        if isinstance(outcome, Exception):
            losses[id(job)] = failed(outcome, job.run_dir, job.first_command)
        else:
            losses[id(job)] = outcome
    return [losses.get(id(job), job) for job in jobs]


# ---- jobs and their processes


def hold(run_dir: Path) -> contextlib.ExitStack:
    """The lock on `run_dir`, once no other process trains in it: it may be finishing this job."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock(run_dir))
        except ConfigError:
            print(f"{run_dir}: another process trains in it: waiting", flush=True)
            held.enter_context(lock(run_dir, wait=True))
        return held.pop_all()


def first_command(settings: Config, run_dir: Path) -> str:
    """The command that begins this one job, as the sweep itself would."""
    return command(workers.alone(settings, run_dir, task_overrides()))


def under_way() -> bool:
    """Whether this process started a sweep that is not reported yet."""
    return bool(started)


def report() -> int:
    """Print and write the results of this process's sweep, and how to continue; the exit code."""
    if not under_way():
        return 0
    from chargpt.study.compare import CompareOptions, compare

    folder = started.pop()
    made = (path.parent for path in folder.glob("*/.hydra"))  # by Hydra, for every job
    runs = sorted(made, key=lambda run: natural(run.name))
    undone = [run for run in runs if not (runs_under(run) and read_run(run).finished)]
    try:
        compare(CompareOptions(paths=(str(folder),), title=f"Sweep: {folder.name}"), ranked=True)
    except ConfigError as error:
        print(error)
    for run in undone:
        if (run / FAILED).exists():
            reason, _, rerun = (run / FAILED).read_text(encoding="utf-8").partition("\n")
            print(f"failed: {run}: {reason}\n  rerun: {rerun.strip()}")
        else:
            print(f"not finished: {run}")
    if undone:
        problem = f"{len(undone)} of {len(runs)} jobs are not done"
        print(f"{problem}; the same command continues them:\n  {command(sys.argv[1:])}")
    return 128 + stopped[0] if stopped else int(bool(undone))
