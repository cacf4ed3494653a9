"""From the command line to a typed call, and from an error to one clear line and an exit code."""

import dataclasses
import glob
import importlib
import os
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from chargpt.compose import EXPECTED, explain, in_sweep, parse, run_directory, task_overrides
from chargpt.config import CONFIGS, did_you_mean, spell, typed
from chargpt.errors import ConfigError, RunFailed, fail, one_line, require
from chargpt.study import sweep

PATHS = "paths"  # the field that takes arguments without a name
OVERRIDES = "overrides"  # the field that takes options of a run
MAX_REASON = 400  # characters of somebody else's error


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="default")
def job(settings: DictConfig) -> Any:
    """Train one model, as a run of its own or as a job of a sweep; its best validation loss.

    A run of its own that fails ends the program with one line. In a sweep the error is raised
    instead: what is wrong with a job is wrong before any job has run. With launcher=vmap the result
    is what to train.
    """
    try:
        if settings.resume is None and in_sweep():
            if sweep.gathers(HydraConfig.get()):
                return sweep.gather(typed(settings), run_directory())
            return sweep.run_job(typed(settings), run_directory(), *sweep.runners())
        config = parse(settings) if settings.resume is None else None
        from chargpt.run import start  # imports JAX, so a typo is answered before that

        if config is None:
            return start.resume(run_directory(), task_overrides())
        return start.train(config, run_directory())
    except (ConfigError, RunFailed) as error:
        if in_sweep():
            raise
        sys.exit(fail(error))


def train(arguments: Sequence[str]) -> int:
    """`python main.py KEY=VALUE …`; the exit code.

    Expected errors become one line, unexpected ones keep their traceback.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors instead of printing them
    sys.argv[1:] = arguments
    code: Any = 0
    try:
        job()
    except SystemExit as end:  # a signal that a job obeyed ends the sweep
        code = end.code
    except RunFailed as error:
        code = fail(error)
    except EXPECTED as error:
        code = fail(ConfigError(explain(error)))
    except KeyboardInterrupt:  # a second Ctrl-C
        return 128 + signal.SIGINT
    except OSError as error:
        if error.filename is None:
            raise
        reason = f"cannot be written ({error.strerror}); write hydra.run.dir=DIR"
        code = fail(ConfigError(f"{error.filename}: {reason}"))
    except Exception as error:
        if not sweep.under_way():
            raise
        # Not a job's error: jobs record their own
        reason = one_line(f"{type(error).__name__}: {error}")[:MAX_REASON]
        code = fail(RunFailed(f"the launcher of the sweep failed: {reason}"))
    failed = sweep.report()
    return code or failed


# {tool: (module, imported when needed; its options; its function)}
TOOLS = {
    "sample": ("run.sample", "SampleOptions", "sample"),
    "evaluate": ("run.evaluate", "EvaluateOptions", "evaluate_run"),
    "compare": ("study.compare", "CompareOptions", "compare"),
    "inspect": ("study.inspect", "InspectOptions", "inspect"),
    "play": ("play.command", "PlayOptions", "play"),
    "dashboard": ("study.dashboard", "DashboardOptions", "dashboard"),
    "plan": ("study.plan", "PlanOptions", "show_plan"),
    "search": ("study.search", "SearchOptions", "search"),
    "convert": ("convert", "ConvertOptions", "convert_run"),
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
        print("train      A model; every option is in configs/default.yaml.")
        for name in TOOLS:
            options, _ = load_tool(name)
            print(f"{name:<10} {options.__doc__}\n           {' '.join(option_defaults(options))}")
        return 0
    name, *rest = arguments
    if name == "train":
        return train(rest)
    try:
        hint = did_you_mean(name, TOOLS)
        require(name in TOOLS, f"{name}: there is no such tool{hint}; `chargpt` lists them")
        options, function = load_tool(name)
        function(parse_options(options, rest))
    except (ConfigError, RunFailed) as error:
        return fail(error)
    except BrokenPipeError:  # the reader has stopped, as in `chargpt sample | head`
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
    shown = []
    for field in dataclasses.fields(schema):
        default = repr(field.default) if type(field.default) is str else spell(field.default)
        several = {PATHS: "RUN …", OVERRIDES: "KEY=VALUE …"}.get(field.name)
        shown.append(several or f"{spelling(field)}={default}")
    return shown


def parse_options(schema: type, arguments: list[str]) -> Any:
    """Arguments as an instance of `schema`: `key=value` by the field's type, and any others.

    Others are paths, or options of a run, if the schema has a field for them.
    """
    fields = {spelling(field): field for field in dataclasses.fields(schema)}
    takes_paths = fields.pop(PATHS, None) is not None
    takes_overrides = fields.pop(OVERRIDES, None) is not None
    values: dict[str, Any] = {PATHS: ()} if takes_paths else {}
    values |= {OVERRIDES: ()} if takes_overrides else {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if name in fields:
            require(equals != "", f"{name}: has no value; write {name}=…")
            values[fields[name].name] = parse_value(name, text, fields[name].type)
            continue
        if takes_overrides and equals:
            values[OVERRIDES] += (argument,)
            continue
        # A run's name may contain an equals sign
        is_path = not equals or "/" in name or os.path.exists(argument) or glob.glob(argument)
        hint = f"{did_you_mean(name, fields)} (write {' '.join(fields)})"
        require(takes_paths and bool(is_path), f"{name}: there is no such option{hint}")
        values[PATHS] += (argument,)
    return schema(**values)


def parse_value(name: str, text: str, annotation: Any) -> Any:
    """`text` as the annotated type: str, int, float, an enum, or None for null."""
    kinds = typing.get_args(annotation) or (annotation,)
    if text == "null" and type(None) in kinds:
        return None
    kind = kinds[0]
    if issubclass(kind, Enum):
        choices = kind.__members__
        hint = did_you_mean(text, choices)
        require(text in choices, f"{name}={text}: is not one of {', '.join(choices)}{hint}")
        return kind[text]
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{name}={text}: is not {wanted}") from None
