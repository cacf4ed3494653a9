"""Runs of earlier versions, in tests/runs/COMMIT/NAME, are as usable as those of this one."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT
from programs import metrics
from test_checkpoint import Parts, assert_same_bits

from chargpt import checkpoint, cli
from chargpt.compose import change
from chargpt.config import REQUIRED, options, settings_of
from chargpt.corpus import load_corpus, make_windows
from chargpt.run.directory import read_config
from chargpt.run.evaluate import evaluate
from chargpt.run.resume import restore
from chargpt.run.start import resume

RUNS = sorted(path.parent for path in (ROOT / "tests" / "runs").glob("*/*/config.yaml"))
NEUTRAL = {n: facts.neutral for n, (_, facts) in options().items() if facts.neutral is not REQUIRED}


def name_of(run: Path) -> str:
    return f"{run.parent.name}-{run.name}"


@pytest.fixture(params=RUNS, ids=name_of)
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of each earlier run in turn."""
    return shutil.copytree(request.param, tmp_path / "run")


@pytest.fixture
def all_runs(tmp_path: Path) -> Path:
    """A folder with copies of all earlier runs."""
    for run in RUNS:
        shutil.copytree(run, tmp_path / "runs" / name_of(run))
    return tmp_path / "runs"


def tool(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    """(standard output, standard error) of `chargpt …`, run in this process."""
    code = cli.run_tool(list(arguments))
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


def summary_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


def last_of(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "last.eqx"


def test_it_can_be_sampled_from(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = tool(capsys, "sample", f"run={run_dir}", "prompt=To be", "num_chars=40")
    assert out.startswith("To be") and len(out) == len("To be") + 40 + 1
    assert f"step {summary_of(run_dir)['best/step']}" in err


def test_it_can_be_evaluated(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = tool(capsys, "evaluate", f"run={run_dir}")
    # On the whole split; the run evaluated a part
    assert float(out.split()[1]) == pytest.approx(summary_of(run_dir)["best/val_loss"], abs=0.1)


def test_its_weights_mean_what_they_meant(run_dir: Path) -> None:
    state, header = checkpoint.load(run_dir / "checkpoints" / "best.eqx")
    corpus, trainer = load_corpus(header.config.dataset), header.config.trainer
    windows = make_windows(corpus.val, header.config.dataset.seq_len, trainer.eval_tokens)
    scores = evaluate(state.averaged, windows, 4, trainer.precision)
    assert scores["val/loss"] == pytest.approx(summary_of(run_dir)["best/val_loss"], rel=1e-5)


def test_they_can_be_compared(
    all_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = tool(capsys, "compare", str(all_runs), f"out={tmp_path / 'comparison'}")
    with open(tmp_path / "comparison.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(RUNS) and all(row["arm"] in out for row in rows)
    for row in rows:
        assert float(row["best/val_loss"]) == summary_of(Path(row["path"]))["best/val_loss"]
    assert {".html", ".md", ".png"} <= {path.suffix for path in tmp_path.glob("comparison*")}


def test_they_can_be_inspected(
    all_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["inspect", str(all_runs), "prompt=To be, or not", f"out={tmp_path / 'attention'}"]
    out, _ = tool(capsys, *arguments)
    assert out.count(": entropy of each head in nats") == len(RUNS)
    assert (tmp_path / "attention.png").is_file() and (tmp_path / "attention.html").is_file()


def test_it_can_be_resumed(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, lines = summary_of(run_dir), metrics(run_dir)
    step = before["final/step"]
    best = resume(run_dir, [f"trainer.num_steps={step + 4}"])
    assert f"resuming {run_dir} at step {step}" in capsys.readouterr().out
    assert np.isfinite(best) and best <= before["best/val_loss"]
    after = metrics(run_dir)
    assert after[: len(lines)] == lines
    assert [line["trainer/step"] for line in after[len(lines) :]] == [step + 2, step + 4]
    assert summary_of(run_dir)["final/step"] == step + 4
    assert read_config(run_dir / "config.yaml").trainer.num_steps == step + 4
    assert checkpoint.load(last_of(run_dir))[1].step == step + 4


def test_a_damaged_config_yaml_does_not_matter_where_a_checkpoint_is_intact(run_dir: Path) -> None:
    best = summary_of(run_dir)["best/val_loss"]
    (run_dir / "config.yaml").write_text("{")
    assert resume(run_dir, []) == pytest.approx(best)


def remove_neutral(plain: dict[str, Any]) -> None:
    """Delete every setting that an even older version may lack."""
    for name in NEUTRAL:
        *groups, last = name.split(".")
        group = plain
        for part in groups:
            group = group.get(part, {})
        group.pop(last, None)  # the run may be older than the option


def test_settings_with_a_neutral_value_may_be_missing(run_dir: Path) -> None:
    path = run_dir / "config.yaml"
    config = read_config(path)
    plain = yaml.safe_load(path.read_text())
    remove_neutral(plain)
    path.write_text(yaml.safe_dump(plain))
    found = read_config(path)
    assert found == change(config, NEUTRAL)
    changed = {n for n, value in settings_of(config).items() if settings_of(found)[n] != value}
    assert changed <= NEUTRAL.keys()


def test_a_checkpoint_whose_header_lacks_them_can_be_loaded_and_resumed(run_dir: Path) -> None:
    state, header = checkpoint.load(last_of(run_dir))
    parts = Parts(last_of(run_dir).read_bytes())
    remove_neutral(parts.fields["config"])
    parts.write(last_of(run_dir))
    found, found_header = checkpoint.load(last_of(run_dir))
    assert_same_bits(found, state)
    assert found_header.config == change(header.config, NEUTRAL)
    said: list[str] = []
    config, restored = restore(run_dir, [], said.append)
    assert restored is not None and restored[1] == found_header
    assert config == found_header.config and said[0].endswith(f"at step {header.step}")
