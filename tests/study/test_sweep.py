"""Sweeps: their folders, the names of their jobs; jobs skipped, resumed, tried again."""

import dataclasses
import json
import math
import os
import re
import shlex
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import make_config, small_config
from fake_runs import make_run
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from chargpt.compose import run_group, run_name, sweep_dir
from chargpt.errors import ConfigError, RunFailed
from chargpt.run.directory import read_config, write_config
from chargpt.run.process import lock
from chargpt.study import sweep


@pytest.fixture
def hydra_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that sets Hydra's own configuration as in a run, or in a job of a sweep."""

    def make(task: list[str], sweep_of: list[str] | None = None) -> None:
        mode = "RUN" if sweep_of is None else "MULTIRUN"
        text = {"hydra": {"overrides": {"task": sweep_of or []}}}
        (tmp_path / "multirun.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(text)))
        launcher = {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}
        hydra = {"mode": RunMode[mode], "sweep": {"dir": str(tmp_path)}, "launcher": launcher}
        hydra["overrides"] = {"task": task}
        monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create({"hydra": hydra}))

    return make


SETTINGS = ["trainer.num_steps=100", "optimizer.warmup_steps=5"]


class Calls:
    """Stand-ins for training and resuming that note their calls."""

    def __init__(self, error: Exception | None = None):
        self.trained: list[Path] = []
        self.resumed: list[Path] = []
        self.error = error

    def train(self, config: Any, run_dir: Path) -> float:
        self.trained.append(run_dir)
        if self.error:
            raise self.error
        return 1.5

    def resume(self, run_dir: Path, overrides: Any) -> float:
        assert list(overrides) == []
        self.resumed.append(run_dir)
        if self.error:
            raise self.error
        return 1.25


def job(run_dir: Path, *overrides: str, error: Exception | None = None) -> tuple[float, Calls]:
    calls, config = Calls(error), small_config(*SETTINGS, *overrides)
    return sweep.run_job(config, run_dir, calls.train, calls.resume), calls


def test_a_new_job_is_trained(tmp_path: Path) -> None:
    loss, calls = job(tmp_path)
    assert (loss, calls.trained, calls.resumed) == (1.5, [tmp_path], [])


def test_a_job_that_is_done_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(tmp_path)
    loss, calls = job(run)
    assert (calls.trained, calls.resumed) == ([], [])
    assert loss == json.loads((run / "summary.json").read_text())["best/val_loss"]
    assert "done before" in capsys.readouterr().out


def finished(folder: Path) -> Path:
    """A run of SETTINGS that reached its end."""
    run = make_run(folder / "0_standard", val_losses=[2.5, 2.0])
    config = small_config(*SETTINGS)
    write_config(run, config)
    assert read_config(run / "config.yaml") == config
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"final/step": 100, "best/val_loss": 2.0}
    (run / "summary.json").write_text(json.dumps(summary))
    return run


@pytest.mark.parametrize("damage", ["no summary", "half a summary", "fewer steps", "no loss"])
def test_a_job_that_is_half_done_resumes(tmp_path: Path, damage: str) -> None:
    run = finished(tmp_path)
    path = run / "summary.json"
    summary = json.loads(path.read_text())
    match damage:
        case "no summary":
            path.unlink()
        case "half a summary":
            path.write_text(path.read_text()[:20])
        case "fewer steps":
            path.write_text(json.dumps(summary | {"final/step": 99}))
        case "no loss":
            path.write_text(json.dumps(summary | {"best/val_loss": None}))
    loss, calls = job(run)
    assert (loss, calls.trained, calls.resumed) == (1.25, [], [run])


def test_another_configuration_in_the_directory_is_refused_and_the_other_jobs_continue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], hydra_job: Any
) -> None:
    hydra_job([], [])
    run = finished(tmp_path)
    loss, calls = job(run, "optimizer.learning_rate=1e-4")
    assert loss == math.inf and not calls.trained and not calls.resumed
    assert "holds a run of another configuration" in capsys.readouterr().err
    assert "holds a run of another configuration" in (run / sweep.FAILED).read_text()


def test_the_mode_of_logging_does_not_make_another_job(tmp_path: Path) -> None:
    _, calls = job(finished(tmp_path), "mode=offline")
    assert (calls.trained, calls.resumed) == ([], [])


@pytest.mark.parametrize(
    "error", [ConfigError("odd"), RunFailed("not finite"), MemoryError(), ValueError("a\nb")]
)
def test_a_job_that_fails_is_noted_and_stops_nothing_and_is_tried_again(
    tmp_path: Path, error: Exception, hydra_job: Any
) -> None:
    hydra_job(["seed=1"], ["seed=0,1"])
    loss, _ = job(tmp_path, error=error)
    assert loss == math.inf
    reason, command = (tmp_path / sweep.FAILED).read_text().splitlines()
    assert reason.startswith(type(error).__name__) and command.startswith("python main.py seed=1 ")
    loss, calls = job(tmp_path)
    assert loss == 1.5 and calls.trained == [tmp_path] and not (tmp_path / sweep.FAILED).exists()


def test_ctrl_c_and_a_signal_that_a_run_obeyed_end_the_sweep(tmp_path: Path) -> None:
    for error in (KeyboardInterrupt(), SystemExit(130)):
        with pytest.raises(type(error)):
            job(tmp_path, error=error)  # type: ignore[arg-type]


def test_the_report_lists_what_failed_with_the_command_that_reruns_it(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    hydra_job: Any,
) -> None:
    monkeypatch.setattr("sys.argv", ["main.py", "--multirun", "seed=0,1,2"])
    folder = tmp_path / "a sweep"
    done = finished(folder)
    (folder / "2_standard").mkdir()
    named = ["wandb.name='it\\'s'", "wandb.group='a sweep'"]
    write_config(folder / "2_standard", small_config(*SETTINGS, *named))
    typed = {1: ["seed=1", "launcher=joblib", "wandb.name=typed"], 2: ["seed=2"], 10: ["seed=10"]}
    for number, overrides in typed.items():
        (folder / f"{number}_standard" / ".hydra").mkdir(parents=True)
        hydra_job(overrides, [])
        job(folder / f"{number}_standard", *named, error=RunFailed(f"reason {number}"))
    (done / ".hydra").mkdir()
    (done / sweep.FAILED).write_text("what failed once and then succeeded\n")
    (folder / "11_standard" / ".hydra").mkdir(parents=True)  # its process was killed
    capsys.readouterr()
    sweep.started.append(folder)
    assert sweep.report() == 1
    out = capsys.readouterr().out
    failed = [line.rpartition("/")[2] for line in out.splitlines() if line.startswith("failed: ")]
    assert failed == [f"{number}_standard: RunFailed: reason {number}" for number in (1, 2, 10)]
    commands = re.findall(r"^  rerun: python main.py (.*)$", out, re.MULTILINE)
    job_alone = ["seed=1", *named, "hydra.mode=RUN", f"hydra.run.dir='{folder / '1_standard'}'"]
    assert shlex.split(commands[0]) == job_alone
    assert shlex.split(commands[1]) == [f"resume='{folder / '2_standard'}'"]
    assert f"not finished: {folder / '11_standard'}" in out
    assert "4 of 5 jobs are not done; the same command continues them" in out
    assert out.splitlines()[-1].strip() == "python main.py --multirun seed=0,1,2"
    assert (folder / "comparison.html").is_file() and f"best run: {done}" in out
    assert sweep.report() == 0 and sweep.started == []


def test_the_same_command_has_the_same_folder_and_another_one_another() -> None:
    command = ["experiment=compare", "model.mha_type=mla,mqa", "wandb.name=../../x y"]
    folder = Path(sweep_dir(command))
    assert folder == Path(sweep_dir([*command, "mode=online"]))
    assert folder.parent == Path("multirun")
    assert folder.name.startswith("compare-mha_type-mla-mqa-")
    others = (command[:2], ["experiment=compare", "seed=0,1"], [])
    assert len({sweep_dir(other) for other in (command, *others)}) == 4


def test_a_run_is_named_by_what_sets_it_apart_and_grouped_with_its_other_seeds(
    hydra_job: Any,
) -> None:
    typed = ["model.mha_type=mla", "model.mla.kv_lora_rank=8", "seed=3"]
    hydra_job([*typed, "mode=online", "wandb.tags=[a]", "resume=null"])
    assert run_name("mla") == "mla kv_lora_rank=8 seed=3"
    assert run_group("mla kv_lora_rank=8 seed=3") == "mla kv_lora_rank=8"


def test_jobs_of_a_sweep_are_named_by_what_they_differ_in_and_grouped_by_its_folder(
    hydra_job: Any, tmp_path: Path
) -> None:
    steps = "trainer.num_steps=9"
    own = ["seed=1", steps, "optimizer.beta1=0.8"]
    hydra_job(own, ["seed=0,1", steps, "optimizer.beta1=0.8,0.9"])
    assert run_name("mqa") == "mqa seed=1 beta1=0.8"
    assert run_group("mqa seed=1 beta1=0.8") == tmp_path.name
    own = ["model.mha_type=mla", "model.qk_norm=False"]
    hydra_job(own, ["model.mha_type=mla,mqa", "model.qk_norm=false"])
    assert run_name("fast_cpu") == "fast_cpu mha_type=mla" and run_name("mla") == "mla"


def test_without_hydra_a_run_is_named_by_its_type() -> None:
    config = make_config("model.mha_type=gqa", "seed=5")
    assert config.wandb.name == config.wandb.group == "gqa"
    assert dataclasses.asdict(config)["wandb"]["tags"] == []


def test_a_job_that_another_process_trains_is_awaited_and_not_done_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(tmp_path)
    held = threading.Event()

    def other() -> None:
        with lock(run):
            held.set()
            time.sleep(0.5)

    thread = threading.Thread(target=other)
    thread.start()
    held.wait()
    begin = time.monotonic()
    loss, calls = job(run)
    thread.join()
    assert time.monotonic() - begin > 0.3 and (calls.trained, calls.resumed, loss) == ([], [], 2.0)
    printed = capsys.readouterr().out.splitlines()
    assert "another process trains in it: waiting" in printed[0] and "done before" in printed[1]


def test_no_two_jobs_share_a_wandb_run(hydra_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "one for all")
    hydra_job([], [])
    sweep.runners()
    assert "WANDB_RUN_ID" not in os.environ


@pytest.mark.parametrize(
    ("launcher", "extra"),
    [
        ("launcher=joblib", "joblib"),
        ("launcher=slurm", "slurm"),
        ("hydra/launcher=submitit_local", "slurm"),
    ],
)
def test_a_launcher_that_is_not_installed_is_named_with_what_to_write(
    launcher: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_config()  # Hydra's plugins are loaded
    store = ConfigStore.instance().repo["hydra"]["launcher"]
    basic = {name: node for name, node in store.items() if name == "basic.yaml"}
    monkeypatch.setitem(ConfigStore.instance().repo["hydra"], "launcher", basic)
    with pytest.raises(ConfigError) as refused:
        make_config(launcher)
    expected = f"launcher={extra}: is not installed; write pip install -e '.[{extra}]'"
    assert str(refused.value) == expected


def test_a_launcher_that_does_not_exist_is_named_beside_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"hydra/launcher=basicc: .*; did you mean basic\?"):
        make_config("hydra/launcher=basicc")
