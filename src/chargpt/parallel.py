"""Layouts: which device holds what of a run. The model's code knows nothing of it.

One mesh of two axes. Batches are shared along `data`; heads and d_ff along `model` (tensor
parallelism, arXiv 1909.08053). With FSDP (fully sharded data parallelism, arXiv 2304.11277)
parameters, moments and averages are shared along `data` as well, and gathered for a step's
products. XLA's partitioner adds the communication. docs/scaling.md says how much.

Runs that train as one program, the members of a population, have an axis of their own.
"""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from chargpt.attention import abstract
from chargpt.config import Config, require_divides
from chargpt.errors import require
from chargpt.model import Block, feed_forward_width

Tree = TypeVar("Tree")
AXES = ("data", "model")
MEMBERS = "member"  # the axis, before AXES, that the members of a population are spread along
GPU_TOKENS = 4096  # of a batch, on each GPU: an estimate (docs/gpu.md)
WHOLE = 1024  # elements: smaller arrays are not worth sharing out


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a run, and the part of its arrays that each of them holds."""

    mesh: Any  # jax.sharding.Mesh; an AbstractMesh is enough to know what is held where
    fsdp: bool = False
    by_input: frozenset[str] = frozenset()  # paths in a block: projections cut by their input
    whole: frozenset[str] = frozenset()  # and those that are not cut along `model`
    reason: str = ""  # why not all that there are
    members: int | None = None  # runs that train at once; None: one, without an axis of members

    def __len__(self) -> int:
        return self.mesh.size

    def __str__(self) -> str:
        layout = f" (data {self.shares} x tensor {self.tensor})" if self.tensor > 1 else ""
        layout += " fsdp" if self.fsdp else ""
        layout += f", {self.members} members" if self.members else ""
        processes = len({device.process_index for device in self.mesh.devices.flat})
        layout += f" in {processes} processes" if processes > 1 else ""
        return f"{len(self)} x {self.mesh.devices.flat[0].device_kind}{layout}"

    @property
    def shares(self) -> int:
        """How many parts a batch is cut into."""
        return int(self.mesh.shape["data"])

    @property
    def apart(self) -> int:
        """Over how many parts of the devices members are spread."""
        return int(self.mesh.shape.get(MEMBERS, 1))

    @property
    def tensor(self) -> int:
        """How many parts the heads and the feed-forward layer of a block are cut into."""
        return int(self.mesh.shape["model"])

    def vmap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` for every member at once: the layout that it asks for holds for each."""
        spread = MEMBERS if self.apart > 1 else None
        return jax.vmap(function, spmd_axis_name=spread)

    def split(self, tree: Tree, axis: int = 0) -> Tree:
        """Arrays whose `axis` is the batch, a part on each device; also in compiled code."""
        return self._put_all(tree, PartitionSpec(*[None] * axis, "data"))

    def spread(self, tree: Tree) -> Tree:
        """Arrays whose first axis is cut into as many parts as devices share a run."""
        return self._put_all(tree, PartitionSpec(AXES))

    def replicate(self, tree: Tree) -> Tree:
        """Arrays of which every device holds a copy."""
        return self._put_all(tree, PartitionSpec())

    def place(self, state: Tree) -> Tree:
        """The state of a run, or a part of it, where this layout keeps it between steps."""
        return self._put_by_path(state, self.fsdp)

    def gather(self, model: Tree) -> Tree:
        """Parameters as a step multiplies by them: complete, except for tensor parallelism.

        Layer by layer, so that XLA can sum each layer's gradient into shares (reduce-scatter).
        """
        if not self.fsdp:
            return self._put_by_path(model, False)

        def whole(path: Any, leaf: Any) -> Any:
            if not eqx.is_inexact_array(leaf):
                return leaf
            name = jax.tree_util.keystr(path)
            specs = [self.spec(name, leaf.shape, fsdp) for fsdp in (True, False)]
            if leaf.ndim < 3:
                return functools.reduce(self._put, specs, leaf)
            specs = [PartitionSpec(*spec[1:]) for spec in specs]
            # Shares of this precision first, or XLA would gather those of full precision
            return jnp.stack([functools.reduce(self._put, specs, layer) for layer in leaf])

        return jax.tree_util.tree_map_with_path(whole, model)

    def first(self, tree: Tree) -> Tree:
        """A complete copy on this process's first device, for work on a single device."""

        def copy(leaf: Any) -> Any:
            if not isinstance(leaf, jax.Array):
                return leaf
            whole = leaf if leaf.is_fully_replicated else self.replicate(leaf)
            return whole.addressable_data(0)

        return jax.tree.map(copy, tree)

    def sharding(self, path: Any, leaf: Any) -> NamedSharding:
        """Where `place` puts an array, or the shape of one, by its path in a tree."""
        spec = self.spec(jax.tree_util.keystr(path), leaf.shape, self.fsdp)
        return NamedSharding(self.mesh, spec)

    def spec(self, path: str, shape: tuple[int, ...], fsdp: bool) -> PartitionSpec:
        """How an array is cut, by its path in the model, which that in an optimizer ends with.

        Along `model` a block's matrices [layer, out, in] are cut by rows of their output (heads,
        d_ff), projections onto the residual stream by their input. Along `data` the longest axis
        is cut that divides evenly.
        """
        axes: list[str | None] = [None] * len(shape)
        data, tensor = self.shares, self.tensor
        if tensor > 1 and len(shape) == 3 and not any(f".{name}." in path for name in self.whole):
            cut = 2 if any(f".{name}." in path for name in self.by_input) else 1
            axes[cut] = "model" if shape[cut] % tensor == 0 else None
        if fsdp and data > 1 and np.prod(shape) >= WHOLE:
            for axis in sorted(range(len(shape)), key=lambda axis: -shape[axis]):
                if axes[axis] is None and shape[axis] % data == 0:
                    axes[axis] = "data"
                    break
        return PartitionSpec(*axes)

    def _put_all(self, tree: Tree, spec: PartitionSpec) -> Tree:
        return jax.tree.map(functools.partial(self._put, spec=spec), tree)

    def _put_by_path(self, tree: Tree, fsdp: bool) -> Tree:
        def put(path: Any, leaf: Any) -> Any:
            name = jax.tree_util.keystr(path)
            return self._put(leaf, self.spec(name, np.shape(leaf), fsdp))

        return jax.tree_util.tree_map_with_path(put, tree)

    def _put(self, leaf: Any, spec: PartitionSpec) -> Any:
        if not isinstance(leaf, jax.Array | np.ndarray):
            return leaf
        sharding = NamedSharding(self.mesh, spec)
        if isinstance(leaf, jax.core.Tracer) or on_mesh(leaf):
            return jax.lax.with_sharding_constraint(leaf, sharding)
        # A copy: on a CPU, JAX would share memory with the array of NumPy
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part].copy())


def on_mesh(leaf: Any) -> bool:
    """Whether an array is placed already, perhaps on devices of other processes too."""
    return isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding)


def offer_cpu_devices() -> None:
    """Let a CPU appear as one device per core: XLA splits batches well, small operations badly.

    Has an effect only before JAX looks for devices. JAX_NUM_CPU_DEVICES sets another number.
    """
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", cores)


def choose_devices(config: Config, members: int | None = None) -> Devices:
    """The layout that `parallel` asks for; by default as many devices as can share a batch evenly.

    Of GPUs, as many as get GPU_TOKENS tokens of it each: with fewer, launching kernels takes longer
    than running them. Processes use all of their devices, since each must hold a part. `members` of
    a population are spread over devices first; what is left over shares their batches.
    """
    available, parallel = jax.devices(), config.parallel
    share = config.trainer.batch_size // config.trainer.grad_accum_steps
    tensor, number, reason = parallel.tensor, config.num_devices, ""
    found = f"there are {len(available)} ({available[0].platform})"
    name = "trainer.num_devices" if parallel.data is None else "parallel.data x parallel.tensor"
    few = f"{name}={number}: {found}; write that or fewer, or null"
    require(number is None or number <= len(available), few)
    chosen = len(available) if number is None or parallel.data else number
    data, most, spread = parallel.data, chosen // tensor, 1
    require(most > 0, f"parallel.tensor={tensor}: {found}; write a smaller number")
    if members is not None:
        spread = even(members, most // (data or 1))
        most //= spread
    if number is None and available[0].platform == "gpu" and jax.process_count() == 1:
        most = max(1, min(most, share * config.dataset.seq_len // GPU_TOKENS))
        reason = f", {GPU_TOKENS:,} tokens or more each"
    if data is None:
        data = max(count for count in range(1, most + 1) if share % count == 0)
    used = spread * data * tensor
    limited = most * spread < len(available) // tensor
    fewer = number is None and used < chosen
    reason = f"of {len(available)}{reason if limited else ''}" if fewer else ""
    processes = jax.process_count()
    all_used = processes == 1 or used == len(available)
    rule = f"{processes} processes use all of their {len(available)} devices, not {used}"
    require(all_used, f"trainer.batch_size={config.trainer.batch_size}: {rule}; write a multiple")
    shape = (data, tensor) if spread == 1 else (spread, data, tensor)
    axes = AXES if spread == 1 else (MEMBERS, *AXES)
    mesh = Mesh(np.array(available[:used]).reshape(shape), axes)
    return dataclasses.replace(lay_out(config, mesh), reason=reason, members=members)


def even(members: int, devices: int) -> int:
    """Over how many of the devices the members can be spread evenly."""
    return members if members < devices else math.gcd(members, devices)


def lay_out(config: Config, mesh: Mesh | AbstractMesh) -> Devices:
    """The layout of `config` on a mesh with AXES."""
    block = abstract(Block, config.model)
    by_input = frozenset(block.residual_projections())
    whole = frozenset(f"attention.{path}" for path in block.attention.common)
    return Devices(mesh, config.parallel.fsdp, by_input, whole)


def check(config: Config) -> None:
    """ConfigError if tensor parallelism cannot cut the model evenly."""
    name, tensor, model = "parallel.tensor", config.parallel.tensor, config.model
    if tensor == 1:
        return
    rule = "experts are not cut; write parallel.tensor=1, and parallel.fsdp=true to share them out"
    require(model.num_experts is None, f"{name}={tensor}: {rule}")
    attention = abstract(Block, model).attention
    kind = f"{model.mha_type.name} attention's"
    for what, number in attention.head_counts.items():
        require_divides(name, tensor, number, f"{kind} {what}")
    require_divides(name, tensor, feed_forward_width(model), "the feed-forward layer's width")
