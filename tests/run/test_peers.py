"""Several real processes that train one model: they agree, one writes, they end and continue alike.

SLURM's variables are set as srun sets them; there is no cluster here, only the loopback interface.
"""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import make_config
from programs import DEBUG, assert_same_run, metrics, start, wait_for_step

from chargpt import checkpoint
from chargpt.run.directory import read_config
from chargpt.run.peers import CONTINUE
from chargpt.run.start import train

LAYOUT = ["parallel.fsdp=true", "model.dropout=0.1", "trainer.num_steps=160"]
LAYOUT += ["trainer.log_every=20", "trainer.eval_every=80", "trainer.checkpoint_every=20"]
SHORT = ["distributed.initialization_timeout=60", "distributed.heartbeat_timeout=30"]
Processes = list["subprocess.Popen[str]"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def by_srun(*arguments: str | Path, tasks: int = 2, **environment: str) -> Processes:
    """The tasks of one job step."""
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": str(tasks)}
    step |= {"SLURM_STEP_NUM_TASKS": str(tasks), "JAX_COORDINATOR_PORT": str(free_port())}
    return [
        start(*arguments, SLURM_PROCID=str(task), SLURM_LOCALID=str(task), **step, **environment)
        for task in range(tasks)
    ]


def by_hand(number: int, *arguments: str | Path, port: int) -> "subprocess.Popen[str]":
    where = [f"distributed.coordinator=127.0.0.1:{port}", "distributed.num_processes=2"]
    return start(*arguments, *where, f"distributed.process_id={number}")


def end(processes: Processes, seconds: float = 200) -> list[tuple[int, str, str]]:
    """(exit code, standard output, standard error) of each."""
    deadline = time.monotonic() + seconds
    try:
        texts = [process.communicate(timeout=deadline - time.monotonic()) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, and what was shown by each."""
    run_dir = tmp_path_factory.mktemp("peers") / "two"
    first, second = end(by_srun(*DEBUG, *LAYOUT, *SHORT, f"hydra.run.dir={run_dir}"))
    assert first[0] == second[0] == 0, first[2] + second[2]
    (run_dir / "shown").write_text(first[1])
    (run_dir / "shown-by-the-second").write_text(second[1])
    return run_dir


def test_two_processes_train_what_one_trains_with_two_devices(undisturbed: Path, tmp_path: Path):
    run_dir = tmp_path / "one"
    run_dir.mkdir()
    train(make_config(*DEBUG, *LAYOUT, "trainer.num_devices=2"), run_dir)
    for one, two in zip(metrics(run_dir), metrics(undisturbed), strict=True):
        assert one["trainer/step"] == two["trainer/step"]
        for name in one.keys() & {"train/loss", "train/grad_norm", "val/loss"}:
            assert one[name] == pytest.approx(two[name], rel=1e-4), one["trainer/step"]
    (alone, header), (shared, other) = (
        checkpoint.load(path / "checkpoints" / "last.eqx") for path in (run_dir, undisturbed)
    )
    np.testing.assert_allclose(alone.model.embedding, shared.model.embedding, atol=1e-3)
    assert header.versions["devices"] == "2 x cpu fsdp"
    assert other.versions["devices"] == "2 x cpu fsdp in 2 processes"


def test_one_process_writes_and_shows(undisturbed: Path):
    shown = (undisturbed / "shown").read_text()
    assert "batch shared by 2" in shown and "best validation loss" in shown
    # What XLA's collectives print cannot be silenced
    lines = (undisturbed / "shown-by-the-second").read_text().splitlines()
    assert [line for line in lines if not line.startswith("[Gloo]")] == []
    assert (undisturbed / ".hydra").is_dir() and (undisturbed / "curves.png").is_file()
    steps = [line["trainer/step"] for line in metrics(undisturbed)]
    assert steps == list(range(20, 161, 20))
    assert read_config(undisturbed / "config.yaml").distributed.num_processes is None


def test_killed_and_stopped_they_continue_by_the_same_command_and_end_the_same(
    undisturbed: Path, tmp_path: Path
):
    run_dir = tmp_path / "run"
    command = [*DEBUG, *LAYOUT, *SHORT, f"hydra.run.dir={run_dir}"]

    processes = by_srun(*command)
    wait_for_step(processes[0], run_dir, 40)
    processes[1].kill()
    (code, _, err), _ = end(processes, seconds=60)
    assert code == 1 and "another process may be gone" in err.splitlines()[-1]
    assert "Traceback" not in err
    saved = checkpoint.load(run_dir / "checkpoints" / "last.eqx")[1].step
    assert saved >= 20

    processes = by_srun(*command)
    wait_for_step(processes[0], run_dir, saved + 60)  # which the first two cannot have reached
    processes[1].send_signal(signal.SIGTERM)
    (code, out, err), (other_code, *_) = end(processes)
    assert code == other_code == 143, err
    assert f"resuming {run_dir} at step {saved}" in out and "stopped" in out

    assert [code for code, *_ in end(by_srun(*command))] == [0, 0]
    assert_same_run(undisturbed, run_dir)


def test_processes_that_would_train_something_else_are_refused_in_one_line_each(tmp_path: Path):
    port, folder = free_port(), f"hydra.run.dir={tmp_path / 'run'}"
    commands = [[*DEBUG, *SHORT, f"seed={seed}", folder] for seed in (1, 2)]
    processes = [by_hand(i, *command, port=port) for i, command in enumerate(commands)]
    for code, _, err in end(processes):
        assert code == 2
        assert err.splitlines()[-1] == (
            "error: seed: is 1 in process 0 and 2 in process 1; "
            "start all with the same command and files"
        )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_process_that_never_comes_is_waited_for_as_long_as_was_said(tmp_path: Path):
    where = f"hydra.run.dir={tmp_path / 'run'}", "distributed.initialization_timeout=3"
    port = free_port()
    ((code, _, err),) = end([by_hand(0, *DEBUG, *where, port=port)], seconds=60)
    assert code == 1
    assert err.splitlines()[-2:] == [
        f"waiting until 2 processes have met, at 127.0.0.1:{port}, for at most 3 s",
        f"error: 2 processes have not met, at 127.0.0.1:{port}, within 3 s; start all of them, "
        "or write a larger distributed.initialization_timeout",
    ]


STUCK = """
import sys, time
from chargpt.run.peers import Stalls
stalls = Stalls(factor=5.0)
stalls.least = 0.02
for _ in range(3):
    with stalls.watch("evaluation"):
        time.sleep(0.1)
with stalls.watch("report"):
    time.sleep(1)  # the first of its name may compile
print("stuck now", flush=True)
begin = time.monotonic()
with stalls.watch("evaluation"):
    time.sleep(60)
"""


def test_what_takes_much_longer_than_usual_ends_the_process_with_its_stack():
    """As if another process never came to an evaluation."""
    found = subprocess.run(
        [sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=50
    )
    assert (found.returncode, found.stdout) == (1, "stuck now\n")
    *stack, last = found.stderr.splitlines()
    assert 'File "<string>", line 14 in <module>' in "\n".join(stack)
    assert last.startswith("error: evaluation takes more than ")
    assert last.endswith(f" s, 5 times the usual; {CONTINUE}")


def test_a_sweep_is_not_started_by_several_processes(tmp_path: Path):
    arguments = ["--multirun", *DEBUG, "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    for code, out, err in end(by_srun(*arguments)):
        assert (code, out) == (2, "") and err.startswith("error: --multirun: starts in one process")
    assert not (tmp_path / "sweep").exists()
