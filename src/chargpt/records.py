"""What runs leave behind: run directories found and read back, and grouped into arms that differ in their seed alone."""

import dataclasses
import glob
import json
import os
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from chargpt.config import Config, ConfigError, flatten, from_plain, require, spell, to_plain
from chargpt.tracking import read_metrics

MAX_CONFIG_BYTES = 1 << 15
MAX_CONFIG_DEPTH = 8
# Settings that change neither what is learnt nor how fast: runs that differ in these alone are runs of one arm. A text is known
# by its hash, not by its place.
INCIDENTAL = {"seed", "mode", "resume", "dataset.filepath"} | {
    f"wandb.{name}" for name in ("project", "entity", "group", "name", "tags")
}
INCIDENTAL |= {f"trainer.{name}" for name in ("log_every", "checkpoint_every", "sample_chars", "max_skipped_steps")}
MAX_NAME = 40  # characters of an arm's name
MAX_VALUE = 24  # and of a value in it


@dataclasses.dataclass(frozen=True)
class Record:
    """One run directory, read."""

    path: Path
    config: Config
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    sample: str  # the newest text that it sampled

    def number(self, name: str) -> float | None:
        """A number of summary.json; None where there is none, or none that is finite."""
        value = self.summary.get(name)
        return value if is_number(value) and abs(value) <= sys.float_info.max else None

    @property
    def finished(self) -> bool:
        """Whether it came to its end, and to a loss."""
        reached = self.number("final/step") or 0
        return reached >= self.config.trainer.num_steps and self.number("best/val_loss") is not None

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that have a validation loss."""
        return [line for line in self.metrics if line.get("val/loss") is not None]

    @property
    def corpus(self) -> str:
        return str(self.summary.get("corpus_sha256", "?"))

    @property
    def jax(self) -> Any:
        """The version that it ran with."""
        versions = self.summary.get("versions")
        return versions.get("jax") if isinstance(versions, dict) else None

    def settings(self) -> dict[str, Any]:
        """All that may set a run apart, by dotted name."""
        flat = {name: value for name, value in flatten(to_plain(self.config)).items() if name not in INCIDENTAL}
        return flat | {"corpus_sha256": self.corpus[:12]}


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
        """Best validation loss minus that of `other`, seed by seed where both have the seed: what the seed does cancels."""
        common = [seed for seed in self.runs if seed in other.runs]
        losses = [(self.runs[seed].number("best/val_loss"), other.runs[seed].number("best/val_loss")) for seed in common]
        return {seed: mine - its for seed, (mine, its) in zip(common, losses, strict=True)}


def find_runs(places: Sequence[str]) -> list[Path]:
    """The run directories in `places`: folders, files inside of a run, or globs; ConfigError where one holds none."""
    found: dict[Path, Path] = {}  # by where it truly is: the path that it was given by
    for place in places:
        matches = [] if os.path.exists(place) else sorted(glob.glob(place, recursive=True), key=natural)
        here = [run for match in matches or [place] for run in runs_under(Path(match))]
        require(bool(here), f"{place}: holds no run (a folder with config.yaml and metrics.jsonl); train one with main.py")
        for run in here:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def runs_under(place: Path) -> list[Path]:
    """The run directories at, around (of a file) or below a path, in the order that a person counts: 2_b before 10_a."""
    if place.is_file():
        place = next(filter(is_run, place.parents), place.parent)
    folders = [path.parent for path in place.rglob("metrics.jsonl") if is_run(path.parent)]
    return sorted(folders, key=lambda folder: natural(str(folder)))


def is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file()


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_line(value: Any) -> bool:
    """Whether it could be a line of metrics.jsonl."""
    if not isinstance(value, dict):
        return False
    placed = all(is_number(value.get(f"trainer/{name}")) for name in ("step", "tokens", "seconds"))
    return placed and (value.get("val/loss") is None or is_number(value["val/loss"]))


def plain(text: str) -> str:
    """A text of somebody else's for one line of a terminal or a table."""
    return "".join(character if character.isprintable() else "?" for character in text)


def natural(text: str) -> list[tuple[int, str]]:
    """A sort key under which numbers inside of names count as numbers."""
    digits = "".join(character if character.isdigit() and character.isascii() else " " for character in text)
    key, rest = [], text
    for number in digits.split():
        before, _, rest = rest.partition(number)
        key += [(-1, before), (int(number), "")]
    return [*key, (-1, rest)]


def read_run(path: Path) -> Record:
    """A run directory; ConfigError where a file of it is not what a run writes. A summary that is not whole is none."""
    config = read_config(path / "config.yaml")
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        summary = {}
    try:
        metrics = read_metrics(path / "metrics.jsonl")
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: its metrics.jsonl cannot be read ({error})") from None
    whole = isinstance(summary, dict) and all(map(is_line, metrics))
    require(whole, f"{path}: its summary.json or metrics.jsonl holds something else than a run writes")
    samples_path = path / "samples.txt"
    samples = samples_path.read_text(encoding="utf-8", errors="replace") if samples_path.is_file() else ""
    _, _, newest = samples.rpartition("=== step ")
    return Record(path, config, summary, metrics, newest.partition("\n")[2].strip())


def read_config(path: Path) -> Config:
    """A run's config.yaml as data under our schema: no interpolation is resolved, no alias expanded, no object made."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: is too large for a configuration")
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"{path}: holds YAML aliases, which a saved configuration has none of")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_CONFIG_DEPTH:
                raise ConfigError(f"{path}: is nested deeper than a saved configuration")
        plain = yaml.safe_load(text)
        if not isinstance(plain, dict):
            raise ConfigError(f"{path}: is no saved configuration")
        return from_plain(plain)
    except FileNotFoundError:
        raise ConfigError(f"{path.parent}: is no run directory (it has no config.yaml)") from None
    except ConfigError:
        raise
    except Exception as error:  # YAML's constructors and OmegaConf raise what they please
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error


def group(records: Sequence[Record]) -> tuple[list[Arm], list[str]]:
    """(arms of the finished runs, in the order given; what was left out and why, a line each)."""
    remarks, groups = [], {}
    for record in records:
        if not record.finished:
            step = int(record.number("final/step") or max((line["trainer/step"] for line in record.metrics), default=0))
            remarks.append(f"left out, not finished: {record.path} (step {step} of {record.config.trainer.num_steps})")
            continue
        runs = groups.setdefault(json.dumps(record.settings(), sort_keys=True), {})
        if record.config.seed in runs:
            remarks.append(f"left out, a repetition of the same seed: {runs[record.config.seed].path}")
        runs[record.config.seed] = record
    names = name_arms([next(iter(runs.values())) for runs in groups.values()])
    return [Arm(name, runs) for name, runs in zip(names, groups.values(), strict=True)], remarks


def name_arms(records: Sequence[Record]) -> list[str]:
    """What sets each of some runs apart, as short as it can be said: `mqa`, `mqa match=params`.

    Where that is long, the name that the run was given (wandb.name), with a number where two have the same.
    """
    settings = [record.settings() for record in records]
    differing = [name for name in settings[0] if len({str(one[name]) for one in settings}) > 1] if settings else []
    last_parts = [name.rpartition(".")[2] for name in differing]
    short = {name: last if last_parts.count(last) == 1 else name for name, last in zip(differing, last_parts, strict=True)}

    def describe(one: dict[str, Any]) -> str:
        kind = [one["model.mha_type"]] if "model.mha_type" in differing or not differing else []
        others = [f"{short[name]}={spell(one[name])[:MAX_VALUE]}" for name in differing if name != "model.mha_type"]
        return " ".join(kind + others)

    names = [plain(describe(one)) for one in settings]
    if max(map(len, names), default=0) <= MAX_NAME and len(set(names)) == len(names):
        return names
    given = [plain(re.sub(r" seed=\d+", "", record.config.wandb.name))[:MAX_NAME] for record in records]
    return [
        f"{name} ({given[: number + 1].count(name)})" if given.count(name) > 1 else name for number, name in enumerate(given)
    ]
