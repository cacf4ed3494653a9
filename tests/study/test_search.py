"""Search spaces, checked before anything runs, and studies that continue.

Trials are stand-ins that answer at once.
"""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import yaml
from conftest import ROOT
from matplotlib import pyplot
from pages import images

from chargpt import cli
from chargpt.compose import compose
from chargpt.config import options, spell
from chargpt.errors import ConfigError, RunFailed
from chargpt.run import start
from chargpt.run.directory import read_run, write_config
from chargpt.study import trials
from chargpt.study.space import Parameter, Space, read_space, to_wandb_sweep

optuna = pytest.importorskip("optuna")

SHIPPED = sorted((ROOT / "configs" / "search").glob("*.yaml"))
SPACE = {
    "overrides": ["experiment=debug", "mode=disabled"],
    "parameters": {
        "optimizer.learning_rate": {"low": "1e-4", "high": 0.1, "log": True},
        "optimizer.warmup_steps": {"low": 0, "high": 10, "step": 2},
        "model.num_heads": {"choices": [1, 2, 4]},
    },
}


def write(folder: Path, content: Any) -> Path:
    path = folder / "space.yaml"
    path.write_text(
        content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    )
    return path


def test_a_space_is_read_by_the_types_of_the_options(tmp_path: Path) -> None:
    rate, warmup, heads = read_space(write(tmp_path, SPACE)).parameters
    assert rate == Parameter("optimizer.learning_rate", low=1e-4, high=0.1, log=True)
    assert warmup == Parameter("optimizer.warmup_steps", low=0, high=10, step=2, whole=True)
    assert heads == Parameter("model.num_heads", choices=(1, 2, 4))


BAD = {
    "optimizer.learning_rat: {low: 1, high: 2}": "did you mean optimizer.learning_rate?",
    "optimizer.learning_rate: {low: small, high: 2}": "low=small: is not a number",
    "optimizer.learning_rate: {low: 0.1, high: 0.1}": "the range from 0.1 to 0.1 is empty",
    "optimizer.learning_rate: {low: 0, high: 1, log: true}": "logarithmic range starts above zero",
    "optimizer.learning_rate: {low: 1e-3, high: 1, log: true, step: 1e-3}": "has no step",
    "optimizer.learning_rate: {low: 1e-3}": "a range needs low and high",
    "optimizer.learning_rate: {low: 1e-3, high: 1, setp: 1}": "did you mean step?",
    "optimizer.learning_rate: {low: .nan, high: 1}": "is not a number",
    "optimizer.learning_rate: 0.1": "write {low: …, high: …} or {choices: […]}",
    "optimizer.warmup_steps: {low: 0, high: 2.5}": "is not a whole number",
    "optimizer.warmup_steps: {low: 0, high: 9, step: 0}": "must be above zero and within the range",
    "model.mha_type: {low: 0, high: 1}": "is not a number; write {choices: […]}",
    "model.mha_type: {choices: [mqa, gqq]}": "did you mean gqa?",
    "model.num_heads: {choices: []}": "is not a list of values",
    "model.num_heads: {choices: [2, 2]}": "has a value twice",
    "model.num_heads: {choices: [2, 3]}": "does not divide model.d_model",
    "model.num_heads: {choices: [2], low: 1}": "both choices and a range",
    "model.mla: {choices: [1]}": "is a group of options",
    "optimizer.weight_decay: {low: -0.1, high: 0.1}": "must be a finite number in [0, inf)",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_space_is_one_clear_line(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, f"overrides: [experiment=debug]\nparameters:\n  {line}\n")
    assert cli.run_tool(["search", f"space={path}", f"out={tmp_path / 'out'}"]) == 2
    out, err = capsys.readouterr()
    assert BAD[line] in err and err.startswith("error: ") and err.count("\n") == 1 and out == ""
    assert line.partition(":")[0] in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not YAML"),
        ("[]", "must hold overrides and parameters"),
        ("overrides: []", "names no option"),
        ("parameters: {}", "names no option"),
        ("overrides: a=b\nparameters: {seed: {choices: [1]}}", "overrides must be a list"),
        ("params: {}", "params: write overrides or parameters"),
        (
            "overrides: [model.widht=3]\nparameters: {seed: {choices: [1]}}",
            "there is no such option",
        ),
    ],
)
def test_a_file_that_is_not_a_space_is_one_clear_line(
    content: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        read_space(write(tmp_path, content))
    assert "\n" not in str(error.value)


def test_a_missing_space_is_answered_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"cannot be read .*configs/search/adamw\.yaml"):
        read_space(Path("nowhere.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_space_composes_and_so_does_every_value_of_its_wandb_file(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run_tool(["search", f"space={path}", "write_wandb=sweep.yaml"]) == 0
    sweep = yaml.safe_load(Path("sweep.yaml").read_text())
    assert sweep["metric"] == {"name": "best/val_loss", "goal": "minimize"}
    assert sweep["program"] == "main.py" and (ROOT / sweep["program"]).is_file()
    *program, arguments = sweep["command"][:3] + sweep["command"][-1:]
    assert program == ["${env}", "${interpreter}", "${program}"]
    assert arguments == "${args_no_hyphens}"
    fixed = sweep["command"][3:-1]
    assert "mode=online" in fixed
    space = Space("", tuple(fixed), ())
    for name, given in sweep["parameters"].items():
        assert name in options()
        values = given["values"] if "values" in given else [given["min"], given["max"]]
        ranges = ("uniform", "int_uniform", "q_uniform", "log_uniform_values")
        assert "values" in given or given["distribution"] in ranges
        for value in values:
            space.compose({name: value})
    first = [
        f"{name}={spell((given.get('values') or [given.get('min')])[0])}"
        for name, given in sweep["parameters"].items()
    ]
    compose((*fixed, *first))  # as main.py reads it


def test_a_wandb_file_says_how_each_range_is_drawn(tmp_path: Path) -> None:
    parameters = to_wandb_sweep(read_space(write(tmp_path, SPACE)))["parameters"]
    assert parameters == {
        "optimizer.learning_rate": {"distribution": "log_uniform_values", "min": 1e-4, "max": 0.1},
        "optimizer.warmup_steps": {"distribution": "q_uniform", "q": 2, "min": 0, "max": 10},
        "model.num_heads": {"values": [1, 2, 4]},
    }


# ---- a study


def answer(config: Any, run_dir: Path, watch: Any) -> float:
    """As training does: at three steps, a loss that falls to what the learning rate is worth."""
    goal = 1 + abs(math.log10(config.optimizer.learning_rate) + 2)
    for step in (10, 20, 30):
        loss = goal + 1 / step
        if step < 30 and watch(step, loss):
            break
    return loss


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trials that answer at once; which were trained and which resumed, in order."""
    calls: list[str] = []

    def train(config: Any, run_dir: Path, watch: Any) -> float:
        calls.append(f"train {run_dir.name}")
        return answer(config, run_dir, watch)

    def resume(run_dir: Path, overrides: Any, watch: Any) -> float:
        calls.append(f"resume {run_dir.name}")
        assert not watch(10, 1.0)  # reported before it was killed: not a second time
        return 0.5

    monkeypatch.setattr(start, "train", train)
    monkeypatch.setattr(start, "resume", resume)
    return calls


def all_trials(folder: Path) -> list[Any]:
    url = f"sqlite:///{folder / 'study.db'}"
    return optuna.load_study(study_name="space", storage=url).trials


def states(folder: Path) -> list[str]:
    return [trial.state.name for trial in all_trials(folder)]


def test_a_study_finds_the_good_region_ends_poor_trials_early_and_continues_to_more(
    tmp_path: Path, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["search", f"space={write(tmp_path, SPACE)}", f"out={tmp_path / 'study'}", "seed=0"]
    assert cli.run_tool([*arguments, "num_trials=24"]) == 0
    assert quick == [f"train trial_{number:04}" for number in range(24)]
    found = states(tmp_path / "study")
    assert found.count("COMPLETE") >= 6 and found.count("PRUNED") >= 2 and len(found) == 24
    out = capsys.readouterr().out
    (best,) = [line for line in out.splitlines() if line.startswith("python main.py")]
    overrides = best.split()[2:]
    config = compose(tuple(override.strip("'") for override in overrides))
    rate = config.optimizer.learning_rate
    assert abs(math.log10(rate) + 2) < 0.3
    html = (tmp_path / "study" / "search.html").read_text()
    assert images(html) == ["history", "importance", "parallel coordinates"]

    assert cli.run_tool([*arguments, "num_trials=25"]) == 0
    assert quick[24:] == ["train trial_0024"]
    assert cli.run_tool([*arguments, "num_trials=25"]) == 0 and len(quick) == 25


def test_trials_that_train_at_once_make_room_for_the_next_and_take_turns_by_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Really trained: of two widths, so two programs; poor trials end at their first evaluation."""
    ranges = SPACE["parameters"] | {"model.num_heads": {"choices": [1, 2]}}
    small = ["model.num_layers=1", "trainer.sample_chars=0", "trainer.num_steps=8"]
    small += ["trainer.log_every=2", "trainer.eval_every=2", "optimizer.warmup_steps=null"]
    del ranges["optimizer.warmup_steps"]
    space = SPACE | {"overrides": [*SPACE["overrides"], *small], "parameters": ranges}
    folder = tmp_path / "study"
    arguments = ["search", f"space={write(tmp_path, space)}", f"out={folder}", "seed=0"]
    assert cli.run_tool([*arguments, "members=3", "num_trials=9"]) == 0
    found = all_trials(folder)
    assert len(found) == 9
    assert {trial.params["model.num_heads"] for trial in found} == {1, 2}
    out = capsys.readouterr().out
    assert out.count("attention  standard") >= 2 and "9 trials: " in out
    ends = {"COMPLETE": {8}, "PRUNED": {2, 4, 6}}
    for trial in found:
        run = read_run(folder / f"trial_{trial.number:04}")
        assert run.summary["final/step"] in ends[trial.state.name], trial.state
        assert run.summary["population"] == 3
        assert run.config.optimizer.learning_rate == trial.params["optimizer.learning_rate"]
    assert {trial.state.name for trial in found} == {*ends}


def test_drawing_a_study_leaves_matplotlib_as_it_was(tmp_path: Path, quick: list[str]) -> None:
    before = dict(matplotlib.rcParams)
    arguments = ["search", f"space={write(tmp_path, SPACE)}", f"out={tmp_path / 'study'}"]
    assert cli.run_tool([*arguments, "num_trials=1"]) == 0
    html = (tmp_path / "study" / "search.html").read_text()
    assert images(html) == ["history", "parallel coordinates"]  # too few trials for importances
    assert pyplot.get_fignums() == []
    changed = {name for name in before if matplotlib.rcParams[name] != before[name]}
    assert changed <= {"backend"}  # which is chosen with the first figure


def test_with_a_seed_a_study_in_two_halves_asks_what_it_would_have_asked_at_once(
    tmp_path: Path, quick: list[str]
) -> None:
    asked = {}
    for name, halves in (("at once", (4,)), ("halves", (2, 4))):
        command = ["search", f"space={write(tmp_path, SPACE)}", f"out={tmp_path / name}", "seed=3"]
        for number in halves:
            assert cli.run_tool([*command, f"num_trials={number}"]) == 0
        asked[name] = [tuple(trial.params.values()) for trial in all_trials(tmp_path / name)]
    assert asked["at once"] == asked["halves"] and len(set(asked["halves"])) == 4


def test_a_trial_that_was_killed_resumes_and_one_that_fails_is_counted(
    tmp_path: Path,
    quick: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["search", f"space={write(tmp_path, SPACE)}", f"out={tmp_path / 'study'}"]
    arguments.append("num_trials=3")

    def killed(config: Any, run_dir: Path, watch: Any) -> float:
        write_config(run_dir, config)
        watch(10, 2.0)
        raise SystemExit(143)

    good = start.train
    monkeypatch.setattr(start, "train", killed)
    with pytest.raises(SystemExit):
        cli.run_tool(arguments)
    assert states(tmp_path / "study") == ["RUNNING"]

    def fails_once(config: Any, run_dir: Path, watch: Any) -> float:
        if run_dir.name == "trial_0001":
            raise RunFailed("not finite")
        return good(config, run_dir, watch)

    monkeypatch.setattr(start, "train", fails_once)
    assert cli.run_tool(arguments) == 0
    assert quick == ["resume trial_0000", "train trial_0002"]
    assert states(tmp_path / "study") == ["COMPLETE", "FAIL", "COMPLETE"]
    assert "trial 1 failed: not finite" in capsys.readouterr().out


def test_a_trial_that_ends_while_another_process_looks_is_not_claimed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = trials.open_study(tmp_path, read_space(write(tmp_path, SPACE)))
    study.ask()

    def try_lock(path: Path) -> object:
        study.tell(0, 1.0)  # by its process, and only then the lock is free
        return original(path)

    original = trials.try_lock
    monkeypatch.setattr(trials, "try_lock", try_lock)
    assert trials.claim(study, tmp_path, num_trials=1, seed=None) is None
    with original(trials.working(tmp_path, "0")):  # it has been released
        pass


def test_another_space_is_refused_for_the_same_study(
    tmp_path: Path, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["search", f"space={write(tmp_path, SPACE)}", f"out={tmp_path / 'study'}"]
    arguments.append("num_trials=1")
    assert cli.run_tool(arguments) == 0
    write(tmp_path, SPACE | {"overrides": ["experiment=debug"]})
    assert cli.run_tool(arguments) == 2
    assert "searches another space than space is now" in capsys.readouterr().err


WORKER = """
import json, sys, time
sys.path[:0] = sys.argv[1:3]
from chargpt import cli
from chargpt.run import start
from test_search import answer

def train(config, run_dir, watch):
    print(run_dir.name, flush=True)
    time.sleep(0.2)
    return answer(config, run_dir, watch)

start.train = train
sys.exit(cli.run_tool(sys.argv[3:]))
"""


def test_two_processes_share_a_study_and_run_no_trial_twice(tmp_path: Path) -> None:
    arguments = ["search", f"space={write(tmp_path, SPACE)}", f"out={tmp_path / 'study'}"]
    arguments.append("num_trials=12")
    folders = [str(ROOT / "tests" / "study"), str(ROOT / "tests")]
    command = [sys.executable, "-c", WORKER, *folders, *arguments]
    workers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    run_by = [
        [line for line in out.splitlines() if line.startswith("trial_")] for out, _ in outputs
    ]
    assert sorted(run_by[0] + run_by[1]) == [f"trial_{number:04}" for number in range(12)]
    found = states(tmp_path / "study")
    assert len(found) == 12 and "RUNNING" not in found
