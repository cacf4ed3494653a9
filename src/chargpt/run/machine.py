"""The machine that a run uses: its name, its packages, and the speed that it can reach."""

import contextlib
import functools
import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from chargpt.parallel import Devices

PACKAGES = ("chargpt", "jax", "jaxlib", "equinox", "optax", "numpy", "hydra-core", "wandb")


@functools.cache
def processor() -> str:
    """The model of the CPU, as far as the system tells: `AMD EPYC`, `arm`."""
    with contextlib.suppress(OSError):  # not Linux
        if found := re.search(r"^model name\s*:(.+)", Path("/proc/cpuinfo").read_text(), re.M):
            return re.sub(r"\(R\)|\(TM\)", "", found[1]).strip()
    return platform.processor() or platform.machine()


def device_name() -> str:
    """The first device, as JAX names it; of a CPU, its model and the number of its cores."""
    if jax.default_backend() == "cpu":
        return f"{processor()} ({os.cpu_count()} cores)"
    return jax.devices()[0].device_kind


@functools.cache  # every checkpoint asks
def package_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter."""
    return {"python": platform.python_version(), **package_versions()}


def numerics(devices: Devices, dtype: Any) -> dict[str, str]:
    """What runs must have in common to compute the same numbers bit for bit."""
    cpu = {"processor": processor()} if jax.default_backend() == "cpu" else {}
    layout = {"devices": str(devices), "precision": jnp.dtype(dtype).name}
    return package_versions() | layout | cpu


def measure_peak_flops(dtype: Any) -> float:
    """This machine's practical peak in FLOP/s: the fastest of a few matrix products."""
    side = 8192 if jax.default_backend() == "gpu" else 1024
    matrix, product = jnp.ones((side, side), dtype), jax.jit(jnp.matmul)
    seconds = []
    for _ in range(6):  # the first one compiles
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2.0 * side**3 / min(seconds)


def memory_bytes(compiled: Any) -> int:
    """Bytes per device of a compiled function: arguments, results, temporaries."""
    memory = compiled.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return kept + memory.temp_size_in_bytes


def memory_limit() -> int:
    """Bytes that a program may use on each device: of a CPU, half of what there is.

    From what the machine has, not from what happens to be free: the same every time.
    """
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is not None:
        return int(0.9 * limit)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # of a container
            total = min(total, int(Path(path).read_text()))
    return total // 2 // jax.local_device_count()


def compiler_options(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `wanted` that this version of XLA has: each version drops some."""
    return {name: value for name, value in wanted.items() if is_compiler_option(name, value)}


@functools.cache
def is_compiler_option(name: str, value: Any) -> bool:
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError:
        return False
    return True
