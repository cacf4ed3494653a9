"""From the command line to a typed call, and from an error to one clear line."""

import dataclasses
import os
import re
import signal
import sys
import typing
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from chargpt.config import ConfigError, did_you_mean, option_names

Options = TypeVar("Options")

BAD_INPUT = 2  # the exit code of input that a person can mend


class RunFailed(Exception):
    """A run that cannot go on. Its text is one line: why, and what is left."""


def run_directory() -> Path:
    """Where Hydra put the current run."""
    return Path(HydraConfig.get().runtime.output_dir)


def task_overrides() -> list[str]:
    """The overrides typed for this run, Hydra's own left out."""
    return list(HydraConfig.get().overrides.task)


def fail(error: Exception) -> int:
    """Print what went wrong as one line; the exit code that goes with it."""
    print(f"error: {explain(error)}", file=sys.stderr)
    return 1 if isinstance(error, RunFailed) else BAD_INPUT


def single_run(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function`; where it fails in a run of its own, end the program with one line.

    In a sweep the error is raised instead, so that the other jobs run.
    """
    try:
        return function(*arguments)
    except (ConfigError, RunFailed) as error:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise
        sys.exit(fail(error))


def report_errors(main: Callable[[], Any]) -> int:
    """Run a Hydra main; the exit code. Expected errors become one line, unexpected ones keep their traceback."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on instead of printing them
    try:
        main()
    except (ConfigError, RunFailed, HydraException, OmegaConfBaseException) as error:
        return fail(error)
    except KeyboardInterrupt:  # a second Ctrl-C
        return 128 + signal.SIGINT
    except OSError as error:
        if error.filename is None:
            raise
        return fail(ConfigError(f"{error.filename}: cannot be written ({error.strerror}); write hydra.run.dir=DIR"))
    return 0


def explain(error: Exception) -> str:
    """One line for an error of ours, of Hydra's or of OmegaConf's."""
    text = str(error)
    if isinstance(error, ConfigError | RunFailed):
        return text
    if resolving := re.search(r"ConfigError raised while resolving interpolation: (.*)", text):
        return resolving.group(1)
    cause = str(error.__cause__ or "")
    if unknown := re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' not in", cause or text):
        full_key = re.search(r"full_key: (\S+)", cause or text)
        name = full_key.group(1) if full_key and "." in full_key.group(1) else unknown.group(1)
        return f"{name}: there is no such option{did_you_mean(name, option_names())} (all are in configs/default.yaml)"
    if wrong := re.search(r"(?:Invalid value|Value) '(.*?)'.*", cause or text, re.DOTALL):
        full_key = re.search(r"full_key: (\S+)", cause or text)
        reason = wrong.group(0).split("\n")[0]
        choices = re.search(r"\[(.*)\]", reason)
        hint = did_you_mean(wrong.group(1), choices.group(1).split(", ")) if choices else ""
        return f"{full_key.group(1) if full_key else 'option'}: {reason[0].lower()}{reason[1:]}{hint}"
    return " ".join(f"{text} {cause if cause not in text else ''}".split())


def run_tool(arguments: list[str]) -> int:
    """Run `chargpt TOOL key=value …`; the exit code."""
    from chargpt import tools, weights

    known = {
        "sample": (tools.SampleOptions, tools.sample),
        "evaluate": (tools.EvaluateOptions, tools.evaluate_run),
        "export": (weights.ExportOptions, weights.export_weights),
        "import": (weights.ImportOptions, weights.import_weights),
    }
    if not arguments or arguments[0] in ("help", "-h", "--help"):
        print("chargpt TOOL key=value …\n")
        for name, (options, _) in known.items():
            print(f"{name:<10} {options.__doc__}\n           {' '.join(option_defaults(options))}")
        return 0
    name, *pairs = arguments
    try:
        if name not in known:
            raise ConfigError(f"{name}: there is no such tool{did_you_mean(name, known)}; `chargpt` alone lists them")
        options, function = known[name]
        function(parse_options(options, pairs))
    except (ConfigError, RunFailed) as error:
        return fail(error)
    except BrokenPipeError:  # the reader of standard output has had enough, as in `chargpt sample | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def spelling(field: dataclasses.Field) -> str:
    """How an option is typed: dataset_name is dataset.name, as on main.py's command line."""
    return field.name.replace("dataset_", "dataset.")


def option_defaults(schema: type) -> list[str]:
    """Every option of a tool with its default, as one would type it."""
    show = lambda value: "null" if value is None else value.name if isinstance(value, Enum) else repr(value)  # noqa: E731
    return [f"{spelling(field)}={show(field.default)}" for field in dataclasses.fields(schema)]


def parse_options(schema: type[Options], pairs: list[str]) -> Options:
    """`key=value` arguments as an instance of the dataclass `schema`; values are read by the field's type alone."""
    fields = {spelling(field): field for field in dataclasses.fields(schema)}
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if name not in fields:
            raise ConfigError(f"{name}: there is no such option{did_you_mean(name, fields)} (write {' '.join(fields)})")
        if not equals:
            raise ConfigError(f"{name}: has no value; write {name}=…")
        values[fields[name].name] = parse_value(name, text, fields[name].type)
    return schema(**values)


def parse_value(name: str, text: str, annotation: Any) -> Any:
    """`text` as the annotated type: str, int, float, an enum, or None for null where that is allowed."""
    kinds = typing.get_args(annotation) or (annotation,)
    if text == "null" and type(None) in kinds:
        return None
    kind = kinds[0]
    if issubclass(kind, Enum):
        choices = list(kind.__members__)
        if text not in choices:
            raise ConfigError(f"{name}={text}: is none of {', '.join(choices)}{did_you_mean(text, choices)}")
        return kind[text]
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{name}={text}: is no {'whole number' if kind is int else 'number'}") from None
