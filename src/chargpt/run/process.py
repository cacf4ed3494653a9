"""A run and its process: one process a directory, and how a process is asked to stop."""

import contextlib
import fcntl
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from chargpt.errors import ConfigError


@contextlib.contextmanager
def lock(run_dir: Path, wait: bool = False) -> Iterator[None]:
    """Hold `run_dir` for this process, which waits for it or raises ConfigError. However it ends, the kernel lets go."""
    with open(run_dir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise ConfigError(
                f"{run_dir}: another process is training in it; wait, or write hydra.run.dir=DIR"
            ) from error
        yield


SCHEDULERS = (signal.SIGUSR1, signal.SIGUSR2)  # what a cluster's scheduler warns with


class StopSignal:
    """Asks for a stop at the next boundary on SIGINT, SIGTERM or SIGUSR1; a second SIGINT stops at once.

    `number` is the signal that came, or None. A scheduler's own handler has its turn once the block has ended and all is
    saved: submitit queues the job anew on SIGUSR2.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> "StopSignal":
        self._scheduler: dict[int, Callable[..., Any]] = {
            number: handler
            for number in SCHEDULERS
            if callable(handler := signal.getsignal(number))
        }
        watched: set[int] = {*self.SIGNALS, *self._scheduler}
        self._previous = {number: signal.signal(number, self._handle) for number in watched}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self.number is not None and self.number in self._scheduler:
            self._scheduler[self.number](self.number, None)

    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.number is not None

    def _handle(self, number: int, _frame: object) -> None:
        if number == self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
