"""A search space: a YAML file of options and their ranges, checked before anything runs.

overrides: [trainer.num_steps=800]             # what all trials share, as on main.py's command line
parameters:
  optimizer.learning_rate: {low: 1e-4, high: 1e-1, log: true}
  optimizer.warmup_steps: {low: 0, high: 200, step: 50}
  model.num_kv_heads: {choices: [1, 2, 4]}
"""

import contextlib
import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from chargpt.compose import change, compose, no_such_option
from chargpt.config import CONFIGS, Config, did_you_mean, options, spell
from chargpt.errors import ConfigError, one_line, require

KEYS = ("choices", "low", "high", "step", "log")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One option and what it may be: a range of numbers, or a list of choices."""

    name: str
    choices: tuple[Any, ...] | None = None
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    whole: bool = False  # only whole numbers

    @property
    def extremes(self) -> tuple[Any, ...]:
        return (self.low, self.high) if self.choices is None else self.choices

    def to_wandb(self) -> dict[str, Any]:
        """How a `wandb sweep` file has it."""
        if self.choices is not None:
            return {"values": list(self.choices)}
        ends = {"min": self.low, "max": self.high}
        if self.log:
            return {"distribution": "log_uniform_values"} | ends
        if self.step is not None:
            return {"distribution": "q_uniform", "q": self.step} | ends
        return {"distribution": "int_uniform" if self.whole else "uniform"} | ends


@dataclasses.dataclass(frozen=True)
class Space:
    """What a search varies, and what all of its trials share."""

    name: str
    overrides: tuple[str, ...]
    parameters: tuple[Parameter, ...]

    def compose(self, values: Mapping[str, Any]) -> Config:
        """The configuration of one trial; ConfigError if its values break a rule."""
        return change(compose(self.overrides), values)


@contextlib.contextmanager
def errors_of(place: str) -> Iterator[None]:
    """Let a ConfigError of the block begin with the place that it is about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None


def read_space(path: Path) -> Space:
    """The space in a file; ConfigError if it is not one, or if an end of it does not compose."""
    with errors_of(f"space={path}"):
        content = read_yaml(path)
        require(isinstance(content, dict), "must hold overrides and parameters")
        for key in content:
            known = key in ("overrides", "parameters")
            require(known, f"{key}: write overrides or parameters")
        overrides, given = content.get("overrides") or [], content.get("parameters")
        are_texts = isinstance(overrides, list) and all(isinstance(o, str) for o in overrides)
        require(are_texts, "overrides must be a list such as [trainer.num_steps=800]")
        any_given = isinstance(given, dict) and bool(given)
        require(any_given, "parameters: names no option to search over")
        parameters = tuple(read_parameter(str(name), entry) for name, entry in given.items())
        space = Space(path.stem, tuple(overrides), parameters)
        first = {parameter.name: parameter.extremes[0] for parameter in parameters}
        for parameter in parameters:
            for value in parameter.extremes:
                with errors_of(f"with {parameter.name}={spell(value)}"):
                    space.compose(first | {parameter.name: value})
        return space


def read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        shipped = sorted(f"configs/search/{file.name}" for file in CONFIGS.glob("search/*.yaml"))
        problem = f"cannot be read ({error.strerror}); there are {', '.join(shipped)}"
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        problem = f"is not YAML ({one_line(error)[:200]})"
    raise ConfigError(problem)


def read_parameter(name: str, given: Any) -> Parameter:
    """One entry of `parameters`; its numbers are read by the type that the option has."""
    require(name in options(), no_such_option(name))
    with errors_of(name):
        require(isinstance(given, dict), "write {low: …, high: …} or {choices: […]}")
        for key in given:
            require(key in KEYS, f"{key}: there is no such key{did_you_mean(str(key), KEYS)}")
        if "choices" in given:
            choices = given["choices"]
            require(len(given) == 1, "has both choices and a range; write one of them")
            require(isinstance(choices, list) and bool(choices), "choices: is not a list of values")
            require(len(set(map(str, choices))) == len(choices), "choices: has a value twice")
            return Parameter(name, choices=tuple(choices))
        kind: Any = options()[name][0].type
        types = typing.get_args(kind) or (kind,)
        require(int in types or float in types, "is not a number; write {choices: […]}")
        require("low" in given and "high" in given, "a range needs low and high")
        return read_range(name, given, whole=float not in types)


def read_range(name: str, given: dict[str, Any], whole: bool) -> Parameter:
    low, high = (read_number(end, given[end], whole) for end in ("low", "high"))
    step = None if given.get("step") is None else read_number("step", given["step"], whole)
    log = given.get("log", False)
    require(isinstance(log, bool), f"log={log}: must be true or false")
    require(low < high, f"the range from {low:g} to {high:g} is empty; write low < high")
    require(not log or low > 0, f"low={low:g}: a logarithmic range starts above zero")
    fits = step is None or 0 < step <= high - low
    require(fits, f"step={step}: must be above zero and within the range")
    require(not log or step is None, "a logarithmic range has no step; leave one of them out")
    return Parameter(name, low=low, high=high, step=step, log=log, whole=whole)


def read_number(name: str, value: Any, whole: bool) -> float:
    try:
        number = float(value)  # YAML reads 1e-4 as a text
    except (TypeError, ValueError):
        number = math.nan
    is_number = math.isfinite(number) and not isinstance(value, bool)
    require(is_number, f"{name}={value}: is not a number")
    is_whole = not whole or number.is_integer()
    require(is_whole, f"{name}={value}: is not a whole number, which this option is")
    return int(number) if whole else number


def to_wandb_sweep(space: Space) -> dict[str, Any]:
    """The same space as a `wandb sweep` file: Bayesian search, poor runs ended early."""
    program = ["${env}", "${interpreter}", "${program}"]
    return {
        "program": "main.py",
        "method": "bayes",
        "metric": {"name": "best/val_loss", "goal": "minimize"},
        "parameters": {parameter.name: parameter.to_wandb() for parameter in space.parameters},
        "command": [*program, *space.overrides, "mode=online", "${args_no_hyphens}"],
        "early_terminate": {"type": "hyperband", "min_iter": 2},
    }
