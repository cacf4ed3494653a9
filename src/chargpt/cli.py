"""From the command line to a typed call, and from an error to one clear line."""

import dataclasses
import glob
import importlib
import os
import re
import shlex
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from chargpt.config import ConfigError, did_you_mean, in_sweep, option_names

Options = TypeVar("Options")

PATHS = "paths"  # the field that takes arguments without a name
LONGEST_REASON = 400  # characters of somebody else's error
BAD_INPUT = 2  # the exit code of input that a person can mend


class RunFailed(Exception):
    """A run that cannot go on. Its text is one line: why, and what is left."""


def run_directory() -> Path:
    """Where Hydra put the current run."""
    return Path(HydraConfig.get().runtime.output_dir)


def task_overrides() -> list[str]:
    """The overrides typed for this run, Hydra's own left out."""
    return list(HydraConfig.get().overrides.task)


def command(arguments: Sequence[str]) -> str:
    """main.py with these overrides, as a person types it."""
    return f"python main.py {shlex.join(arguments)}"


def fail(error: Exception) -> int:
    """Print what went wrong as one line; the exit code that goes with it."""
    print(f"error: {explain(error)}", file=sys.stderr)
    return 1 if isinstance(error, RunFailed) else BAD_INPUT


def single_run(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function`; where it fails in a run of its own, end the program with one line.

    In a sweep the error is raised instead: what is wrong with one job's configuration is so before any job has run.
    """
    try:
        return function(*arguments)
    except (ConfigError, RunFailed) as error:
        if in_sweep():
            raise
        sys.exit(fail(error))


def report_errors(main: Callable[[], Any], report: Callable[[], int], sweeping: Callable[[], bool]) -> int:
    """Run a Hydra main, then what a sweep has to report, if `sweeping`; the exit code.

    Expected errors become one line, unexpected ones keep their traceback.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on instead of printing them
    code: Any = 0
    try:
        main()
    except SystemExit as end:  # a signal that a job obeyed ends the sweep
        code = end.code
    except (ConfigError, RunFailed, HydraException, OmegaConfBaseException) as error:
        code = fail(error)
    except KeyboardInterrupt:  # a second Ctrl-C
        return 128 + signal.SIGINT
    except OSError as error:
        if error.filename is None:
            raise
        code = fail(ConfigError(f"{error.filename}: cannot be written ({error.strerror}); write hydra.run.dir=DIR"))
    except Exception as error:
        if not sweeping():
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_REASON]  # no job's: those are noted by the job
        code = fail(RunFailed(f"the launcher of the sweep failed: {reason}"))
    failed = report()
    return code or failed


def explain(error: Exception) -> str:
    """One line for an error of ours, of Hydra's or of OmegaConf's."""
    text = str(error)
    if isinstance(error, ConfigError | RunFailed):
        return text
    if resolving := re.search(r"ConfigError raised while resolving interpolation: (.*)", text):
        return resolving.group(1)
    if missing := re.search(r"Could not find 'hydra/launcher/(joblib|submitit)", text):
        extra = {"joblib": "joblib", "submitit": "slurm"}[missing.group(1)]
        return f"launcher={extra}: is not installed; write pip install -e '.[{extra}]'"
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


# Every tool: its module, which is imported when it is wanted, its options, its function.
TOOLS = {
    "sample": ("tools", "SampleOptions", "sample"),
    "evaluate": ("tools", "EvaluateOptions", "evaluate_run"),
    "compare": ("compare", "CompareOptions", "compare"),
    "inspect": ("inspection", "InspectOptions", "inspect"),
    "dashboard": ("dashboard", "DashboardOptions", "dashboard"),
    "search": ("search", "SearchOptions", "search"),
    "export": ("weights", "ExportOptions", "export_weights"),
    "import": ("weights", "ImportOptions", "import_weights"),
}


def load_tool(name: str) -> tuple[type, Callable[[Any], None]]:
    module, options, function = TOOLS[name]
    loaded = importlib.import_module(f"chargpt.{module}")
    return getattr(loaded, options), getattr(loaded, function)


def run_tool(arguments: list[str]) -> int:
    """Run `chargpt TOOL key=value …`; the exit code."""
    if not arguments or arguments[0] in ("help", "-h", "--help"):
        print("chargpt TOOL key=value …\n")
        for name in TOOLS:
            options, _ = load_tool(name)
            print(f"{name:<10} {options.__doc__}\n           {' '.join(option_defaults(options))}")
        return 0
    name, *rest = arguments
    try:
        if name not in TOOLS:
            raise ConfigError(f"{name}: there is no such tool{did_you_mean(name, TOOLS)}; `chargpt` alone lists them")
        options, function = load_tool(name)
        function(parse_options(options, rest))
    except (ConfigError, RunFailed) as error:
        return fail(error)
    except BrokenPipeError:  # the reader of standard output has had enough, as in `chargpt sample | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:
        if error.filename is None:
            raise
        return fail(ConfigError(f"{error.filename}: cannot be read or written ({error.strerror})"))
    return 0


def spelling(field: dataclasses.Field) -> str:
    """How an option is typed: dataset_name is dataset.name, as on main.py's command line."""
    return field.name.replace("dataset_", "dataset.")


def option_defaults(schema: type) -> list[str]:
    """Every option of a tool with its default, as one would type it."""
    show = lambda value: "null" if value is None else value.name if isinstance(value, Enum) else repr(value)  # noqa: E731
    fields = dataclasses.fields(schema)
    return ["RUN …"] * takes_paths(schema) + [
        f"{spelling(field)}={show(field.default)}" for field in fields if field.name != PATHS
    ]


def takes_paths(schema: type) -> bool:
    """Whether a tool takes paths beside its options: its dataclass has a field of that name."""
    return any(field.name == PATHS for field in dataclasses.fields(schema))


def parse_options(schema: type[Options], arguments: list[str]) -> Options:
    """Arguments as an instance of `schema`: `key=value` by the field's type alone, and paths where it takes any."""
    fields = {spelling(field): field for field in dataclasses.fields(schema) if field.name != PATHS}
    values: dict[str, Any] = {}
    paths = []
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if (
            takes_paths(schema)
            and name not in fields
            and (not equals or "/" in name or os.path.exists(argument) or glob.glob(argument))
        ):
            paths.append(argument)  # a run's name may hold an equals sign
            continue
        if name not in fields:
            raise ConfigError(f"{name}: there is no such option{did_you_mean(name, fields)} (write {' '.join(fields)})")
        if not equals:
            raise ConfigError(f"{name}: has no value; write {name}=…")
        values[fields[name].name] = parse_value(name, text, fields[name].type)
    return schema(**values | ({PATHS: tuple(paths)} if takes_paths(schema) else {}))


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
