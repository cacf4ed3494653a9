"""The machine that a run uses: the speed that it reaches, the compiler options that it has."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from chargpt.run.machine import compiler_options, measure_peak_flops


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_measured_peak_is_that_of_the_fastest_of_a_few_products(
    dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Start and end of six products: the first one compiles, the fastest takes 2 s
    seconds = iter(np.cumsum([0, 9, 0, 5, 0, 4, 0, 2, 0, 3, 0, 6]).tolist())
    monkeypatch.setattr("chargpt.run.machine.time.perf_counter", lambda: next(seconds))
    assert math.isclose(measure_peak_flops(dtype), 2 * 1024**3 / 2)


def test_a_compiler_option_that_xla_does_not_have_is_dropped_and_one_that_it_has_is_kept() -> None:
    known = {"xla_backend_optimization_level": 0}
    assert compiler_options({**known, "xla_has_no_such_option": True}) == known
    assert compiler_options({"xla_has_no_such_option": True}) == {}
    assert compiler_options({}) == {}
