"""Runs grouped into arms: those that differ only in their seed, under one name."""

import dataclasses
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from chargpt.config import spell
from chargpt.errors import one_line
from chargpt.run.directory import Record

MAX_NAME = 40  # characters of an arm's name
MAX_VALUE = 24  # and of a value in it


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
class Arm:
    """Runs that differ in their seed alone, one for each seed."""

    name: str  # the settings that set it apart from the other arms
    runs: dict[int, Record]

    def estimate(self, name: str) -> Estimate | None:
        """Of a number of summary.json, over the seeds."""
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
        if not record.finished:
            step = int(
                record.number("final/step")
                or max((line["trainer/step"] for line in record.metrics), default=0)
            )
            steps = record.config.trainer.num_steps
            remarks.append(f"left out, not finished: {record.path} (step {step} of {steps})")
            continue
        runs = groups.setdefault(json.dumps(record.settings(), sort_keys=True), {})
        if record.config.seed in runs:
            remarks.append(
                f"left out, a repetition of the same seed: {runs[record.config.seed].path}"
            )
        runs[record.config.seed] = record
    names = name_arms([next(iter(runs.values())) for runs in groups.values()])
    return [Arm(name, runs) for name, runs in zip(names, groups.values(), strict=True)], remarks


def name_arms(records: Sequence[Record]) -> list[str]:
    """What sets each of some runs apart, as short as it can be said: `mqa`, `mqa match=params`.

    If that is long, the name that the run was given (wandb.name), numbered if two have the same.
    """
    settings = [record.settings() for record in records]
    differing = (
        [name for name in settings[0] if len({str(one[name]) for one in settings}) > 1]
        if settings
        else []
    )
    last_parts = [name.rpartition(".")[2] for name in differing]
    short = {
        name: last if last_parts.count(last) == 1 else name
        for name, last in zip(differing, last_parts, strict=True)
    }

    def describe(one: dict[str, Any]) -> str:
        kind = [one["model.mha_type"]] if "model.mha_type" in differing or not differing else []
        others = [
            f"{short[name]}={spell(one[name])[:MAX_VALUE]}"
            for name in differing
            if name != "model.mha_type"
        ]
        return " ".join(kind + others)

    names = [one_line(describe(one)) for one in settings]
    if max(map(len, names), default=0) <= MAX_NAME and len(set(names)) == len(names):
        return names
    given = [
        one_line(re.sub(r" seed=\d+", "", record.config.wandb.name))[:MAX_NAME]
        for record in records
    ]
    return [
        f"{name} ({given[: number + 1].count(name)})" if given.count(name) > 1 else name
        for number, name in enumerate(given)
    ]
