"""The real programs in their own processes, and what they leave behind."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT

from chargpt import checkpoint

DEBUG = ["experiment=debug", "mode=disabled"]
LONG = [
    *DEBUG,
    "trainer.num_steps=100000",
    "trainer.log_every=20",
    "trainer.eval_every=40",
    "trainer.checkpoint_every=20",
]


def start(
    *arguments: str | Path, cwd: Path = ROOT, module: bool = False, **environment: str
) -> subprocess.Popen[str]:
    program = ["-m", "chargpt"] if module else [str(ROOT / "main.py")]
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "100", "JAX_NUM_CPU_DEVICES": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments: str | Path, code: int = 0, **options: object) -> tuple[str, str]:
    """(standard output, standard error) of a program that must end with `code`."""
    process = start(*arguments, **options)  # type: ignore[arg-type]
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, (
        f"exit code {process.returncode}\n{out[-3000:]}\n{err[-3000:]}"
    )
    return out, err


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_clock(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    clock = ("trainer/seconds", "throughput/tokens_per_second", "throughput/mfu")
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


def leaves_of(run_dir: Path) -> bytes:
    """The bytes of the last checkpoint's leaves, after its header line."""
    return bytes(checkpoint.read_header(run_dir / "checkpoints" / "last.eqx")[2])


def assert_same_run(one: Path, other: Path) -> None:
    assert leaves_of(one) == leaves_of(other)
    assert without_clock(metrics(one)) == without_clock(metrics(other))
    assert (one / "samples.txt").read_text() == (other / "samples.txt").read_text()


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    """Wait until the run has logged `step`."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        path = run_dir / "metrics.jsonl"
        if path.exists() and f'"trainer/step": {step},' in path.read_text():
            return
        assert process.poll() is None, "".join(process.communicate())
        time.sleep(0.01)
    raise AssertionError(f"the run did not reach step {step}")
