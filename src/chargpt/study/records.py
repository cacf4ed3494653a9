"""Runs kept as one file, a line each: what a comparison reads of them, for when they are gone.

A comparison writes them beside its table, and reads them again: with the runs of another day, or on
another machine, or to check what was computed from them.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from chargpt.config import from_plain, to_plain
from chargpt.errors import ConfigError, one_line, require
from chargpt.run.directory import Record, find_runs, is_line, read_run

ENDING = ".jsonl"
KEPT = ("trainer/", "train/loss", "val/")  # of each evaluation


def to_jsonl(records: Iterable[Record]) -> str:
    """A line for each run."""
    kept = [
        {
            "config": to_plain(record.config),
            "summary": record.summary,
            "evaluations": [
                {name: value for name, value in line.items() if name.startswith(KEPT)}
                for line in record.evaluations
            ],
            "sample": record.sample,
        }
        for record in records
    ]
    return "".join(json.dumps(one) + "\n" for one in kept)


def read_records(places: Sequence[str]) -> list[Record]:
    """The runs in `places`: those of `find_runs`, and files that `to_jsonl` made."""
    found: dict[Path, Record] = {}
    for place in places:
        is_kept = place.endswith(ENDING) and Path(place).name != "metrics.jsonl"
        here = read_jsonl(Path(place)) if is_kept else list(map(read_run, find_runs([place])))
        for record in here:
            found.setdefault(record.path.resolve(), record)
    return list(found.values())


def read_jsonl(path: Path) -> list[Record]:
    """The runs of a file; ConfigError, with the number of the line, if it has anything else."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({one_line(error)})") from None
    require(bool(lines), f"{path}: holds no run")
    return [read_line(path, number, line) for number, line in enumerate(lines, 1)]


def read_line(path: Path, number: int, line: str) -> Record:
    try:
        kept = json.loads(line)
        summary, evaluations, sample = (kept[key] for key in ("summary", "evaluations", "sample"))
        require(isinstance(summary, dict) and isinstance(sample, str), "damaged")
        require(all(map(is_line, evaluations)), "an evaluation without its numbers")
        place = Path(f"{path}:{number}")
        return Record(place, from_plain(kept["config"]), summary, evaluations, sample)
    except Exception as error:  # JSON and OmegaConf raise anything
        problem = f"is not a run that chargpt compare keeps ({one_line(error)})"
        raise ConfigError(f"{path}, line {number}: {problem}") from None
