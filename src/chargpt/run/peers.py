"""Several processes that train one model: how they meet, agree, and end together.

All of them compute, the first one writes. Nothing that involves the others (a step, an evaluation,
the state as a whole) may depend on what only one of them knows; what one knows is passed on here.
"""

import collections
import contextlib
import faulthandler
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from chargpt.compose import launched
from chargpt.config import Config, DistributedConfig, settings_of
from chargpt.errors import ConfigError, RunFailed, fail, one_line, require
from chargpt.run.machine import versions
from chargpt.run.process import StopSignal


def join(options: DistributedConfig, say: Callable[[str], None]) -> None:
    """Meet the other processes, if there are any: before JAX looks for devices.

    If they do not all come in time, this process ends with one line.
    """
    found = launched()
    if jax.distributed.is_initialized() or (options.coordinator is None and found is None):
        return
    # Its handler of SIGTERM would take the place of ours, or ours that of its own
    jax.config.update("jax_enable_preemption_service", False)
    by = f"at {options.coordinator}" if options.coordinator or not found else f"as {found[0]} says"
    number = f"{options.num_processes} processes" if options.num_processes else "the processes"
    timeout = options.initialization_timeout
    say(f"waiting until {number} have met, {by}, for at most {timeout} s")
    choice = "start all of them, or write a larger distributed.initialization_timeout"
    late = f"{number} have not met, {by}, within {timeout} s; {choice}"
    try:
        with at_most(timeout, late):  # later JAX would abort, with the stack of its own code
            jax.distributed.initialize(
                options.coordinator,
                options.num_processes,
                options.process_id,
                initialization_timeout=timeout + 60,
                heartbeat_timeout_seconds=options.heartbeat_timeout,
                shutdown_timeout_seconds=timeout,
            )
    except (RuntimeError, ValueError) as error:
        advice = "write distributed.coordinator=HOST:PORT distributed.num_processes=N "
        advice += "distributed.process_id=I, the first two alike in every process"
        problem = f"the processes did not meet {by}: {one_line(error)[:200]}"
        raise RunFailed(f"{problem}; {advice}") from None


def count() -> int:
    return int(jax.process_count())


def is_first() -> bool:
    """Whether this process writes: files, W&B, the terminal."""
    return bool(jax.process_index() == 0)


def gathered(data: bytes) -> list[bytes]:
    """`data` of every process, in their order."""
    if count() == 1:
        return [data]
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(data))))
    padded = np.zeros(max(1, sizes.max()), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def shared(value: Any) -> list[Any]:
    """`value` of every process, in their order; JSON has it."""
    return [json.loads(text) for text in gathered(json.dumps(value).encode())]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """An expected error that ends the block in one process ends it in all, with its reason.

    Nothing in the block may wait for other processes.
    """
    problem: ConfigError | RunFailed | None = None
    try:
        yield
    except (ConfigError, RunFailed) as error:
        if count() == 1:
            raise
        problem = error
    problems = shared(None if problem is None else str(problem)) if count() > 1 else []
    if problem is not None:
        raise problem
    for number, text in enumerate(problems):
        if text is not None:
            raise ConfigError(f"process {number}: {text}")


def check_same(config: Config, corpus_sha256: str, step: int) -> None:
    """ConfigError in every process if one of them would train something else."""
    if count() == 1:
        return
    facts = {"text (sha256)": corpus_sha256, "step to start from": step}
    for mine in (versions(), settings_of(config) | facts):  # versions first: they may add settings
        first, *rest = shared(mine)
        for number, theirs in enumerate(rest, 1):
            for name in {**first, **theirs}:
                one, other = first.get(name), theirs.get(name)
                problem = f"{name}: is {one} in process 0 and {other} in process {number}"
                require(one == other, f"{problem}; start all with the same command and files")


def asked_to_stop(stop: StopSignal) -> bool:
    """Whether any process was: all then stop at the same step, by the same signal."""
    if count() > 1:
        stop.number = max(shared(stop.number or 0)) or None
    return stop.requested()


CONTINUE = "start all of them again, by the same command, to continue"
# How XLA begins to say that another process does not answer
GONE = ("UNKNOWN", "INTERNAL", "UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED")


def leave_if_alone(error: BaseException, step: int) -> None:
    """If `error` says that another process is gone, end this one too."""
    if count() > 1 and str(error).startswith(GONE):
        reason = f"another process may be gone ({one_line(error)[:200]})"
        leave(f"stopped at step {step}: {reason}; {CONTINUE}")


@contextlib.contextmanager
def at_most(seconds: float, problem: str, stacks: bool = False) -> Iterator[None]:
    """End this process if the block takes longer, perhaps with the stack of every thread."""

    def give_up() -> None:
        if stacks:
            faulthandler.dump_traceback()
        leave(problem)

    timer = threading.Timer(seconds, give_up)
    timer.start()
    # The same without Python, in case that the block does not let it run
    faulthandler.dump_traceback_later(seconds + 5, exit=True)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


class Stalls:
    """Ends this process if something takes `factor` times as long as it usually does.

    Perhaps another process is stuck: it would be waited for without end.
    """

    def __init__(self, factor: float | None):
        self.factor = factor
        self.least: float | None = None  # seconds of a chunk of steps; shorter things may take it
        self._seconds: dict[str, collections.deque[float]] = {}

    @contextlib.contextmanager
    def watch(self, what: str) -> Iterator[None]:
        """Watch the block, from the second one of its name on: the first may compile."""
        past = self._seconds.setdefault(what, collections.deque(maxlen=100))
        begin = time.perf_counter()
        with contextlib.ExitStack() as watched:
            if self.factor is not None and self.least is not None and past:
                limit = self.factor * max(self.least, statistics.median(past))
                problem = f"{what} takes more than {limit:.1f} s, {self.factor:g} times the usual"
                watched.enter_context(at_most(limit, f"{problem}; {CONTINUE}", stacks=True))
            yield
        past.append(time.perf_counter() - begin)


def leave(problem: str) -> NoReturn:
    """End this process at once, with one line: JAX would wait for the others, and abort."""
    fail(RunFailed(problem))
    sys.stdout.flush()
    os._exit(1)
