"""Runs grouped into arms that differ only in their seed; names of arms; estimates over seeds."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from fake_runs import CORPUS, make_record, named_config
from hypothesis import given
from hypothesis import strategies as st

from chargpt.run.directory import Record
from chargpt.study.arms import Arm, Difference, Estimate, best_of, group, name_arms

GIVEN = "wandb.name=fast"


# ---- grouping


@pytest.mark.parametrize(
    "setting", ["wandb.name=other", "wandb.tags=[x]", "trainer.log_every=7", "mode=online"]
)
def test_an_option_that_changes_neither_loss_nor_speed_sets_no_runs_apart(setting: str) -> None:
    arms, remarks = group([make_record("seed=0"), make_record("seed=1", setting)])
    assert [(arm.name, list(arm.runs)) for arm in arms] == [("standard", [0, 1])] and remarks == []


@pytest.mark.parametrize(
    "setting", ["model.mha_type=mqa", "optimizer.learning_rate=1e-3", "trainer.precision=bfloat16"]
)
def test_other_settings_set_arms_apart(setting: str) -> None:
    others = [make_record(seed, setting) for seed in ("seed=0", "seed=1")]
    arms, remarks = group([make_record("seed=0"), *others])
    assert [list(arm.runs) for arm in arms] == [[0], [0, 1]] and remarks == []


def test_another_text_sets_arms_apart() -> None:
    arms, _ = group([make_record(), make_record(summary={"corpus_sha256": "0" * 64})])
    hashes = [CORPUS[:12], "0" * 12]
    assert [arm.name for arm in arms] == [f"corpus_sha256={digest}" for digest in hashes]


def test_runs_without_an_end_are_left_out_and_reported() -> None:
    runs = [
        make_record("seed=0", path=Path("complete")),
        make_record("seed=1", path=Path("stopped"), summary={"final/step": 800}),
        make_record("seed=2", path=Path("nan"), summary={"best/val_loss": None}),
        Record(Path("killed"), named_config("seed=3"), {}, make_record().metrics[:4], ""),
        Record(Path("started"), named_config("seed=4"), {}, [], ""),
    ]
    arms, remarks = group(runs)
    assert [arm.runs for arm in arms] == [{0: runs[0]}]
    assert remarks == [
        f"left out, not finished: {name} (step {step} of 1600)"
        for name, step in {"stopped": 800, "nan": 1600, "killed": 1066, "started": 0}.items()
    ]


def test_of_a_repeated_seed_the_last_run_counts_and_the_others_are_reported() -> None:
    runs = [make_record(path=Path(name)) for name in "abc"]
    arms, remarks = group(runs)
    assert [arm.runs for arm in arms] == [{0: runs[2]}]
    assert remarks == [f"left out, a repetition of the same seed: {name}" for name in "ab"]


def test_nothing_to_group_gives_no_arms() -> None:
    assert group([]) == ([], [])


def test_of_arms_that_differ_in_an_option_the_best_has_the_lowest_mean_over_common_seeds() -> None:
    losses = {"1e-3": [2.0, 2.4], "2e-3": [2.3, 1.9, 9.0]}
    runs = [
        make_record(f"seed={seed}", f"optimizer.learning_rate={rate}", val_losses=[loss])
        for rate in losses
        for seed, loss in enumerate(losses[rate])
    ]
    mqa = make_record("model.mha_type=mqa")
    chosen, remark = best_of(["optimizer.learning_rate"], group([*runs, mqa])[0])
    assert [list(arm.runs.values()) for arm in chosen] == [runs[2:], [mqa]]
    assert [arm.name for arm in chosen] == [
        "standard learning_rate=0.002",
        "mqa learning_rate=0.003",
    ]
    assert remark.startswith(
        "each arm is the best of 1 to 2 that differ in optimizer.learning_rate"
    )
    apart = group([*runs[:2], runs[4]])[0]  # no seed in common
    assert best_of(["optimizer.learning_rate"], apart)[0][0].runs == apart[0].runs
    assert [arm.runs for arm in best_of(["model.d_ff"], apart)[0]] == [arm.runs for arm in apart]


# ---- names


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([[]], ["standard"]),
        ([[], ["model.mha_type=mqa"]], ["standard", "mqa"]),
        (
            [[], ["model.mha_type=mqa", "model.match=params"]],
            ["standard match=none", "mqa match=params"],
        ),
        ([[], ["optimizer.learning_rate=1e-3"]], ["learning_rate=0.003", "learning_rate=0.001"]),
        (
            [[], ["model.rope=false"], ["model.d_ff=64"]],
            ["d_ff=null rope=true", "d_ff=null rope=false", "d_ff=64 rope=true"],
        ),
    ],
)
def test_an_arm_is_named_by_what_sets_it_apart(
    settings: list[list[str]], expected: list[str]
) -> None:
    assert name_arms([make_record(*overrides) for overrides in settings]) == expected


def test_options_whose_last_parts_are_equal_have_their_full_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("chargpt.study.arms.MAX_NAME", 80)
    other = ["optimizer.name=muon", "dataset.name=tinyshakespeare"]
    assert name_arms([make_record(), make_record(*other)]) == [
        "dataset.name=shakespeare optimizer.name=adamw",
        "dataset.name=tinyshakespeare optimizer.name=muon",
    ]


def test_if_that_is_long_an_arm_is_named_by_what_sets_it_apart_from_the_first() -> None:
    changes = [
        [],
        ["model.window=8"],
        ["model.window=8", "model.window_pattern=LLG"],
        ["model.output_gate=element"],
    ]
    expected = ["standard", "window=8", "window=8 window_pattern=LLG", "output_gate=element"]
    assert name_arms([make_record(*overrides) for overrides in changes]) == expected
    mqa = make_record("model.mha_type=mqa", "model.output_gate=head")
    names = name_arms([*(make_record(*overrides) for overrides in changes), mqa])
    several = [f"standard {name}" for name in expected[1:]]
    assert names == ["standard", *several, "mqa output_gate=head"]


LONG = ["model.d_model=64", "optimizer.learning_rate=1e-3", "optimizer.warmup_steps=7"]


def test_if_that_is_long_an_arm_has_the_name_that_its_run_was_given() -> None:
    runs = [make_record(), make_record(*LONG, "wandb.name=small")]
    assert name_arms(runs) == ["standard", "small"]


def test_given_names_are_numbered_if_they_are_equal_and_truncated_if_they_are_long() -> None:
    long_name = f"wandb.name={'x' * 50}"
    runs = [make_record(GIVEN), make_record(*LONG, GIVEN), make_record(*LONG, long_name)]
    assert name_arms(runs) == ["fast (1)", "fast (2)", "x" * 40]


def test_a_given_name_loses_its_seed_in_which_the_runs_of_an_arm_differ() -> None:
    first = make_record("wandb.name='mqa seed=0 lr=1'")
    second = make_record(*LONG, "wandb.name='mqa lr=2 seed=10'")
    assert name_arms([first, second]) == ["mqa lr=1", "mqa lr=2"]


def test_names_are_as_many_as_arms_even_if_long_paths_start_alike() -> None:
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
    expected = [np.mean(values), np.std(values, ddof=1)]
    np.testing.assert_allclose([estimate.mean, estimate.spread], expected, atol=1e-9)


def test_a_single_value_has_no_spread_and_no_value_no_estimate() -> None:
    assert Estimate.of([2.5]) == Estimate(2.5, None)
    assert Estimate.of([None, 2.5, None]) == Estimate(2.5, None)
    assert Estimate.of([None]) is None and Estimate.of([]) is None


def test_missing_values_are_left_out() -> None:
    assert Estimate.of([1.0, None, 2.0, 6.0]) == Estimate(3.0, statistics.stdev([1.0, 2.0, 6.0]))


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9))
def test_the_interval_is_that_of_the_paired_t_test(values: list[float]) -> None:
    found = Difference.of(values)
    assert found is not None and found.interval is not None
    low, high = found.mean - found.interval, found.mean + found.interval
    deviation = np.std(values, ddof=1)
    if deviation > 1e-6:
        ends = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
        np.testing.assert_allclose([low, high], ends, rtol=1e-6, atol=1e-6)
    assert found.agreeing == sum(value * np.copysign(1, found.mean) > 0 for value in values)


def test_of_a_single_pair_there_is_no_interval() -> None:
    assert Difference.of([-0.5]) == Difference(-0.5, None, 1, 1)
    assert Difference.of([0.5, -0.25, 1.0, 2.0]).agreeing == 3
    assert Difference.of([]) is None


def make_arm(name: str, losses: dict[int, float]) -> Arm:
    runs = {s: make_record(f"seed={s}", val_losses=[loss]) for s, loss in losses.items()}
    return Arm(name, runs)


def test_arms_are_compared_seed_by_seed() -> None:
    first = make_arm("first", {0: 2.0, 1: 2.5, 2: 3.0})
    other = make_arm("other", {2: 2.85, 3: 9.0, 1: 2.45, 0: 1.9})
    difference = other.difference(first)
    assert difference == pytest.approx({0: -0.1, 1: -0.05, 2: -0.15})
    paired = Difference.of(list(difference.values()))
    assert paired is not None and (paired.agreeing, paired.pairs) == (3, 3)
    # t(0.975, 2 degrees of freedom) = 4.303
    assert (paired.mean, paired.interval) == pytest.approx((-0.1, 4.303 * 0.05 / 3**0.5), rel=1e-3)
    assert first.estimate("best/val_loss") == Estimate(2.5, 0.5)
    assert first.difference(other) == pytest.approx({0: 0.1, 1: 0.05, 2: 0.15})


def test_arms_without_a_seed_in_common_have_no_difference() -> None:
    assert make_arm("one", {0: 2.0}).difference(make_arm("other", {1: 2.0})) == {}


def test_an_estimate_of_an_arm_skips_runs_without_the_number() -> None:
    runs = {0: make_record(summary={"num_params": None}), 1: make_record(summary={"num_params": 5})}
    assert Arm("arm", runs).estimate("num_params") == Estimate(5, None)
    assert Arm("arm", runs).estimate("no such number") is None
