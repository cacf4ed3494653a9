"""A run directory: the files that a run writes, and the same files read back without trusting them."""

import dataclasses
import glob
import json
import math
import os
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
RECORDS = ("metrics.jsonl", "samples.txt")  # files that grow as the run goes on


def write_config(run_dir: Path, config: Config) -> None:
    """config.yaml: the resolved configuration."""
    write_durably(run_dir / "config.yaml", to_yaml(config).encode())


def log_metrics(run_dir: Path, metrics: dict[str, int | float]) -> None:
    """Append a line to metrics.jsonl, on disk at once; what is not finite is null there."""
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(finite) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a last one that a crash cut short."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def record_sizes(run_dir: Path) -> dict[str, int]:
    """Bytes of every record of a run, as a checkpoint keeps them."""
    paths = [run_dir / name for name in RECORDS]
    return {path.name: path.stat().st_size for path in paths if path.exists()}


def cut_records(run_dir: Path, sizes: dict[str, int]) -> None:
    """Cut the records back to what they were at a checkpoint: the steps after it are trained again."""
    for name in RECORDS:
        path = run_dir / name
        if path.exists():
            size = sizes.get(name, 0)
            if path.stat().st_size < size:  # its end was lost with the power: keep whole lines only
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
        reached = self.number("final/step") or 0
        steps = self.config.trainer.num_steps
        return reached >= steps and self.best_loss < math.inf

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
        """Everything that may set a run apart from others, its seed excepted, by dotted name."""
        skipped = {name for name, (_, facts) in options().items() if facts.incidental} | {"seed"}
        flat = {n: value for n, value in settings_of(self.config).items() if n not in skipped}
        return flat | {"corpus_sha256": self.corpus[:12]}


def find_runs(places: Sequence[str]) -> list[Path]:
    """The run directories in `places`: folders, files inside a run, or globs; ConfigError if one has none."""
    found: dict[Path, Path] = {}  # by its real path: the path that it was given by
    for place in places:
        exists = os.path.exists(place)
        matches = [] if exists else sorted(glob.glob(place, recursive=True), key=natural)
        here = [run for match in matches or [place] for run in runs_under(Path(match))]
        require(
            bool(here),
            f"{place}: holds no run (a folder with config.yaml and metrics.jsonl); "
            "train one with main.py",
        )
        for run in here:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def runs_under(place: Path) -> list[Path]:
    """The run directories at, around (of a file) or below a path, in natural order: 2_b before 10_a."""
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


def natural(text: str) -> list[tuple[int, str]]:
    """A sort key under which numbers inside names count as numbers."""
    ascii_digit = [character.isdigit() and character.isascii() for character in text]
    digits = "".join(c if is_digit else " " for c, is_digit in zip(text, ascii_digit, strict=True))
    key, rest = [], text
    for number in digits.split():
        before, _, rest = rest.partition(number)
        key += [(-1, before), (int(number), "")]
    return [*key, (-1, rest)]


def read_run(path: Path) -> Record:
    """A run directory; ConfigError if a file is not what a run writes. A damaged summary counts as none."""
    config = read_config(path / "config.yaml")
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        summary = {}
    try:
        metrics = read_metrics(path / "metrics.jsonl")
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: its metrics.jsonl cannot be read ({error})") from None
    require(
        isinstance(summary, dict) and all(map(is_line, metrics)),
        f"{path}: its summary.json or metrics.jsonl is not one that a run writes",
    )
    samples = path / "samples.txt"
    text = samples.read_text(encoding="utf-8", errors="replace") if samples.is_file() else ""
    newest = text.rpartition("=== step ")[2]
    return Record(path, config, summary, metrics, newest.partition("\n")[2].strip())


def read_config(path: Path) -> Config:
    """A run's config.yaml as plain data: no interpolation is resolved, no alias expanded, no object made."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: is too large for a configuration")
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"{path}: holds YAML aliases; a saved configuration has none")
            opens = isinstance(event, yaml.CollectionStartEvent)
            depth += opens - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_CONFIG_DEPTH:
                raise ConfigError(f"{path}: is nested deeper than a saved configuration")
        plain = yaml.safe_load(text)
        if not isinstance(plain, dict):
            raise ConfigError(f"{path}: is not a saved configuration")
        return from_plain(plain)
    except FileNotFoundError:
        text = f"{path.parent}: is not a run directory (it has no config.yaml)"
        raise ConfigError(text) from None
    except ConfigError:
        raise
    except Exception as error:  # YAML's constructors and OmegaConf raise anything
        raise ConfigError(f"{path}: cannot be read ({one_line(error)})") from error
