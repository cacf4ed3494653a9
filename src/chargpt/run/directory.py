"""A run directory: the files that a run writes, read back without trusting them."""

import dataclasses
import glob
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from chargpt.config import Config, from_plain, options, settings_of, to_yaml
from chargpt.errors import ConfigError, one_line, require
from chargpt.files import write_durably

MAX_CONFIG_BYTES = 1 << 15
MAX_CONFIG_DEPTH = 8
RECORDS = ("metrics.jsonl", "samples.txt")  # files that grow during the run


def write_config(run_dir: Path, config: Config) -> None:
    """config.yaml: the resolved configuration."""
    write_durably(run_dir / "config.yaml", to_yaml(config).encode())


def log_metrics(run_dir: Path, metrics: dict[str, int | float]) -> None:
    """Append a line to metrics.jsonl, on disk at once; a number that is not finite becomes null."""
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(finite) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, except a last one that a crash cut short."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def record_sizes(run_dir: Path) -> dict[str, int]:
    """Bytes of every record of a run, as a checkpoint keeps them."""
    paths = filter(Path.exists, (run_dir / name for name in RECORDS))
    return {path.name: path.stat().st_size for path in paths}


def cut_records(run_dir: Path, sizes: dict[str, int]) -> None:
    """Cut the records back to a checkpoint: the steps after it are trained again."""
    for name, now in record_sizes(run_dir).items():
        path, size = run_dir / name, sizes.get(name, 0)
        if now < size:  # a power cut took its end: keep complete lines only
            size = path.read_bytes().rfind(b"\n") + 1
        os.truncate(path, size)


@dataclasses.dataclass(frozen=True)
class Record:
    """One run directory, read."""

    path: Path
    config: Config
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    sample: str  # the newest text that it sampled

    def number(self, name: str) -> float | None:
        """A number of summary.json; None if it is missing or not finite."""
        value: Any = self.summary.get(name)
        return value if is_number(value) and abs(value) <= sys.float_info.max else None

    @property
    def best_loss(self) -> float:
        """The best validation loss; infinity if the run reached none."""
        loss = self.number("best/val_loss")
        return math.inf if loss is None else loss

    @property
    def finished(self) -> bool:
        """Whether it reached its end, and a loss."""
        step, best_step = (self.number(name) for name in ("final/step", "best/step"))
        best_step = None if best_step is None else int(best_step)
        return self.config.ends_at(int(step or 0), best_step) and self.best_loss < math.inf

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that have a validation loss."""
        return [line for line in self.metrics if line.get("val/loss") is not None]

    @property
    def corpus(self) -> str:
        return str(self.summary.get("corpus_sha256", "?"))

    @property
    def jax(self) -> Any:
        """The version of jax that it ran with."""
        versions = self.summary.get("versions")
        return versions.get("jax") if isinstance(versions, dict) else None

    def settings(self) -> dict[str, Any]:
        """Everything that may set a run apart from others, except its seed, by dotted name."""
        left_out = {"seed", *(name for name, (_, facts) in options().items() if facts.incidental)}
        every = settings_of(self.config) | {"corpus_sha256": self.corpus[:12]}
        return {name: value for name, value in every.items() if name not in left_out}


def find_runs(places: Sequence[str]) -> list[Path]:
    """The runs in `places`: folders, files inside a run, or globs; ConfigError if one has none."""
    found: dict[Path, Path] = {}  # by its real path: the path that it was given by
    for place in places:
        matches = [place] if os.path.exists(place) else glob.glob(place, recursive=True)
        paths = map(Path, sorted(matches, key=natural))
        here = [run for path in paths for run in runs_under(path)]
        problem = f"{place}: holds no run (a folder with config.yaml and metrics.jsonl)"
        require(bool(here), f"{problem}; train one with main.py")
        for run in here:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def runs_under(place: Path) -> list[Path]:
    """The runs at, around (of a file) or below a path, in natural order: 2_b before 10_a."""
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
    numbers = [value.get(f"trainer/{name}") for name in ("step", "tokens", "seconds")]
    numbers += [] if value.get("val/loss") is None else [value["val/loss"]]
    return all(map(is_number, numbers))


def natural(text: str) -> list[tuple[int, str]]:
    """A sort key under which numbers inside names count as numbers."""
    parts = enumerate(re.split("([0-9]+)", text))
    return [(int(part), "") if index % 2 else (-1, part) for index, part in parts]


def read_run(path: Path) -> Record:
    """A run; ConfigError if a file is not what a run writes, but a damaged summary is empty."""
    config, summary = read_config(path / "config.yaml"), read_summary(path)
    try:
        metrics = read_metrics(path / "metrics.jsonl")
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: its metrics.jsonl cannot be read ({error})") from None
    ours = isinstance(summary, dict) and all(map(is_line, metrics))
    require(ours, f"{path}: its summary.json or metrics.jsonl is not one that a run writes")
    samples = path / "samples.txt"
    text = samples.read_text(encoding="utf-8", errors="replace") if samples.is_file() else ""
    newest = text.rpartition("=== step ")[2]
    return Record(path, config, summary, metrics, newest.partition("\n")[2].strip())


def read_summary(run_dir: Path) -> Any:
    """summary.json; empty if there is none, or it is damaged."""
    try:
        return json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}


def read_config(path: Path) -> Config:
    """A run's config.yaml as plain data: nothing is resolved, expanded or instantiated."""
    try:
        require(path.stat().st_size <= MAX_CONFIG_BYTES, "is too large for a configuration")
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            is_alias = isinstance(event, yaml.AliasEvent)
            require(not is_alias, "holds YAML aliases; a saved configuration has none")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            require(depth <= MAX_CONFIG_DEPTH, "is nested deeper than a saved configuration")
        plain = yaml.safe_load(text)
        require(isinstance(plain, dict), "is not a saved configuration")
        return from_plain(plain)
    except FileNotFoundError:
        problem = f"{path.parent}: is not a run directory (it has no config.yaml)"
        raise ConfigError(problem) from None
    except Exception as error:  # YAML's constructors and OmegaConf raise anything
        raise ConfigError(f"{path}: cannot be read ({one_line(error)})") from error
