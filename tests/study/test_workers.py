"""Jobs side by side: what each has to itself, and the command that runs only one of them."""

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import small_config
from fake_runs import make_run
from hypothesis import given
from hypothesis import strategies as st

from chargpt.compose import compose
from chargpt.config import Config
from chargpt.errors import ConfigError, RunFailed
from chargpt.run.process import lock
from chargpt.study import workers


@given(st.integers(1, 20), st.integers(1, 20))
def test_every_place_has_a_share_and_everything_is_shared_out(things: int, places: int) -> None:
    shares = [workers.share(range(things), place, places) for place in range(places)]
    assert all(shares)
    given_out = [thing for share in shares for thing in share]
    if places <= things:
        assert sorted(given_out) == list(range(things))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    else:
        counts = [given_out.count(thing) for thing in range(things)]
        assert max(counts) - min(counts) <= 1


def test_the_gpus_are_those_that_the_driver_lists_or_the_user_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    lines = ["GPU 0: H100 (UUID: GPU-1)", "GPU 1: H100 (UUID: GPU-2)"]
    tool.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert workers.gpus() == []
    monkeypatch.delenv("JAX_PLATFORMS")
    assert workers.gpus() == ["0", "1"] and workers.jobs_at_once() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,GPU-7")
    assert workers.gpus() == ["3", "5", "GPU-7"] and workers.jobs_at_once() == 3
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert workers.gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    assert workers.gpus() == []
    tool.unlink()
    assert workers.gpus() == [] and 1 <= workers.jobs_at_once() <= (os.cpu_count() or 1)


@pytest.mark.parametrize("name", ["mla kv_lora_rank=8", "it's", 'a "b" \\', "{x: [1]}, y"])
@pytest.mark.parametrize("group", ["a sweep", None])
def test_a_job_by_itself_has_the_configuration_that_it_has_in_its_sweep(
    name: str, group: str | None
) -> None:
    settings = small_config("seed=3", "model.mha_type=mla")
    wandb = dataclasses.replace(settings.wandb, name=name, group=group)
    settings = dataclasses.replace(settings, wandb=wandb)
    typed = ["seed=3", "model.mha_type=mla", "wandb.name=typed", "launcher=joblib"]
    arguments = workers.alone(settings, Path("multirun/a b/0_it's"), typed)
    assert arguments[-2:] == ["hydra.mode=RUN", "hydra.run.dir='multirun/a b/0_it\\'s'"]
    assert "launcher=joblib" not in arguments
    composed: Config = compose(tuple(arguments[:-2]))
    assert (composed.wandb, composed.seed) == (settings.wandb, 3)
    assert composed.model.mha_type is settings.model.mha_type


@pytest.fixture
def worker() -> workers.Worker:
    """One that has no launcher to watch, and takes no place from this process."""
    worker = object.__new__(workers.Worker)
    worker.job, worker.stopped, worker.environment = None, None, {"PLACE": "7"}
    return worker


def stand_in(worker: workers.Worker, folder: Path, text: str) -> None:
    """A small program in place of chargpt, which the processes of `worker` find first."""
    (folder / "chargpt.py").write_text(f"import os, signal, sys, time\n{text}\n")
    worker.environment["PYTHONPATH"] = str(folder)


def test_a_worker_starts_the_program_itself(tmp_path: Path, worker: workers.Worker) -> None:
    with pytest.raises(RunFailed, match=f"resume={tmp_path}: is not a run directory"):
        worker.resume(tmp_path, [])


def test_a_job_has_its_place_its_output_is_kept_and_its_loss_comes_back(
    tmp_path: Path, worker: workers.Worker
) -> None:
    run = make_run(tmp_path / "0_standard", val_losses=[2.5, 2.0])
    stand_in(worker, tmp_path, "print(sys.argv[1:], os.environ['PLACE'])")
    loss = json.loads((run / "summary.json").read_text())["best/val_loss"]
    assert worker.resume(run, ["seed=1"]) == loss
    assert (run / workers.OUTPUT).read_text() == f"['train', 'resume={run}', 'seed=1'] 7\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("print('one'); sys.exit('error: seed=-1: is not a seed')", "^seed=-1: is not a seed$"),
        ("sys.exit(3)", "^exit code 3$"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL; .*output.txt"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_the_reason_why_a_job_failed_is_reported(
    text: str, reason: str, tmp_path: Path, worker: workers.Worker
) -> None:
    stand_in(worker, tmp_path, text)
    with pytest.raises(RunFailed, match=reason):
        worker.resume(tmp_path, [])


def test_a_worker_that_is_stopped_lets_its_job_save_and_starts_no_other(
    tmp_path: Path, worker: workers.Worker
) -> None:
    save = "signal.signal(signal.SIGTERM, lambda *_: (open('saved', 'w').close(), sys.exit(143)))"
    mark = "open('started', 'a').write('x')"
    text = f"os.chdir({str(tmp_path)!r})\n{save}\n{mark}\ntime.sleep(60)"
    stand_in(worker, tmp_path, text)

    def stop() -> None:
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        worker.stop(signal.SIGINT)

    thread = threading.Thread(target=stop)
    thread.start()
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            worker.resume(tmp_path, [])
        assert ended.value.code == 128 + signal.SIGINT
    thread.join()
    assert (tmp_path / "saved").exists() and (tmp_path / "started").read_text() == "x"


def test_only_workers_that_are_running_are_asked_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *what: killed.append(what))
    for place, process in enumerate((1001, 1002, 1003)):
        (tmp_path / workers.PLACES / str(place)).mkdir(parents=True)
        (tmp_path / workers.PLACES / str(place) / "process").write_text(str(process))
    with lock(tmp_path / workers.PLACES / "1"):
        workers.stop_all(tmp_path)
    assert killed == [(1002, signal.SIGTERM)]


@pytest.mark.parametrize("number", [0, -1])
def test_a_number_of_jobs_below_one_is_refused(number: int) -> None:
    with pytest.raises(ConfigError, match=f"n_jobs={number}: must be at least 1; leave it out"):
        workers.check(SimpleNamespace(n_jobs=number))
    workers.check(SimpleNamespace(n_jobs=1))
