"""What the benchmarks share: the name of the machine, a configuration, rounds in turns."""

import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from chargpt.compose import compose
from chargpt.config import AttentionType, Config
from chargpt.run.machine import device_name

Name = TypeVar("Name", bound=Hashable)


def machine() -> str:
    """Device and versions, for the head of a table."""
    return f"{device_name()}, jax {jax.__version__}, python {platform.python_version()}"


def make_config(sizes: dict[str, int], kind: AttentionType, *overrides: str) -> Config:
    """The default run with these sizes."""
    sizes_as_overrides = [
        f"model.mha_type={kind.name}",
        f"model.d_model={sizes['d_model']}",
        f"model.num_heads={sizes['num_heads']}",
        f"model.num_layers={sizes['num_layers']}",
        f"dataset.seq_len={sizes['seq_len']}",
        f"trainer.batch_size={sizes['batch_size']}",
    ]
    return compose((*sizes_as_overrides, *overrides))


def in_turns(
    arms: Mapping[Name, Callable[[], Any]], rounds: int, warm: bool = False, compiled: bool = False
) -> dict[Name, list[float]]:
    """Seconds that a call of each arm took, round by round: A B C A B C …

    All are called once before, which compiles, unless they are `compiled`. `warm` calls an arm once
    before each call that counts: its arrays take the place of the last one's in the processor's
    caches.
    """
    for run in () if compiled else arms.values():
        run()
    seconds: dict[Name, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, run in arms.items():
            if warm:
                run()
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """Median over rounds of the time beside the other's in the same round."""
    return statistics.median(own / other for own, other in zip(seconds, others, strict=True))
