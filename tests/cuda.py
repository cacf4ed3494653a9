"""The programs of a run as an NVIDIA GPU gets them, lowered where there is none.

Used by tests/test_gpu.py and benchmarks/gpu_check.py.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import NamedSharding, PartitionSpec

from chargpt import generate
from chargpt.attention import is_shape, kernel
from chargpt.config import Config
from chargpt.parallel import Devices
from chargpt.run import evaluate
from chargpt.train import (
    Inputs,
    cast,
    compute_dtype,
    init_state,
    make_inputs,
    train_population,
    train_steps,
)

HOPPER = (9, 0)
CUDNN = 92800  # 9.28, what requirements-cuda.lock installs
CORPUS = 10_000  # characters: no program's cost depends on it
CHUNK = 50  # sampled tokens in a call


@contextlib.contextmanager
def as_on_a_gpu(capability: tuple[int, int] = HOPPER) -> Iterator[None]:
    """Within it, the program and JAX's checks of cuDNN find a GPU of that compute capability."""

    def reaches(wanted: str) -> bool:
        return tuple(map(int, wanted.split("."))) <= capability

    with (
        mock.patch.object(jax, "default_backend", lambda: "gpu"),
        mock.patch.object(kernel, "cuda_capability", lambda: capability),
        mock.patch.object(cudnn, "check_cudnn_version", lambda: CUDNN),
        mock.patch.object(cudnn, "check_compute_capability", reaches),
        mock.patch.object(
            cudnn, "is_cuda_compute_capability_equal", "{}.{}".format(*capability).__eq__
        ),
    ):
        yield


def lower(
    function: Callable,
    *arguments: Any,
    donate: tuple[int, ...] = (0,),
    place: Any = None,
    on_gpu: bool = True,
) -> Any:
    """`function` of shapes and static values, lowered for CUDA.

    `place(path, leaf)` is the sharding of an array.
    """
    arrays, static = eqx.partition(arguments, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    if place is not None:
        arrays = jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=place(path, leaf)
            ),
            arrays,
        )

    def on_arrays(*arrays: Any) -> Any:
        return eqx.filter(function(*eqx.combine(arrays, static)), eqx.is_array)

    with as_on_a_gpu() if on_gpu else contextlib.nullcontext():
        traced = jax.jit(on_arrays, donate_argnums=donate).trace(*arrays)
        # Placed arrays say by themselves what they are lowered for
        return traced.lower(lowering_platforms=None if place is not None else ("cuda",))


def shapes(function: Callable, *arguments: Any) -> Any:
    return eqx.filter_eval_shape(function, *arguments)


def training(
    config: Config, vocabulary: int, steps: int, devices: Devices | None = None, on_gpu: bool = True
) -> Any:
    """A chunk of training steps, where `devices` keep the state if they are given."""
    state = shapes(init_state, config, vocabulary, 0)
    corpus = jax.ShapeDtypeStruct((CORPUS,), jnp.int32)
    inputs = shapes(lambda tokens: make_inputs(tokens, config), corpus)
    return lower(
        lambda state, inputs: train_steps(state, inputs, config, steps, devices),
        state,
        inputs,
        place=devices and (lambda path, leaf: placed(devices, path, leaf)),
        on_gpu=on_gpu,
    )


def population(config: Config, vocabulary: int, steps: int, devices: Devices, place: Any) -> Any:
    """As `training`, for the members that `devices` have; `place` as in `lower`."""
    members = devices.members
    one = shapes(init_state, config, vocabulary, 0)
    corpus = jax.ShapeDtypeStruct((CORPUS,), jnp.int32)
    inputs = shapes(lambda tokens: make_inputs(tokens, config), corpus)

    def several(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: (
                jax.ShapeDtypeStruct((members, *leaf.shape), leaf.dtype) if is_shape(leaf) else leaf
            ),
            tree,
        )

    seed, numbers, until = several((inputs.seed, inputs.numbers, one.step))
    return lower(
        lambda states, seed, numbers, until, tokens: train_population(
            states, Inputs(tokens, seed, numbers), until, config, steps, devices
        ),
        several(one),
        seed,
        numbers,
        until,
        inputs.tokens,
        place=place,
    )


def placed(devices: Devices, path: Any, leaf: Any) -> NamedSharding:
    """The state by its layout; inputs, the second argument, everywhere."""
    number, *inside = path
    if number == jax.tree_util.SequenceKey(0):
        return devices.sharding(inside, leaf)
    return NamedSharding(devices.mesh, PartitionSpec())


def collectives(text: str) -> list[tuple[str, int]]:
    """(kind, bytes of the complete float32 arrays that it makes) of every one in compiled text."""
    kinds = "all-to-all|collective-permute|all-gather|all-reduce|reduce-scatter"
    found = re.findall(rf"= (\(.*?\)|\S+) ({kinds})(?:-start)?\(", text)
    return [
        (kind, sum(map(float32_bytes, re.findall(r"f32\[([\d,]*)\]", shapes))))
        for shapes, kind in found
    ]


def float32_bytes(sides: str) -> int:
    return 4 * math.prod(int(side) for side in sides.split(",") if side)


def gpu_dtype(config: Config) -> Any:
    with as_on_a_gpu():
        return compute_dtype(config.trainer.precision)


def evaluation(config: Config, vocabulary: int, place: Any = None) -> Any:
    """The scoring of 64 windows."""
    model = shapes(init_state, config, vocabulary, 0).model
    window = jax.ShapeDtypeStruct((64, config.dataset.seq_len), jnp.int32)
    weights = jax.ShapeDtypeStruct(window.shape, jnp.float32)
    dtype = gpu_dtype(config)
    score = evaluate.score.__wrapped__
    return lower(
        lambda model, *rows: score(model, rows, dtype),
        model,
        window,
        window,
        weights,
        donate=(),
        place=place,
    )


def sampler(config: Config, vocabulary: int, place: Any = None) -> Any:
    """The loop that draws CHUNK tokens."""
    dtype = gpu_dtype(config)
    state = shapes(init_state, config, vocabulary, 0)
    model = shapes(lambda model: cast(model, dtype).unstack(), state.model)
    length = config.dataset.seq_len
    cache = shapes(lambda model: jax.vmap(lambda _: model.init_cache(length))(jnp.arange(1)), model)
    token, index = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    keys = shapes(lambda: jax.random.split(jax.random.key(0), 1))

    def draw(cache: Any, model: Any, token: Any, keys: Any, index: Any) -> Any:
        how = 0.8, None, None
        return generate._draw((model, token, keys, index, index, CHUNK, how), cache)

    return lower(draw, cache, model, token, keys, index, place=place)
