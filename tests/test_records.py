"""Run directories found and read back, and grouped into arms that differ in their seed alone."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from fake_runs import CORPUS, compose, make_record, make_run
from hypothesis import given
from hypothesis import strategies as st

from chargpt import records
from chargpt.config import ConfigError
from chargpt.records import Arm, Estimate, find_runs, group, name_arms, natural, read_run

GIVEN = "wandb.name=fast"


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two runs with what Hydra and W&B leave beside, and a folder that is no run."""
    for name in ("10_a", "2_b"):
        run = make_run(tmp_path / "sweep" / name)
        for folder in (".hydra", "wandb/offline-run-1/files", "checkpoints"):
            (run / folder).mkdir(parents=True)
        for file in (".hydra/config.yaml", ".hydra/overrides.yaml", "wandb/offline-run-1/files/config.yaml"):
            (run / file).write_text("[]\n")
    (tmp_path / "sweep" / "notes").mkdir()
    return tmp_path / "sweep"


def names(places: list[Path | str]) -> list[str]:
    return [run.name for run in find_runs([str(place) for place in places])]


# ---- finding


def test_a_folder_gives_its_runs_in_the_order_that_a_person_counts(sweep: Path) -> None:
    assert find_runs([str(sweep)]) == [sweep / "2_b", sweep / "10_a"]
    assert names([sweep.parent]) == ["2_b", "10_a"]


def test_a_run_gives_itself(sweep: Path) -> None:
    assert find_runs([str(sweep / "2_b")]) == [sweep / "2_b"]


@pytest.mark.parametrize("file", ["config.yaml", "metrics.jsonl", "summary.json"])
def test_a_file_in_a_run_gives_the_run(sweep: Path, file: str) -> None:
    assert find_runs([str(sweep / "10_a" / file)]) == [sweep / "10_a"]


@pytest.mark.parametrize("file", ["checkpoints/best.eqx", ".hydra/overrides.yaml", "wandb/offline-run-1/files/config.yaml"])
def test_a_file_deep_inside_of_a_run_gives_the_run(sweep: Path, file: str) -> None:
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


def test_several_places_keep_their_order_and_count_a_run_once(sweep: Path) -> None:
    assert names([sweep / "10_a", sweep, sweep / "2_b"]) == ["10_a", "2_b"]


def test_a_run_that_is_named_in_two_ways_counts_once(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sweep)
    assert names(["2_b", sweep / "2_b", "../sweep/2_b"]) == ["2_b"]


def test_a_folder_with_brackets_in_its_name_is_that_folder(tmp_path: Path) -> None:
    for name in ("lr[1]", "lr1"):
        make_run(tmp_path / name)
    assert names([tmp_path / "lr[1]"]) == ["lr[1]"]


def test_an_equals_sign_and_spaces_in_a_name_are_no_matter(tmp_path: Path) -> None:
    run = make_run(tmp_path / "0_mqa seed=1, lr=1e-3")
    assert find_runs([str(run)]) == [run] == find_runs([str(tmp_path)])


@pytest.mark.parametrize("place", ["sweep/notes", "nowhere", "sweep/3*", "sweep/2_b/wandb", "sweep/2_b/.hydra"])
def test_a_place_without_a_run_is_named_in_one_line(sweep: Path, place: str) -> None:
    path = sweep.parent / place
    with pytest.raises(ConfigError) as caught:
        find_runs([str(sweep), str(path)])
    assert str(caught.value) == (f"{path}: holds no run (a folder with config.yaml and metrics.jsonl); train one with main.py")


# ---- numbers in names


@given(st.text(), st.text())
def test_any_two_names_have_an_order(one: str, other: str) -> None:
    assert (natural(one) < natural(other)) + (natural(other) < natural(one)) + (natural(one) == natural(other)) == 1


@given(st.text(st.characters(exclude_characters="0123456789")), st.integers(0), st.integers(0), st.integers(0, 3), st.text())
def test_numbers_in_names_count_as_numbers(before: str, small: int, step: int, zeros: int, after: str) -> None:
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
    run = make_run(tmp_path / "run", *overrides, val_losses=[2.0, 1.5, 1.75], summary={"num_params": 7}, sample="a\n\nb = c")
    record = read_run(run)
    assert record == make_record(
        *overrides, path=run, val_losses=[2.0, 1.5, 1.75], summary={"num_params": 7}, sample="a\n\nb = c"
    )
    assert record.finished
    assert [line["val/loss"] for line in record.evaluations] == [2.0, 1.5, 1.75]
    assert (record.config.seed, record.number("num_params"), record.number("best/step")) == (3, 7, 1066)


def test_half_a_last_line_of_metrics_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    whole = read_run(run)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"trainer/step": 1')
    assert read_run(run) == whole


@pytest.mark.parametrize("damage", [None, "", '{"best/val_loss": 2', "\ufffe\x00", "[" * 100_000])
def test_a_summary_that_is_missing_or_damaged_leaves_a_run_unfinished(tmp_path: Path, damage: str | None) -> None:
    run = make_run(tmp_path / "run")
    (run / "summary.json").unlink()
    if damage is not None:
        (run / "summary.json").write_text(damage)
    record = read_run(run)
    assert (record.summary, record.finished, record.number("best/val_loss")) == ({}, False, None)
    assert len(record.evaluations) == 3


def test_without_samples_there_is_an_empty_text(tmp_path: Path) -> None:
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
def test_a_file_that_no_run_writes_is_named_in_one_line(tmp_path: Path, file: str, content: bytes) -> None:
    run = make_run(tmp_path / "run")
    (run / file).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_run(run)
    text = str(caught.value)
    assert text.isprintable() and len(text) < 400
    assert file == "config.yaml" or (text.startswith(f"{run}: ") and file in text)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("2", 2), ("2.5", 2.5), ("0", 0), ("null", None), ("true", None), ("NaN", None), ("-Infinity", None), ('"2"', None),
     ("[2]", None), ("1" + "0" * 400, None)],
)  # fmt: skip
def test_only_finite_numbers_are_numbers(tmp_path: Path, value: str, expected: float | None) -> None:
    run = make_run(tmp_path / "run")
    (run / "summary.json").write_text(f'{{"best/val_loss": {value}, "final/step": 1600}}')
    record = read_run(run)
    assert record.number("best/val_loss") == expected
    assert record.number("no such number") is None
    assert record.finished == (expected is not None)


# ---- grouping


@pytest.mark.parametrize("setting", ["wandb.name=other", "wandb.tags=[x]", "trainer.log_every=7", "mode=online"])
def test_what_changes_neither_loss_nor_speed_sets_no_runs_apart(setting: str) -> None:
    arms, remarks = group([make_record("seed=0"), make_record("seed=1", setting)])
    assert [(arm.name, list(arm.runs)) for arm in arms] == [("standard", [0, 1])] and remarks == []


@pytest.mark.parametrize("setting", ["model.mha_type=mqa", "optimizer.learning_rate=1e-3", "trainer.precision=bfloat16"])
def test_other_settings_set_arms_apart(setting: str) -> None:
    arms, remarks = group([make_record("seed=0"), make_record("seed=0", setting), make_record("seed=1", setting)])
    assert [list(arm.runs) for arm in arms] == [[0], [0, 1]] and remarks == []


def test_another_text_sets_arms_apart() -> None:
    arms, _ = group([make_record(), make_record(summary={"corpus_sha256": "0" * 64})])
    assert [arm.name for arm in arms] == [f"corpus_sha256={CORPUS[:12]}", f"corpus_sha256={'0' * 12}"]


def test_runs_without_an_end_are_left_out_and_said() -> None:
    runs = [
        make_record("seed=0", path=Path("whole")),
        make_record("seed=1", path=Path("stopped"), summary={"final/step": 800}),
        make_record("seed=2", path=Path("nan"), summary={"best/val_loss": None}),
        records.Record(Path("killed"), compose("seed=3"), {}, make_record().metrics[:4], ""),
        records.Record(Path("begun"), compose("seed=4"), {}, [], ""),
    ]
    arms, remarks = group(runs)
    assert [arm.runs for arm in arms] == [{0: runs[0]}]
    assert remarks == [
        f"left out, not finished: {name} (step {step} of 1600)"
        for name, step in {"stopped": 800, "nan": 1600, "killed": 1066, "begun": 0}.items()
    ]


def test_of_a_repeated_seed_the_last_run_counts_and_the_other_is_said() -> None:
    runs = [make_record(path=Path(name)) for name in "abc"]
    arms, remarks = group(runs)
    assert [arm.runs for arm in arms] == [{0: runs[2]}]
    assert remarks == [f"left out, a repetition of the same seed: {name}" for name in "ab"]


def test_nothing_to_group_gives_no_arms() -> None:
    assert group([]) == ([], [])


# ---- names


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([[]], ["standard"]),
        ([[], ["model.mha_type=mqa"]], ["standard", "mqa"]),
        ([[], ["model.mha_type=mqa", "model.match=params"]], ["standard match=none", "mqa match=params"]),
        ([[], ["optimizer.learning_rate=1e-3"]], ["learning_rate=0.003", "learning_rate=0.001"]),
        ([[], ["model.rope=false"], ["model.d_ff=64"]], ["d_ff=null rope=true", "d_ff=null rope=false", "d_ff=64 rope=true"]),
    ],
)
def test_an_arm_is_named_by_what_sets_it_apart(settings: list[list[str]], expected: list[str]) -> None:
    assert name_arms([make_record(*overrides) for overrides in settings]) == expected


def test_options_whose_last_parts_are_equal_are_spelled_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_NAME", 80)
    other = ["optimizer.name=muon", "dataset.name=tinyshakespeare"]
    assert name_arms([make_record(), make_record(*other)]) == [
        "dataset.name=shakespeare optimizer.name=adamw",
        "dataset.name=tinyshakespeare optimizer.name=muon",
    ]


LONG = ["model.d_model=64", "optimizer.learning_rate=1e-3", "optimizer.warmup_steps=7"]


def test_where_that_is_long_an_arm_has_the_name_that_its_run_was_given() -> None:
    assert name_arms([make_record(), make_record(*LONG, "wandb.name=small")]) == ["standard", "small"]


def test_given_names_are_numbered_where_they_are_equal_and_cut_where_they_are_long() -> None:
    runs = [make_record(GIVEN), make_record(*LONG, GIVEN), make_record(*LONG, f"wandb.name={'x' * 50}")]
    assert name_arms(runs) == ["fast (1)", "fast (2)", "x" * 40]


def test_a_given_name_loses_the_seed_which_all_of_the_arms_runs_would_not_share() -> None:
    runs = [make_record("wandb.name='mqa seed=0 lr=1'"), make_record(*LONG, "wandb.name='mqa lr=2 seed=10'")]
    assert name_arms(runs) == ["mqa lr=1", "mqa lr=2"]


def test_names_are_as_many_as_arms_even_where_long_paths_begin_alike() -> None:
    text = "dataset.filepath=/a/long/path/to/the/texts/{}.txt"
    runs = [make_record("dataset.name=file", text.format(name)) for name in ("one", "two")]
    assert len(set(name_arms(runs))) == 2


@pytest.mark.parametrize("name", ["a\x1b[31mb", "a\nb", "a\u202eb"])
def test_names_are_printable(name: str) -> None:
    runs = [make_record(), make_record(*LONG, f"wandb.name={json.dumps(name)}")]
    assert [name.isprintable() for name in name_arms(runs)] == [True, True]


# ---- estimates


@given(st.lists(st.floats(-1e3, 1e3), min_size=2))
def test_an_estimate_is_mean_and_sample_standard_deviation(values: list[float]) -> None:
    estimate = Estimate.of(values)
    assert estimate is not None and estimate.spread is not None
    np.testing.assert_allclose([estimate.mean, estimate.spread], [np.mean(values), np.std(values, ddof=1)], atol=1e-9)


def test_a_single_value_has_no_spread_and_no_value_no_estimate() -> None:
    assert Estimate.of([2.5]) == Estimate(2.5, None)
    assert Estimate.of([None, 2.5, None]) == Estimate(2.5, None)
    assert Estimate.of([None]) is None and Estimate.of([]) is None


def test_missing_values_are_left_out() -> None:
    assert Estimate.of([1.0, None, 2.0, 6.0]) == Estimate(3.0, statistics.stdev([1.0, 2.0, 6.0]))


def make_arm(name: str, losses: dict[int, float]) -> Arm:
    return Arm(name, {seed: make_record(f"seed={seed}", val_losses=[loss]) for seed, loss in losses.items()})


def test_arms_are_compared_seed_by_seed() -> None:
    first = make_arm("first", {0: 2.0, 1: 2.5, 2: 3.0})
    other = make_arm("other", {2: 2.85, 3: 9.0, 1: 2.45, 0: 1.9})
    difference = other.difference(first)
    assert difference == pytest.approx({0: -0.1, 1: -0.05, 2: -0.15})
    paired = Estimate.of(difference.values())
    assert paired is not None and (paired.mean, paired.spread) == pytest.approx((-0.1, 0.05))
    assert first.estimate("best/val_loss") == Estimate(2.5, 0.5)
    assert first.difference(other) == pytest.approx({0: 0.1, 1: 0.05, 2: 0.15})


def test_arms_without_a_seed_in_common_have_no_difference() -> None:
    assert make_arm("one", {0: 2.0}).difference(make_arm("other", {1: 2.0})) == {}


def test_an_estimate_of_an_arm_skips_runs_without_the_number() -> None:
    runs = {0: make_record(summary={"num_params": None}), 1: make_record(summary={"num_params": 5})}
    assert Arm("arm", runs).estimate("num_params") == Estimate(5, None)
    assert Arm("arm", runs).estimate("no such number") is None


def test_a_summary_from_disk_keeps_every_digit(tmp_path: Path) -> None:
    loss = 1.8916341882885004
    assert read_run(make_run(tmp_path / "run", val_losses=[loss])).number("best/val_loss") == loss
    assert json.loads((tmp_path / "run/summary.json").read_text())["best/val_loss"] == loss
