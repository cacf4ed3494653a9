"""Data parallelism: every device holds the complete model and takes a share of each batch."""

import contextlib
import dataclasses
import os
from typing import TypeVar

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from chargpt.config import Config
from chargpt.errors import require

Tree = TypeVar("Tree")
GPU_TOKENS = 4096  # of a batch, on each GPU: an estimate (docs/gpu.md)


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a run, along one axis named `batch`."""

    mesh: Mesh
    reason: str = ""  # why not all that there are

    def __len__(self) -> int:
        return self.mesh.size

    def __str__(self) -> str:
        return f"{len(self)} x {self.mesh.devices.flat[0].device_kind}"

    def split(self, tree: Tree, axis: int = 0) -> Tree:
        """Arrays whose `axis` is the batch, a part on each device; also in compiled code."""
        spec = PartitionSpec(*[None] * axis, "batch")
        return self._place(tree, NamedSharding(self.mesh, spec))

    def replicate(self, tree: Tree) -> Tree:
        """Arrays of which every device holds a copy."""
        return self._place(tree, NamedSharding(self.mesh, PartitionSpec()))

    @staticmethod
    def first(tree: Tree) -> Tree:
        """The first device's copy of replicated arrays, for work on a single device."""
        arrays, rest = eqx.partition(tree, lambda leaf: isinstance(leaf, jax.Array))
        return eqx.combine(jax.tree.map(lambda leaf: leaf.addressable_data(0), arrays), rest)

    def _place(self, tree: Tree, sharding: NamedSharding) -> Tree:
        arrays, rest = eqx.partition(tree, eqx.is_array)
        return eqx.combine(jax.lax.with_sharding_constraint(arrays, sharding), rest)


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


def choose_devices(config: Config) -> Devices:
    """`trainer.num_devices` devices; by default as many as can share a batch evenly.

    Of GPUs, as many as get GPU_TOKENS tokens of it each: with fewer, launching kernels takes longer
    than running them.
    """
    available, trainer = jax.devices(), config.trainer
    share = trainer.batch_size // trainer.grad_accum_steps
    number, reason = trainer.num_devices, ""
    if number is None:
        most = len(available)
        if available[0].platform == "gpu":
            most = max(1, min(most, share * config.dataset.seq_len // GPU_TOKENS))
        number = max(count for count in range(1, most + 1) if share % count == 0)
        if number < len(available):
            reason = f"of {len(available)}"
            reason += f", {GPU_TOKENS:,} tokens or more each" if most < len(available) else ""
    found = f"there are {len(available)} ({available[0].platform})"
    few = f"trainer.num_devices={number}: {found}; write that or fewer, or null"
    require(number <= len(available), few)
    return Devices(Mesh(np.array(available[:number]), ("batch",)), reason)
