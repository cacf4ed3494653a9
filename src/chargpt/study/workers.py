"""Jobs of a sweep side by side (launcher=joblib), each with GPUs or cores of its own.

joblib's workers stay small: a worker takes a place, and starts `chargpt train` once for every job.
A job that crashes its process takes no other with it, and its memory is free when it ends.
"""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from chargpt.compose import in_sweep, quoted, task_overrides
from chargpt.config import Config
from chargpt.errors import ConfigError, RunFailed, require
from chargpt.run.directory import read_run
from chargpt.run.process import lock

OUTPUT = "output.txt"  # in a job's directory: what it would have shown in a terminal of its own
PLACES = ".places"  # in a sweep's folder: which worker has which


def jobs_at_once() -> int:
    """How many jobs this machine runs side by side: one per GPU, or per core if it has no GPU."""
    import joblib  # an extra

    return len(gpus()) or joblib.cpu_count()


OmegaConf.register_new_resolver("jobs_at_once", jobs_at_once, replace=True)


def gpus() -> list[str]:
    """The NVIDIA GPUs that a job may use, as CUDA_VISIBLE_DEVICES has them."""
    if os.environ.get("JAX_PLATFORMS", "cuda") == "cpu":
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name and not name.startswith("-")]
    try:
        command = ["nvidia-smi", "--list-gpus"]
        listed = subprocess.check_output(command, stderr=subprocess.DEVNULL, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(number) for number in range(listed.count(b"UUID:"))]


def share(things: Sequence[Any], place: int, places: int) -> list[Any]:
    """Those of `things` that belong to one of several places; if too few, one that is shared."""
    return list(things[place::places]) or [things[place % len(things)]]


class Worker:
    """This process at its place among the workers of a sweep, for as long as it lives."""

    def __init__(self, folder: Path, places: int):
        self.launcher = os.getppid()
        self.job: subprocess.Popen[bytes] | None = None
        self.stopped: int | None = None  # the signal that ended the sweep
        self._held = contextlib.ExitStack()
        self.environment = self._take_place(folder / PLACES, places)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: self.stop(number))
        threading.Thread(target=self._watch_launcher, daemon=True).start()

    def _take_place(self, folder: Path, places: int) -> dict[str, str]:
        """Take a place that no other worker has; the environment variables of jobs there."""
        for place in range(places):
            path = folder / str(place)
            path.mkdir(parents=True, exist_ok=True)
            # If all are taken, by a killed sweep that is still saving, the last is shared.
            with contextlib.suppress(ConfigError):
                self._held.enter_context(lock(path))
                break
        (path / "process").write_text(str(os.getpid()))
        if found := gpus():
            variables = {"CUDA_VISIBLE_DEVICES": ",".join(share(found, place, places))}
            jobs_on_one = -(-places // len(found))
            if jobs_on_one > 1:
                variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / jobs_on_one:.2f}"
            return variables
        if hasattr(os, "sched_setaffinity"):  # not on macOS
            os.sched_setaffinity(0, share(sorted(os.sched_getaffinity(0)), place, places))
        return {}

    def _watch_launcher(self) -> None:
        """If the process that started the sweep is gone, end as on a signal."""
        while os.getppid() == self.launcher:
            time.sleep(0.5)
        self.stop(signal.SIGTERM)
        if self.job is not None:
            self.job.wait()
        os._exit(1)

    def stop(self, number: int) -> None:
        """Let the job save and end, and start no other."""
        self.stopped = number
        if self.job is not None and self.job.poll() is None:
            self.job.send_signal(signal.SIGTERM)

    def train(self, settings: Config, run_dir: Path) -> float:
        """`chargpt.run.start.train` in a process of its own."""
        return self._run("starts", run_dir, alone(settings, run_dir, task_overrides()))

    def resume(self, run_dir: Path, overrides: Sequence[str]) -> float:
        """`chargpt.run.start.resume` in a process of its own."""
        return self._run("continues", run_dir, [f"resume={quoted(str(run_dir))}", *overrides])

    def _run(self, how: str, run_dir: Path, arguments: Sequence[str]) -> float:
        path = run_dir / OUTPUT
        if self.stopped is None:
            print(f"{run_dir.name}: {how}", flush=True)
            program = [sys.executable, "-m", "chargpt", "train", *arguments]
            variables = os.environ | {"COLUMNS": "100", "PYTHONUNBUFFERED": "1"} | self.environment
            with open(path, "ab") as output:
                self.job = subprocess.Popen(
                    program, env=variables, stdout=output, stderr=subprocess.STDOUT
                )
            if self.stopped is not None:  # before there was a job to stop
                self.job.send_signal(signal.SIGTERM)
            code = self.job.wait()
        if self.stopped is not None:
            raise SystemExit(128 + self.stopped)
        if code < 0:
            killer = signal.Signals(-code).name
            raise RunFailed(f"its process was killed by {killer}; {path} has its output")
        if code:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
            raise RunFailed(lines[-1].removeprefix("error: ") or f"exit code {code}")
        loss = read_run(run_dir).best_loss
        print(f"{run_dir.name}: best validation loss {loss:.4f}", flush=True)
        return loss


@functools.cache
def worker() -> Worker | None:
    """This process among the workers of a sweep; None if jobs run one by one, or on a cluster."""
    if not in_sweep() or not launches_workers(HydraConfig.get()):
        return None
    hydra = HydraConfig.get()
    return Worker(Path(hydra.sweep.dir), int(hydra.launcher.n_jobs))


def launches_workers(hydra: Any) -> bool:
    """Whether Hydra's configuration asks for the joblib launcher."""
    return "joblib" in str(hydra.launcher["_target_"])


def check(launcher: Any) -> None:
    """ConfigError if the launcher is asked for what it cannot do."""
    problem = f"hydra.launcher.n_jobs={launcher.n_jobs}: must be at least 1"
    advice = "leave it out for one on each GPU, or on each core"
    require(launcher.n_jobs >= 1, f"{problem}; {advice}")


def alone(settings: Config, run_dir: Path, overrides: Sequence[str]) -> list[str]:
    """The arguments of main.py that train only this job of a sweep, in its place."""
    group = "null" if settings.wandb.group is None else quoted(settings.wandb.group)
    names = [f"wandb.name={quoted(settings.wandb.name)}", f"wandb.group={group}"]
    replaced = ("wandb.name=", "wandb.group=", "launcher=")
    own = [override for override in overrides if not override.startswith(replaced)]
    return [*own, *names, "hydra.mode=RUN", f"hydra.run.dir={quoted(str(run_dir))}"]


def stop_all(folder: Path) -> None:
    """Ask the workers of the sweep in `folder` to end."""
    for path in (folder / PLACES).glob("*/process"):
        with contextlib.suppress(ConfigError), lock(path.parent):
            continue  # nobody is there
        with contextlib.suppress(ValueError, ProcessLookupError):
            os.kill(int(path.read_text()), signal.SIGTERM)
