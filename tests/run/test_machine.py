"""The machine that a run uses: its name, the speed that it reaches, its compiler options."""

import math
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from chargpt.run.machine import compiler_options, device_name, measure_peak_flops, processor

CPUINFO = "processor\t: 0\nmodel\t\t: 143\nmodel name\t: Intel(R) Core(TM) i7\nstepping\t: 8\n"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_measured_peak_is_that_of_the_fastest_of_a_few_products(
    dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Start and end of six products: the first one compiles, the fastest takes 2 s
    seconds = iter(np.cumsum([0, 9, 0, 5, 0, 4, 0, 2, 0, 3, 0, 6]).tolist())
    monkeypatch.setattr("chargpt.run.machine.time.perf_counter", lambda: next(seconds))
    assert math.isclose(measure_peak_flops(dtype), 2 * 1024**3 / 2)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [(CPUINFO, "Intel Core i7"), ("processor\t: 0\nBogoMIPS\t: 50\n", "arm"), (None, "arm")],
)
def test_a_cpu_is_named_by_its_model(
    cpuinfo: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(_: Path) -> str:
        if cpuinfo is None:
            raise FileNotFoundError
        return cpuinfo

    monkeypatch.setattr("chargpt.run.machine.Path.read_text", read)
    monkeypatch.setattr("chargpt.run.machine.platform.processor", lambda: "arm")
    processor.cache_clear()
    try:
        assert device_name() == f"{expected} ({os.cpu_count()} cores)"
    finally:
        processor.cache_clear()


def test_a_compiler_option_that_xla_does_not_have_is_dropped_and_one_that_it_has_is_kept() -> None:
    known = {"xla_backend_optimization_level": 0}
    assert compiler_options({**known, "xla_has_no_such_option": True}) == known
    assert compiler_options({"xla_has_no_such_option": True}) == {}
    assert compiler_options({}) == {}
