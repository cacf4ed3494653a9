"""Runs grouped into arms: those that differ only in their seed, under one name."""

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from scipy.special import stdtrit

from chargpt.config import spell
from chargpt.errors import one_line
from chargpt.run.directory import Record

MAX_NAME = 40  # characters of an arm's name
MAX_VALUE = 24  # characters of a value in it
TYPE = "model.mha_type"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Mean and spread (sample standard deviation; None for a single value) of some runs."""

    mean: float
    spread: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Estimate | None":
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Losses of one arm minus those of another, pair by pair."""

    mean: float
    # Half of the 95 % confidence interval of the mean: Student's t over pairs; None of a single one
    interval: float | None
    agreeing: int  # pairs whose difference has the sign of the mean
    pairs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Difference | None":
        estimate, pairs = Estimate.of(values), len(values)
        if estimate is None:
            return None
        interval = None
        if estimate.spread is not None:
            quantile = float(stdtrit(pairs - 1, 0.975))
            interval = quantile * estimate.spread / math.sqrt(pairs)
        sign = math.copysign(1, estimate.mean)
        agreeing = sum(sign * value > 0 for value in values)
        return cls(estimate.mean, interval, agreeing, pairs)


@dataclasses.dataclass(frozen=True)
class Arm:
    """Runs that differ only in their seed, one for each seed."""

    name: str  # the settings that set it apart from the other arms
    runs: dict[int, Record]

    @property
    def first_run(self) -> Record:
        """The run with the lowest seed."""
        return self.runs[min(self.runs)]

    @property
    def best_loss(self) -> float:
        """The best validation loss, mean over the seeds."""
        return statistics.fmean(run.best_loss for run in self.runs.values())

    def estimate(self, name: str) -> Estimate | None:
        """Mean and spread over the seeds of a number in summary.json."""
        return Estimate.of(run.number(name) for run in self.runs.values())

    def difference(self, other: "Arm") -> dict[int, float]:
        """Best validation loss minus that of `other`, by seed, for the seeds that both have."""
        common = [seed for seed in self.runs if seed in other.runs]
        return {seed: self.runs[seed].best_loss - other.runs[seed].best_loss for seed in common}


def group(records: Sequence[Record]) -> tuple[list[Arm], list[str]]:
    """(arms of the finished runs, in the order given; what was left out and why, a line each)."""
    remarks: list[str] = []
    groups: dict[str, dict[int, Record]] = {}
    for record in records:
        steps, seed = record.config.trainer.num_steps, record.config.seed
        if not record.finished:
            logged = max((line["trainer/step"] for line in record.metrics), default=0)
            step = int(record.number("final/step") or logged)
            remarks.append(f"left out, not finished: {record.path} (step {step} of {steps})")
            continue
        runs = groups.setdefault(setting_key(record), {})
        if seed in runs:
            remarks.append(f"left out, a repetition of the same seed: {runs[seed].path}")
        runs[seed] = record
    return named(groups.values()), remarks


def named(groups: Iterable[dict[int, Record]]) -> list[Arm]:
    """An arm of each group of runs, by seed."""
    groups = list(groups)
    return list(map(Arm, name_arms([next(iter(runs.values())) for runs in groups]), groups))


def best_of(names: Sequence[str], arms: Sequence[Arm]) -> tuple[list[Arm], str]:
    """(of the arms that differ only in these options, the best of each; a remark on the choice).

    Types need not like the same learning rate: with ["optimizer.learning_rate"], each is compared
    at its own.
    """
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        groups.setdefault(setting_key(arm.first_run, names), []).append(arm)
    counts = [len(tried) for tried in groups.values()]
    number = f"{min(counts)} to {max(counts)}" if len(set(counts)) > 1 else f"{counts[0]}"
    apart = ", ".join(names)
    remark = f"each arm is the best of {number} that differ in {apart}, chosen by the loss shown"
    return named(best(tried).runs for tried in groups.values()), remark


def best(arms: Sequence[Arm]) -> Arm:
    """The lowest mean loss over the seeds that all have, or over its own if they share none."""
    common = set.intersection(*(set(arm.runs) for arm in arms))

    def loss(arm: Arm) -> float:
        return statistics.fmean(arm.runs[seed].best_loss for seed in common or arm.runs)

    return min(arms, key=loss)


def one_of_each(
    records: Sequence[Record], rank: Callable[[Record], float] = lambda _: 0.0
) -> list[Record]:
    """Of runs that differ only in their seed, the one with the lowest rank, or the first."""
    chosen: dict[str, Record] = {}
    for record in records:
        one = chosen.setdefault(setting_key(record), record)
        if rank(record) < rank(one):
            chosen[setting_key(record)] = record
    return list(chosen.values())


def setting_key(record: Record, apart: Sequence[str] = ()) -> str:
    """The same for runs that differ only in their seed, and in the options `apart` from it."""
    settings = {name: value for name, value in record.settings().items() if name not in apart}
    return json.dumps(settings, sort_keys=True)


def name_arms(records: Sequence[Record]) -> list[str]:
    """What sets each of some runs apart, in as few words as possible: `mqa`, `mqa match=params`.

    If that is long for one of them, what sets each apart from the first: `standard`, `window=16`.
    If that is long too, the names that the runs were given (wandb.name), numbered if two are equal.
    """
    settings = [record.settings() for record in records]
    every = settings[0] if settings else {}
    differing = [name for name in every if len({str(one[name]) for one in settings}) > 1]
    last_parts = [name.rpartition(".")[2] for name in differing]
    labels = {
        name: name if last_parts.count(last) > 1 else last
        for name, last in zip(differing, last_parts, strict=True)
        if name != TYPE
    }

    def describe(one: dict[str, Any], shown: Iterable[str]) -> str:
        values = [f"{labels[name]}={spell(one[name])[:MAX_VALUE]}" for name in shown]
        kind = [one[TYPE]] if TYPE in differing or not values else []
        return one_line(" ".join(kind + values))

    complete = [describe(one, labels) for one in settings]
    changed = [[name for name in labels if str(one[name]) != str(every[name])] for one in settings]
    for names in (complete, list(map(describe, settings, changed))):
        if max(map(len, names), default=0) <= MAX_NAME and len(set(names)) == len(names):
            return names
    typed = [re.sub(r" seed=\d+", "", record.config.wandb.name) for record in records]
    given = [one_line(name)[:MAX_NAME] for name in typed]
    return [
        f"{name} ({given[: number + 1].count(name)})" if given.count(name) > 1 else name
        for number, name in enumerate(given)
    ]
