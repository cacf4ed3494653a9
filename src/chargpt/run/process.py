"""A run and its process: one process per directory, and how a process is asked to stop."""

import contextlib
import fcntl
import signal
from collections.abc import Iterator
from pathlib import Path

from chargpt.errors import ConfigError


@contextlib.contextmanager
def lock(run_dir: Path, wait: bool = False) -> Iterator[None]:
    """Hold `run_dir` within the block; if another process holds it, wait or raise ConfigError.

    The kernel releases it however the process ends.
    """
    with open(run_dir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            problem = "another process is training in it; wait, or write hydra.run.dir=DIR"
            raise ConfigError(f"{run_dir}: {problem}") from error
        yield


SCHEDULERS = (signal.SIGUSR1, signal.SIGUSR2)  # what a cluster's scheduler warns with


class StopSignal:
    """Asks for a stop at the next boundary on SIGINT, SIGTERM or SIGUSR1.

    A second SIGINT stops at once. `number` is the signal that came, or None. A scheduler's own
    handler is called after the block, when everything is saved: submitit requeues on SIGUSR2.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> "StopSignal":
        schedulers = [number for number in SCHEDULERS if callable(signal.getsignal(number))]
        watched: set[int] = {*self.SIGNALS, *schedulers}
        self._previous = {number: signal.signal(number, self._handle) for number in watched}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self.number is not None and self.number in SCHEDULERS:
            handler = self._previous[self.number]
            if callable(handler):
                handler(self.number, None)

    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.number is not None

    def _handle(self, number: int, _frame: object) -> None:
        if number == self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
