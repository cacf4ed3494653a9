"""What several test files need: the real configuration composed with overrides, and small texts."""

import atexit
import contextlib
import importlib.metadata
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The batch of a run is shared by two devices, on a machine with one core too.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")
# Compiling is most of what tests do: optimizations that tiny sizes cannot use are left out.
flags = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
flags += ["--xla_cpu_parallel_codegen_split_count=1"]
if importlib.metadata.version("jaxlib").startswith(("0.10.", "0.11.")):
    # Later versions end the process at a flag that they do not know.
    flags += ["--xla_cpu_use_fusion_emitters=false"]
os.environ.setdefault("XLA_FLAGS", " ".join(flags))
# What one test has compiled, another, or a program that a test starts, need not compile again.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="chargpt-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["WANDB_MODE"] = (
    "disabled"  # no test talks to a server unless it starts one on loopback itself
)

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chargpt import compose, config
from chargpt.attention import AbstractAttention, abstract, make_attention

ROOT = Path(__file__).parents[1]
SMALL = [
    "model.d_model=16",
    "model.num_layers=2",
    "model.num_heads=4",
    "dataset.seq_len=16",
    "trainer.batch_size=4",
    "trainer.num_devices=1",
] + [
    f"model.mla.{name}"
    for name in ("kv_lora_rank=8", "qk_nope_head_dim=4", "qk_rope_head_dim=4", "v_head_dim=8")
]


def make_config(*overrides: str) -> config.Config:
    """configs/default.yaml with overrides, as main.py composes it."""
    return compose.compose.__wrapped__(overrides)


def small_config(*overrides: str) -> config.Config:
    """A model that compiles and trains in moments. Changing one composed configuration is fast."""
    if any(override.startswith(("experiment=", "+", "~")) for override in overrides):
        return make_config(*SMALL, *overrides)
    return compose.change(compose.compose(tuple(SMALL)), compose.read_overrides(overrides))


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
    """Weights for a module of shapes: there is no initialiser to compile, and no gain is one."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        is_gain = any("norm" in getattr(part, "name", "") for part in path)
        numbers = (
            rng.uniform(0.5, 1.5, leaf.shape) if is_gain else scale * rng.normal(size=leaf.shape)
        )
        return jnp.asarray(numbers, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.fixture(params=list(config.AttentionType), ids=lambda kind: kind.name)
def mha_type(request: pytest.FixtureRequest) -> config.AttentionType:
    """Every attention type in turn."""
    return request.param
