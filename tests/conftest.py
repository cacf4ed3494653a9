"""What several test files need: the environment of JAX, small configurations, weights."""

import atexit
import contextlib
import functools
import gc
import importlib.metadata
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices to lay runs out on, on any machine.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Tests mostly compile, so optimizations that do not help tiny sizes are switched off.
flags = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
flags += ["--xla_cpu_parallel_codegen_split_count=1"]
if importlib.metadata.version("jaxlib").startswith(("0.10.", "0.11.")):
    # Later versions abort at a flag that they do not know.
    flags += ["--xla_cpu_use_fusion_emitters=false"]
os.environ.setdefault("XLA_FLAGS", " ".join(flags))
# Tests, and programs that they start, share what they have compiled.
if "PYTEST_XDIST_WORKER" not in os.environ:
    compiled = tempfile.mkdtemp(prefix="chargpt-tests-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{compiled}/jax"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
        # Else each program would compile 1,400 files; none is written beside its source.
        os.environ["PYTHONPYCACHEPREFIX"] = f"{compiled}/python"
# No test talks to a server unless it starts one itself, on the loopback interface.
os.environ["WANDB_MODE"] = "disabled"

# Tracing makes much garbage that reference counts do not free, and little of it is large.
gc.set_threshold(50_000, 20, 20)

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chargpt import compose, config
from chargpt.attention import AbstractAttention, abstract, make_attention

ROOT = Path(__file__).parents[1]
SMALL = ["model.d_model=16", "model.num_layers=2", "model.num_heads=4", "dataset.seq_len=16"]
SMALL += ["trainer.batch_size=4", "trainer.num_devices=1", "model.mla.kv_lora_rank=8"]
SMALL += ["model.mla.qk_nope_head_dim=4", "model.mla.qk_rope_head_dim=4", "model.mla.v_head_dim=8"]


def make_config(*overrides: str) -> config.Config:
    """configs/default.yaml with overrides, as main.py composes it."""
    return compose.compose.__wrapped__(overrides)


@functools.cache
def small_config(*overrides: str) -> config.Config:
    """A model that compiles and trains in seconds. Changing a composed configuration is fast."""
    if any(override.startswith(("experiment=", "+", "~")) for override in overrides):
        return make_config(*SMALL, *overrides)
    return compose.change(compose.compose(tuple(SMALL)), compose.read_overrides(overrides))


@functools.cache
def layer_of(mha_type: config.AttentionType, *overrides: str) -> AbstractAttention:
    """A small layer of that type, with shapes in place of arrays: what the type declares."""
    small = small_config(f"model.mha_type={mha_type.name}", *overrides)
    return abstract(make_attention, small.model)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def filled(shapes, scale: float):
    """A module with weights in place of shapes: nothing to compile, and no gain is exactly 1."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        is_gain = any("norm" in getattr(part, "name", "") for part in path)
        size = leaf.shape
        numbers = rng.uniform(0.5, 1.5, size) if is_gain else scale * rng.normal(size=size)
        return jnp.asarray(numbers, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.fixture(autouse=True, scope="module")
def few_executables() -> Iterator[None]:
    """Frees compiled functions before their memory maps reach Linux's limit of 65,530 a process."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 25_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(params=list(config.AttentionType), ids=lambda kind: kind.name)
def mha_type(request: pytest.FixtureRequest) -> config.AttentionType:
    """Every attention type, one after the other."""
    return request.param
