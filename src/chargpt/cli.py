"""From the command line to a typed call, and from an error to one clear line."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from chargpt.config import ConfigError, did_you_mean, option_names

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
