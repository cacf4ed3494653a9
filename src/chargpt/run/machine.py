"""The machine under a run: its name, its packages, and the speed that it can reach."""

import functools
import importlib.metadata
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

PACKAGES = ("chargpt", "jax", "jaxlib", "equinox", "optax", "numpy", "hydra-core", "wandb")


def device_name() -> str:
    device = jax.devices()[0]
    return (
        f"{device.device_kind} ({os.cpu_count()} cores)"
        if device.platform == "cpu"
        else device.device_kind
    )


def package_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def measure_peak_flops(dtype: Any) -> float:
    """Floating-point operations per second of a large matrix product, the best of a few: this machine's practical peak."""
    side = 8192 if jax.default_backend() == "gpu" else 1024
    matrix = jnp.ones((side, side), dtype)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * side**3 / best


def memory_bytes(compiled: Any) -> int:
    """Bytes that a compiled Equinox function needs on each device, as XLA allots them: arguments, results, temporaries."""
    memory = compiled.compiled.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return kept + memory.temp_size_in_bytes


def compiler_options(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `wanted` that this version of XLA knows: each version drops some."""
    return {name: value for name, value in wanted.items() if is_compiler_option(name, value)}


@functools.cache
def is_compiler_option(name: str, value: Any) -> bool:
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError:
        return False
    return True
