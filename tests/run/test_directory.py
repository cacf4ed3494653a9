"""Run directories: found among other folders, written, and read without trusting them."""

import json
import math
import os
import time
from pathlib import Path

import pytest
from conftest import small_config, time_limit
from fake_runs import make_record, make_run
from hypothesis import given
from hypothesis import strategies as st

from chargpt.config import AttentionType
from chargpt.errors import ConfigError
from chargpt.run.directory import (
    cut_records,
    find_runs,
    log_metrics,
    natural,
    read_config,
    read_metrics,
    read_run,
    record_sizes,
    write_config,
)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two runs with what Hydra and W&B leave in them, and a folder that is not a run."""
    for name in ("10_a", "2_b"):
        run = make_run(tmp_path / "sweep" / name)
        for folder in (".hydra", "wandb/offline-run-1/files", "checkpoints"):
            (run / folder).mkdir(parents=True)
        for file in (
            ".hydra/config.yaml",
            ".hydra/overrides.yaml",
            "wandb/offline-run-1/files/config.yaml",
        ):
            (run / file).write_text("[]\n")
    (tmp_path / "sweep" / "notes").mkdir()
    return tmp_path / "sweep"


def names(places: list[Path | str]) -> list[str]:
    return [run.name for run in find_runs([str(place) for place in places])]


# ---- finding


def test_a_folder_gives_its_runs_in_natural_order(sweep: Path) -> None:
    assert find_runs([str(sweep)]) == [sweep / "2_b", sweep / "10_a"]
    assert names([sweep.parent]) == ["2_b", "10_a"]


def test_a_run_gives_itself(sweep: Path) -> None:
    assert find_runs([str(sweep / "2_b")]) == [sweep / "2_b"]


@pytest.mark.parametrize("file", ["config.yaml", "metrics.jsonl", "summary.json"])
def test_a_file_in_a_run_gives_the_run(sweep: Path, file: str) -> None:
    assert find_runs([str(sweep / "10_a" / file)]) == [sweep / "10_a"]


@pytest.mark.parametrize(
    "file",
    ["checkpoints/best.eqx", ".hydra/overrides.yaml", "wandb/offline-run-1/files/config.yaml"],
)
def test_a_file_deep_inside_a_run_gives_the_run(sweep: Path, file: str) -> None:
    (sweep / "10_a" / "checkpoints" / "best.eqx").touch()
    assert find_runs([str(sweep / "10_a" / file)]) == [sweep / "10_a"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", ["2_b", "10_a"]),
        ("1*", ["10_a"]),
        ("[0-9]_?", ["2_b"]),
        ("*/metrics.jsonl", ["2_b", "10_a"]),
        ("**", ["2_b", "10_a"]),
        ("../**/*_a", ["10_a"]),
    ],
)
def test_a_pattern_gives_what_it_matches(sweep: Path, pattern: str, expected: list[str]) -> None:
    assert names([sweep / pattern]) == expected


def test_several_places_keep_their_order_and_give_a_run_once(sweep: Path) -> None:
    assert names([sweep / "10_a", sweep, sweep / "2_b"]) == ["10_a", "2_b"]


def test_a_run_that_is_named_in_two_ways_is_given_once(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sweep)
    assert names(["2_b", sweep / "2_b", "../sweep/2_b"]) == ["2_b"]


def test_a_folder_with_brackets_in_its_name_is_that_folder(tmp_path: Path) -> None:
    for name in ("lr[1]", "lr1"):
        make_run(tmp_path / name)
    assert names([tmp_path / "lr[1]"]) == ["lr[1]"]


def test_a_name_may_hold_an_equals_sign_and_spaces(tmp_path: Path) -> None:
    run = make_run(tmp_path / "0_mqa seed=1, lr=1e-3")
    assert find_runs([str(run)]) == [run] == find_runs([str(tmp_path)])


@pytest.mark.parametrize(
    "place", ["sweep/notes", "nowhere", "sweep/3*", "sweep/2_b/wandb", "sweep/2_b/.hydra"]
)
def test_a_place_without_a_run_is_named_in_one_line(sweep: Path, place: str) -> None:
    path = sweep.parent / place
    with pytest.raises(ConfigError) as caught:
        find_runs([str(sweep), str(path)])
    assert str(caught.value) == (
        f"{path}: holds no run (a folder with config.yaml and metrics.jsonl); "
        "train one with main.py"
    )


# ---- natural order


@given(st.text(), st.text())
def test_any_two_names_have_an_order(one: str, other: str) -> None:
    assert (natural(one) < natural(other)) + (natural(other) < natural(one)) + (
        natural(one) == natural(other)
    ) == 1


@given(
    st.text(st.characters(exclude_characters="0123456789")),
    st.integers(0),
    st.integers(0),
    st.integers(0, 3),
    st.text(),
)
def test_numbers_in_names_count_as_numbers(
    before: str, small: int, step: int, zeros: int, after: str
) -> None:
    after = f"_{after}"
    large = small + step + 1
    assert natural(f"{before}{'0' * zeros}{small}{after}") < natural(f"{before}{large}{after}")
    assert natural(f"{before}{'0' * zeros}{small}{after}") == natural(f"{before}{small}{after}")


def test_digits_of_other_scripts_are_letters() -> None:
    assert [natural(text) for text in ("²", "٣a", "x\N{FULLWIDTH DIGIT ONE}")] == [
        [(-1, text)] for text in ("²", "٣a", "x\N{FULLWIDTH DIGIT ONE}")
    ]
    assert natural("٣2") == [(-1, "٣"), (2, ""), (-1, "")]


# ---- reading


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    overrides = ["model.mha_type=mqa", "seed=3"]
    run = make_run(
        tmp_path / "run",
        *overrides,
        val_losses=[2.0, 1.5, 1.75],
        summary={"num_params": 7},
        sample="a\n\nb = c",
    )
    record = read_run(run)
    assert record == make_record(
        *overrides,
        path=run,
        val_losses=[2.0, 1.5, 1.75],
        summary={"num_params": 7},
        sample="a\n\nb = c",
    )
    assert record.finished
    assert [line["val/loss"] for line in record.evaluations] == [2.0, 1.5, 1.75]
    assert (record.config.seed, record.number("num_params"), record.number("best/step")) == (
        3,
        7,
        1066,
    )


def test_an_incomplete_last_line_of_metrics_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    before = read_run(run)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"trainer/step": 1')
    assert read_run(run) == before


@pytest.mark.parametrize("damage", [None, "", '{"best/val_loss": 2', "\ufffe\x00", "[" * 100_000])
def test_a_summary_that_is_missing_or_damaged_leaves_a_run_unfinished(
    tmp_path: Path, damage: str | None
) -> None:
    run = make_run(tmp_path / "run")
    (run / "summary.json").unlink()
    if damage is not None:
        (run / "summary.json").write_text(damage)
    record = read_run(run)
    assert (record.summary, record.finished, record.number("best/val_loss")) == ({}, False, None)
    assert len(record.evaluations) == 3


def test_without_samples_the_text_is_empty(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "samples.txt").unlink()
    assert read_run(run).sample == ""


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("summary.json", b"[1, 2]"),
        ("summary.json", b"1.5"),
        ("metrics.jsonl", b"[1]\n"),
        ("metrics.jsonl", b'{"trainer/step": 1\n{"trainer/step": 2}\n'),
        ("metrics.jsonl", b"\xff\xfe\n"),
        ("metrics.jsonl", b"[" * 100_000 + b"\n"),
        ("config.yaml", b""),
        ("config.yaml", b"seed: [1\n"),
        ("config.yaml", b"seed: &a 1\nmode: *a\n"),
        ("config.yaml", b"seed: ${oc.env:HOME}\n"),
    ],
)
def test_a_file_that_no_run_writes_is_named_in_one_line(
    tmp_path: Path, file: str, content: bytes
) -> None:
    run = make_run(tmp_path / "run")
    (run / file).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_run(run)
    text = str(caught.value)
    assert text.isprintable() and len(text) < 400
    assert file == "config.yaml" or (text.startswith(f"{run}: ") and file in text)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *[("2", 2), ("2.5", 2.5), ("0", 0), ("null", None), ("true", None), ("NaN", None)],
        *[("-Infinity", None), ('"2"', None), ("[2]", None), ("1" + "0" * 400, None)],
    ],
)
def test_only_finite_numbers_are_numbers(
    tmp_path: Path, value: str, expected: float | None
) -> None:
    run = make_run(tmp_path / "run")
    (run / "summary.json").write_text(f'{{"best/val_loss": {value}, "final/step": 1600}}')
    record = read_run(run)
    assert record.number("best/val_loss") == expected
    assert record.number("no such number") is None
    assert record.finished == (expected is not None)


def test_a_summary_from_disk_keeps_every_digit(tmp_path: Path) -> None:
    loss = 1.8916341882885004
    assert read_run(make_run(tmp_path / "run", val_losses=[loss])).number("best/val_loss") == loss
    assert json.loads((tmp_path / "run/summary.json").read_text())["best/val_loss"] == loss


# ---- config.yaml: a stranger's data


HARD = ["wandb.name='yes: no # é'", "wandb.tags=['1e3','null','on']", "optimizer.grad_clip=null"]


@pytest.mark.parametrize("changes", [[], HARD], ids=["", "hard"])
def test_a_saved_configuration_comes_back(
    changes: list[str], mha_type: AttentionType, tmp_path: Path
):
    config = small_config(f"model.mha_type={mha_type.name}", *changes)
    write_config(tmp_path, config)
    assert read_config(tmp_path / "config.yaml") == config


def alias_bomb(width: int, depth: int) -> str:
    """width^depth strings in a few hundred bytes."""
    lines = ["a0: &a0 [x]"]
    for level in range(1, depth):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]")
    return "\n".join(lines) + "\n"


YAML_CASES = {
    "an alias bomb": lambda good: alias_bomb(9, 12),
    "an alias bomb after a configuration": lambda good: good + alias_bomb(9, 12),
    "an alias bomb in a configuration": lambda good: alias_bomb(9, 12) + good,
    "an alias that is its own list": lambda good: good + "x: &x [*x]\n",
    "a merge of a mapping": lambda good: "x: &x {seed: 1}\n<<: *x\n" + good,
    "an object": lambda good: good + "x: !!python/object/apply:os.mkdir [canary]\n",
    "an object for a setting": lambda good: good.replace(
        "seed: 0", "seed: !!python/object/apply:os.mkdir [canary]"
    ),
    "a Python name": lambda good: good.replace("seed: 0", "seed: !!python/name:os.mkdir"),
    "a target": lambda good: good + "_target_: os.mkdir\npath: canary\n",
    "a target inside": lambda good: good.replace(
        "model:\n", "model:\n  _target_: os.mkdir\n  path: canary\n"
    ),
    "an interpolation": lambda good: good.replace("seed: 0", "seed: ${oc.env:CHARGPT_SECRET}"),
    "an interpolation in a list": lambda good: good.replace(
        "tags: []", "tags: ['${oc.env:CHARGPT_SECRET}']"
    ),
    "an interpolation in a list in a list": lambda good: good.replace(
        "tags: []", "tags: [['${oc.env:CHARGPT_SECRET}']]"
    ),
    "an interpolation in a mapping in a list": lambda good: good.replace(
        "tags: []", "tags: [{a: '${oc.env:CHARGPT_SECRET}'}]"
    ),
    "an interpolation for a name": lambda good: good + "${oc.env:CHARGPT_SECRET}: 1\n",
    "nothing": lambda good: "",
    "an empty mapping": lambda good: "{}",
    "a number": lambda good: "5",
    "a list": lambda good: "- seed: 0",
    "a missing setting": lambda good: good.replace("seed: 0\n", ""),
    "an unknown setting": lambda good: good + "extra: 1\n",
    "a number for a name": lambda good: good + "1: 2\n",
    "null for a name": lambda good: good + "null: 2\n",
    "a list for a name": lambda good: good + "? [a]\n: b\n",
    "an empty whole number": lambda good: good.replace("seed: 0", "seed: !!int ''"),
    "a truth value that is not one": lambda good: good.replace("seed: 0", "seed: !!bool perhaps"),
    "a date that is not one": lambda good: good.replace("seed: 0", "seed: !!timestamp never"),
    "a date": lambda good: good.replace("seed: 0", "seed: 2020-01-01"),
    "a set": lambda good: good.replace("tags: []", "tags: !!set {a}"),
    "bytes": lambda good: good.replace("tags: []", "tags: [!!binary aGk=]"),
    "two documents": lambda good: good + "---\n" + good,
    "half a mapping": lambda good: good[:40] + "{",
    "a NUL": lambda good: good + "\0",
    "not UTF-8": lambda good: good.encode() + b"\xff\xfe",
    "10,000 brackets": lambda good: "[" * 10_000,
    "10,000 dashes": lambda good: "- " * 10_000,
    "500 brackets": lambda good: good + "x: " + "[" * 500 + "]" * 500 + "\n",
    "500 nested settings": lambda good: good + "\n".join(" " * n + "x:" for n in range(500)) + "\n",
    "5,000 digits": lambda good: good.replace("seed: 0", "seed: " + "9" * 5000),
    "half a million numbers": lambda good: good + "x: [" + "1," * 500_000 + "1]\n",
    "two megabytes": lambda good: good + "#" * (2 << 20) + "\n",
}


@pytest.mark.parametrize("name", YAML_CASES)
def test_a_hostile_configuration_is_refused_quickly_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CHARGPT_SECRET", "hunter2")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    write_config(tmp_path, small_config())
    good = path.read_text()
    bad = YAML_CASES[name](good)
    assert bad != good
    path.write_bytes(bad if isinstance(bad, bytes) else bad.encode())
    kind, message, began = None, "", time.monotonic()
    with time_limit(10.0):
        try:
            read_config(path)
        except Exception as error:  # a traceback of a thousand frames could stop pytest itself
            kind, message = type(error), str(error)[:5000]
    assert kind is ConfigError, message
    assert time.monotonic() - began < 3.0
    assert "\n" not in message and "hunter2" not in message and len(message) < 2000
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


def test_a_folder_without_a_configuration_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="is not a run directory") as caught:
        read_config(tmp_path / "config.yaml")
    assert str(tmp_path) in str(caught.value)
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path / "config.yaml")


# ---- metrics.jsonl


LINES = [{"trainer/step": 10 * n, "train/loss": 4.0 / n, "val/loss": 4.5 / n} for n in range(1, 6)]


def test_metrics_are_on_disk_as_soon_as_they_are_logged(tmp_path: Path) -> None:
    for count, line in enumerate(LINES, 1):
        log_metrics(tmp_path, line)
        assert read_metrics(tmp_path / "metrics.jsonl") == LINES[:count]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    infinite = {"a": math.nan, "b": math.inf, "c": -math.inf}
    log_metrics(tmp_path, {"trainer/step": 1, "d": 1e300, **infinite})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"trainer/step": 1, "a": None, "b": None, "c": None, "d": 1e300}


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps(line) + "\n" for line in LINES)
    last = len(json.dumps(LINES[-1])) + 1
    for cut in range(1, last + 1):
        path.write_text(whole[:-cut])
        assert read_metrics(path) == LINES[:-1]


def test_a_missing_metrics_file_has_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


# ---- records: cut back to a checkpoint


METRICS = [
    json.dumps({"trainer/step": n, "train/loss": 4.0 / n, "val/loss": None}) + "\n"
    for n in range(1, 11)
]
HARD_SAMPLES = [
    "=== step 2\n\n\nblank lines\n\n\n\n\n",
    "=== step 4\nin it: === step 9\n\n",
    "=== step 6\nin it\n=== step by step\n=== step 9\n\n=== step 3\n\n\n",
    "=== step 8\n\r\ncarriage\rreturns\r\n\x0c\x1c\u2028\x85é😀\n\n",
    "=== step 10\n\n\n",
]


@pytest.mark.parametrize("kept", range(len(METRICS) + 1))
def test_metrics_of_later_steps_are_dropped_and_the_rest_is_kept_byte_for_byte(
    kept: int, tmp_path: Path
):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(METRICS[:kept]))
    sizes = record_sizes(tmp_path)
    with open(path, "a") as file:  # the last line was cut short by a kill
        file.write("".join(METRICS[kept:]) + METRICS[-1][: 10 + kept])
    cut_records(tmp_path, sizes)
    assert path.read_bytes() == "".join(METRICS[:kept]).encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("kept", range(len(HARD_SAMPLES) + 1))
def test_samples_of_later_steps_are_dropped_and_the_rest_is_kept_byte_for_byte(
    kept: int, tmp_path: Path
):
    path = tmp_path / "samples.txt"
    path.write_bytes("".join(HARD_SAMPLES[:kept]).encode())
    sizes = record_sizes(tmp_path)
    with open(path, "ab") as file:
        file.write("".join(HARD_SAMPLES[kept:]).encode() + "=== step 12\né😀".encode()[:-2])
    cut_records(tmp_path, sizes)
    assert path.read_bytes() == "".join(HARD_SAMPLES[:kept]).encode()


def test_records_of_a_run_that_never_saved_are_emptied(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text("".join(METRICS))
    (tmp_path / "samples.txt").write_text("".join(HARD_SAMPLES))
    cut_records(tmp_path, {})
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "samples.txt"}
    assert all(path.read_bytes() == b"" for path in tmp_path.iterdir())


def test_missing_records_are_not_created(tmp_path: Path):
    assert record_sizes(tmp_path) == {}
    cut_records(tmp_path, {"metrics.jsonl": 100, "samples.txt": 100, "../outside": 0})
    assert list(tmp_path.iterdir()) == []


def test_only_the_records_are_cut_whatever_a_header_names(tmp_path: Path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (tmp_path / "outside").write_text("x")
    (run_dir / "config.yaml").write_text("x")
    cut_records(run_dir, {"../outside": 0, str(tmp_path / "outside"): 0, "config.yaml": 0})
    assert (tmp_path / "outside").read_text() == (run_dir / "config.yaml").read_text() == "x"


def test_metrics_that_lost_their_end_in_a_power_cut_keep_complete_lines(tmp_path: Path):
    """An unflushed file can be shorter than at the checkpoint: no line may continue half of one."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(METRICS))
    sizes = record_sizes(tmp_path)
    os.truncate(path, len("".join(METRICS[:7])) + 9)
    cut_records(tmp_path, sizes)
    assert path.read_bytes() == "".join(METRICS[:7]).encode()
