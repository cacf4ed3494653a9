"""A search space: a YAML file of options and their ranges, checked before anything runs.

overrides: [trainer.num_steps=800]             # what every trial has, as on main.py's command line
parameters:
  optimizer.learning_rate: {low: 1e-4, high: 1e-1, log: true}
  optimizer.warmup_steps: {low: 0, high: 200, step: 50}
  model.num_kv_heads: {choices: [1, 2, 4]}
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from chargpt.compose import change, compose, no_such_option
from chargpt.config import CONFIGS, Config, did_you_mean, options, spell
from chargpt.errors import ConfigError, one_line, require


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One option and what it may be: a range of numbers, or a list of choices."""

    name: str
    choices: tuple[Any, ...] | None = None
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    whole: bool = False  # whole numbers alone

    def extremes(self) -> tuple[Any, ...]:
        return self.choices if self.choices is not None else (self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Space:
    """What a search varies, and what all of its trials share."""

    name: str
    overrides: tuple[str, ...]
    parameters: tuple[Parameter, ...]

    def compose(self, values: Mapping[str, Any]) -> Config:
        """The configuration of one trial; ConfigError if its values break a rule."""
        return change(compose(self.overrides), values)


def read_space(path: Path) -> Space:
    """The space in a file; ConfigError if it is none, or if one of its ends does not compose."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        shipped = ", ".join(
            sorted(f"configs/search/{file.name}" for file in (CONFIGS / "search").glob("*.yaml"))
        )
        raise ConfigError(
            f"space={path}: cannot be read ({error.strerror}); there are {shipped}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"space={path}: is no YAML ({one_line(error)[:200]})") from None
    require(isinstance(content, dict), f"space={path}: must hold overrides and parameters")
    for key in content:
        require(
            key in ("overrides", "parameters"),
            f"space={path}: {key}: write overrides or parameters",
        )
    overrides, parameters = content.get("overrides") or [], content.get("parameters")
    require(
        isinstance(overrides, list) and all(isinstance(override, str) for override in overrides),
        f"space={path}: overrides must be a list such as [trainer.num_steps=800]",
    )
    require(
        isinstance(parameters, dict) and bool(parameters),
        f"space={path}: parameters: names no option to search over",
    )
    read = tuple(read_parameter(str(name), range_) for name, range_ in parameters.items())
    space = Space(path.stem, tuple(overrides), read)
    middle = {parameter.name: parameter.extremes()[0] for parameter in read}
    for parameter in read:
        for value in parameter.extremes():
            try:
                space.compose(middle | {parameter.name: value})
            except ConfigError as error:
                raise ConfigError(
                    f"space={path}: with {parameter.name}={spell(value)}: {error}"
                ) from None
    return space


def read_parameter(name: str, given: Any) -> Parameter:
    """One entry of `parameters`; its numbers are read by the type that the option has."""
    require(name in options(), no_such_option(name))
    kinds = option_type(name)
    require(isinstance(given, dict), f"{name}: write {{low: …, high: …}} or {{choices: […]}}")
    known = ("choices", "low", "high", "step", "log")
    for key in given:
        require(key in known, f"{name}: {key}: there is no such key{did_you_mean(str(key), known)}")
    if "choices" in given:
        choices = given["choices"]
        require(len(given) == 1, f"{name}: has both choices and a range; write one of them")
        require(
            isinstance(choices, list) and bool(choices), f"{name}: choices: is no list of values"
        )
        require(len(set(map(str, choices))) == len(choices), f"{name}: choices: has a value twice")
        return Parameter(name, choices=tuple(choices))
    require(bool({int, float} & set(kinds)), f"{name}: is no number; write {{choices: […]}}")
    require("low" in given and "high" in given, f"{name}: a range needs low and high")
    whole, log = float not in kinds, given.get("log", False)
    require(isinstance(log, bool), f"{name}: log={log}: must be true or false")
    low, high = (read_number(f"{name}: {end}", given[end], whole) for end in ("low", "high"))
    step = None if given.get("step") is None else read_number(f"{name}: step", given["step"], whole)
    require(low < high, f"{name}: the range from {low:g} to {high:g} is empty; write low < high")
    require(not log or low > 0, f"{name}: low={low:g}: a logarithmic range begins above zero")
    require(
        step is None or 0 < step <= high - low,
        f"{name}: step={given.get('step')}: must be above zero and within the range",
    )
    require(
        not (log and step is not None),
        f"{name}: a logarithmic range has no step; leave one of them out",
    )
    return Parameter(name, low=low, high=high, step=step, log=log, whole=whole)


def read_number(what: str, value: Any, whole: bool) -> float:
    try:
        number = float(value)  # YAML reads 1e-4 as a text
    except (TypeError, ValueError):
        number = math.nan
    require(math.isfinite(number) and not isinstance(value, bool), f"{what}={value}: is no number")
    require(
        not whole or number.is_integer(),
        f"{what}={value}: is no whole number, which this option is",
    )
    return int(number) if whole else number


def option_type(name: str) -> tuple[type, ...]:
    """The types that an option may have, from the schema."""
    kind: Any = options()[name][0].type
    return tuple(typing.get_args(kind)) if isinstance(kind, types.UnionType) else (kind,)


def to_wandb_sweep(space: Space) -> dict[str, Any]:
    """The same space as a `wandb sweep` file: Bayesian search, poor runs ended early."""

    def distribution(parameter: Parameter) -> dict[str, Any]:
        if parameter.choices is not None:
            return {"values": list(parameter.choices)}
        ends = {"min": parameter.low, "max": parameter.high}
        if parameter.log:
            return {"distribution": "log_uniform_values"} | ends
        if parameter.step is not None:
            return {"distribution": "q_uniform", "q": parameter.step} | ends
        return {"distribution": "int_uniform" if parameter.whole else "uniform"} | ends

    return {
        "program": "main.py",
        "method": "bayes",
        "metric": {"name": "best/val_loss", "goal": "minimize"},
        "parameters": {parameter.name: distribution(parameter) for parameter in space.parameters},
        "command": [
            "${env}",
            "${interpreter}",
            "${program}",
            *space.overrides,
            "mode=online",
            "${args_no_hyphens}",
        ],
        "early_terminate": {"type": "hyperband", "min_iter": 2},
    }
