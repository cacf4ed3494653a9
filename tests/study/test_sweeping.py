"""Real sweeps, as a person starts them: killed, failing, side by side, preempted, continued."""

import json
import os
import random
import re
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from programs import DEBUG, leaves_of, metrics, run, start, wait_for_step, without_clock

from chargpt import checkpoint
from chargpt.config import CONFIGS, AttentionType
from chargpt.errors import ConfigError
from chargpt.run.directory import read_config
from chargpt.run.process import lock


def wait_until(condition: Callable[[], object], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_comparison_of_types_continues_where_it_was_killed_and_ends_with_its_table_and_page(
    tmp_path: Path,
) -> None:
    shipped = yaml.safe_load((CONFIGS / "experiment" / "compare.yaml").read_text())
    names = shipped["hydra"]["sweeper"]["params"]["model.mha_type"].split(",")
    assert len(names) >= 6 and set(names) <= set(AttentionType.__members__)
    sizes = ["model.d_model=32", "model.num_layers=1", "model.num_heads=2", "dataset.seq_len=32"]
    sizes += ["trainer.num_steps=10", "trainer.batch_size=4", "optimizer.warmup_steps=5"]
    sizes += ["trainer.sample_chars=0", "trainer.eval_tokens=2048"]
    folder = tmp_path / "sweep"
    command = ["experiment=compare", "seed=0", "mode=disabled", *sizes, f"hydra.sweep.dir={folder}"]
    process = start(*command)
    wait_until(lambda: process.poll() is not None or len(list(folder.glob("*/curves.png"))) == 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = {path: path.stat().st_mtime_ns for path in folder.glob("*/curves.png")}
    assert 2 <= len(done) < len(names)
    out, _ = run(*command)
    assert out.count("done before, best validation loss") == len(done)
    assert all(path.stat().st_mtime_ns == then for path, then in done.items())
    runs = [folder / f"{number}_{name}" for number, name in enumerate(names)]
    summaries = [json.loads((path / "summary.json").read_text()) for path in runs]
    assert [summary["mha_type"] for summary in summaries] == names
    assert all(2.0 < summary["final/val_loss"] < 4.2 for summary in summaries)
    settings = read_config(runs[1] / "config.yaml")
    assert (settings.wandb.name, settings.wandb.group) == (names[1], "sweep")
    assert settings.trainer.num_steps == 10
    table = out[out.rindex("params B/token") :].splitlines()
    rows = [line.split() for line in table[1 : len(names) + 1]]
    assert [row[0] for row in rows] != names and {row[0] for row in rows} == set(names)
    losses = [float(row[2]) for row in rows]
    lowest = min(summary["best/val_loss"] for summary in summaries)
    assert losses == sorted(losses) and losses[0] == pytest.approx(lowest, abs=5e-5)
    for ending in (".html", ".md", ".csv", ".png", ".jsonl"):
        path = folder / f"comparison{ending}"
        assert str(path) in out and path.stat().st_size > 300


LONGER = [*DEBUG, "trainer.num_steps=600", "trainer.log_every=50"]
LONGER += ["trainer.eval_every=300", "trainer.checkpoint_every=100"]


def trains(run_dir: Path) -> bool:
    """Whether a process trains in the directory."""
    try:
        with lock(run_dir):
            return False
    except ConfigError:
        return True


def test_jobs_side_by_side_survive_the_end_of_their_sweep_and_a_job_that_fails(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "sweep"
    command = ["--multirun", *LONGER, "launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0"]
    command += [f"hydra.sweep.dir={folder}", "optimizer.learning_rate=3e-3,1e30"]
    command += ["optimizer.grad_clip=null", "trainer.max_skipped_steps=3"]
    good, bad = folder / "0_standard-learning_rate-0.003", folder / "1_standard-learning_rate-1e+30"
    process = start(*command)
    wait_for_step(process, good, 50)
    process.send_signal(signal.SIGKILL)  # only the launcher: what it started must end too
    process.communicate(timeout=60)  # until no process writes any more
    assert not trains(good) and not trains(bad)
    step = checkpoint.load(good / "checkpoints" / "last.eqx")[1].step
    assert 50 <= step < 600 and metrics(good)[-1]["trainer/step"] == step
    out, err = run(*command, code=1)
    assert f"{good.name}: continues" in out and f"{good.name}: best validation loss" in out
    assert "RunFailed: stopped at step" in out and "1 of 2 jobs are not done" in out
    assert "Traceback" not in err
    summary = json.loads((good / "summary.json").read_text())
    assert summary["final/step"] == 600 and summary["num_devices"] == 1  # a core for each
    steps = [line["trainer/step"] for line in metrics(good)]
    assert steps == sorted(set(steps)) and steps[-1] == 600
    assert read_config(good / "config.yaml").wandb.group == folder.name
    assert f"resuming {good} at step {step}" in (good / "output.txt").read_text()
    (rerun,) = re.findall(r"^  rerun: python main.py (.*)$", out, re.MULTILINE)
    _, err = run(*shlex.split(rerun), code=1)
    assert err.startswith("error: stopped at step") and err.count("\n") == 1


def test_a_population_that_is_killed_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    command = ["--multirun", "launcher=vmap", *DEBUG, "model.mha_type=standard,mqa", "seed=0,1,2"]
    command += ["trainer.num_steps=200", "trainer.log_every=10", "trainer.sample_chars=0"]
    command += ["trainer.eval_every=100", "trainer.checkpoint_every=20"]
    run(*command, f"hydra.sweep.dir={tmp_path / 'undisturbed'}")
    folder = tmp_path / "sweep"

    def lines() -> int:
        return sum(path.read_bytes().count(b"\n") for path in folder.glob("*/metrics.jsonl"))

    def done() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")}

    seed = random.randrange(2**32)
    print(f"random.Random({seed})")
    moments = random.Random(seed)
    for _ in range(2):
        before, wanted = done(), lines() + moments.randint(1, 55)  # of 120
        process = start(*command, f"hydra.sweep.dir={folder}")
        wait_until(lambda process=process, n=wanted: process.poll() is not None or lines() >= n)
        time.sleep(moments.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert before.items() <= done().items()
    left = 6 - len(done())
    out, _ = run(*command, f"hydra.sweep.dir={folder}")
    assert out.count("done before") == 6 - left
    for undisturbed in (tmp_path / "undisturbed").glob("*_*"):
        ended = folder / undisturbed.name
        assert leaves_of(ended) == leaves_of(undisturbed)
        assert without_clock(metrics(ended)) == without_clock(metrics(undisturbed))
        summary = json.loads((ended / "summary.json").read_text())
        assert summary["final/step"] == 200 and summary["population"] == 3


def test_a_preempted_job_of_a_cluster_saves_requeues_itself_and_continues(tmp_path: Path) -> None:
    """submitit's local executor in place of SLURM: the same handler, the same signal."""
    folder = tmp_path / "sweep"
    command = ["--multirun", *LONGER, "hydra/launcher=submitit_local", "seed=0"]
    process = start(*command, f"hydra.sweep.dir={folder}")
    run_dir = folder / "0_standard"
    wait_for_step(process, run_dir, 50)
    (controller,) = (path.name for path in (folder / ".submitit").iterdir() if path.name.isdigit())
    (job,) = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    os.kill(int(job), signal.SIGUSR2)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, out + err
    logs = "".join(path.read_text() for path in (folder / ".submitit").rglob("*_log.*"))
    assert logs.count("Starting with JobEnvironment") == 2
    assert f"resuming {run_dir} at step" in logs and "best run: " in out
    steps = [line["trainer/step"] for line in metrics(run_dir)]
    assert steps == sorted(set(steps)) and steps[-1] == 600


def test_on_slurm_a_job_asks_for_what_the_launcher_file_says_and_a_refusal_is_one_line(
    tmp_path: Path,
) -> None:
    """sbatch is a stand-in that keeps what it is given and refuses it; there is no cluster here."""
    refuse = f'cp "$1" {tmp_path}/asked\necho no such partition >&2\nexit 1'
    for name, script in {"sbatch": refuse, "srun": "exit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = ["--multirun", *DEBUG, "launcher=slurm", "seed=0,1", "hydra.launcher.partition=gpus"]
    _, err = run(*command, f"hydra.sweep.dir={tmp_path / 'sweep'}", code=1, PATH=path)
    assert "no such partition" in err and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: the launcher of the sweep failed: ")
    asked = (tmp_path / "asked").read_text()
    options = ["--partition=gpus", "--gpus-per-node=1", "--cpus-per-task=4", "--mem=16GB"]
    for option in (*options, "--time=240", "--signal=USR2@120"):
        assert f"#SBATCH {option}\n" in asked, asked
    assert "--array=0-1%2" in asked and "--open-mode=append" in asked


def test_a_combination_that_breaks_a_rule_is_named_before_any_job_starts(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    command = ["--multirun", *DEBUG, "seed=0,1", "model.num_heads=2,3"]
    out, err = run(*command, f"hydra.sweep.dir={folder}", code=2)
    assert err.startswith("error: job 1 (")
    assert "seed=0 model.num_heads=3): model.num_heads=3: does not divide" in err
    assert err.count("\n") == 1 and out == "" and not folder.exists()
