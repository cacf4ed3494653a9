"""Runs kept as one file: what is read back of them, and files that are something else."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from fake_runs import make_record, make_run

from chargpt.config import AttentionType
from chargpt.errors import ConfigError
from chargpt.study.compare import EXPLANATION, read_comparison, rows, to_csv, write
from chargpt.study.figures import evaluations_by_step
from chargpt.study.records import read_jsonl, read_records, to_jsonl


def sweep(folder: Path, seed: int) -> Path:
    """A run of every attention type."""
    for number, kind in enumerate(AttentionType):
        losses = [3.0, 2.0 + 0.01 * number + 0.001 * seed]
        make_run(
            folder / f"{number}_{kind}", f"model.mha_type={kind}", f"seed={seed}", val_losses=losses
        )
    return folder


def test_a_comparison_of_its_own_records_is_the_same(tmp_path: Path) -> None:
    first = read_comparison([str(sweep(tmp_path / "sweep", 0))])
    *_, records = write(first, tmp_path / "kept", "Kept")
    shutil.rmtree(tmp_path / "sweep")
    again = read_comparison([str(records)])
    assert rows(again.arms) == rows(first.arms) and again.remarks == first.remarks
    for arm, kept in zip(first.arms, again.arms, strict=True):
        assert evaluations_by_step(kept, "seconds") == evaluations_by_step(arm, "seconds")
        assert kept.first_run.sample == arm.first_run.sample
        assert kept.first_run.config == arm.first_run.config
    assert to_jsonl(run for arm in again.arms for run in arm.runs.values()) == records.read_text()
    assert EXPLANATION in (tmp_path / "kept.md").read_text()


def test_records_and_runs_of_other_seeds_are_arms_together(tmp_path: Path) -> None:
    kept = tmp_path / "seed 0.jsonl"
    kept.write_text(to_jsonl(read_records([str(sweep(tmp_path / "old", 0))])))
    arms = read_comparison([str(kept), str(sweep(tmp_path / "new", 1))]).arms
    assert [arm.name for arm in arms] == list(AttentionType)
    assert all(sorted(arm.runs) == [0, 1] for arm in arms)
    assert f"{kept}:6" in to_csv(arms)


def test_a_run_of_the_same_settings_and_seed_counts_once(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "sweep", 0)
    kept = tmp_path / "kept.jsonl"
    kept.write_text(to_jsonl(read_records([str(folder)])))
    result = read_comparison([str(kept), str(folder)])
    assert all(len(arm.runs) == 1 for arm in result.arms)
    assert sum("a repetition of the same seed" in remark for remark in result.remarks) == 6


GOOD = json.loads(to_jsonl([make_record()]))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("", "holds no run"),
        ("{", "line 1: is not a run that chargpt compare keeps"),
        ("[]\n", "line 1"),
        (json.dumps(GOOD) + "\n{}\n", "line 2"),
        (json.dumps(GOOD | {"summary": []}), "line 1"),
        (json.dumps(GOOD | {"sample": None}), "line 1"),
        (json.dumps(GOOD | {"evaluations": [{"val/loss": 1.0}]}), "without its numbers"),
        (json.dumps(GOOD | {"config": {"seed": "${oc.env:HOME}"}}), "plain values"),
        (json.dumps(GOOD | {"config": {"model": {"d_modell": 3}}}), "d_modell"),
    ],
)
def test_a_file_of_something_else_is_one_line(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "kept.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError) as found:
        read_jsonl(path)
    assert str(found.value).startswith(str(path)) and why in str(found.value)
    assert "\n" not in str(found.value)


def test_a_file_that_is_not_there_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl: cannot be read"):
        read_records(["nowhere.jsonl"])


def test_the_metrics_of_a_run_name_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (record,) = read_records([str(run / "metrics.jsonl")])
    assert record.path == run
    (kept,) = map(json.loads, to_jsonl([record]).splitlines())
    assert [line.pop("train/grad_norm") for line in record.evaluations] == [0.5] * 3
    assert kept["evaluations"] == record.evaluations != record.metrics
    assert dataclasses.asdict(record.config)["seed"] == kept["config"]["seed"]
