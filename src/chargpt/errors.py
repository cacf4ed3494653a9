"""Expected errors, each one clear line; and notes to the person at the terminal."""

import contextlib
import sys

BAD_INPUT = 2  # the exit code for input that a person can correct


class ConfigError(ValueError):
    """Input that a person can correct, in one line: what is wrong, what to write instead."""


class RunFailed(Exception):
    """A run that cannot continue. Its text is one line: why, and what is left."""


def require(condition: bool, message: str) -> None:
    """ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def fail(error: Exception) -> int:
    """Print what went wrong on standard error; the exit code that goes with it."""
    note(f"error: {error}")
    return 1 if isinstance(error, RunFailed) else BAD_INPUT


def note(message: str) -> None:
    """Print to standard error: standard output holds only results."""
    with contextlib.suppress(BrokenPipeError):
        print(message, file=sys.stderr)


def one_line(text: object) -> str:
    """Somebody else's text on one line, without characters that move a cursor."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
