"""Data parallelism: every device holds the complete model and takes a share of each batch."""

import contextlib
import dataclasses
import os
from typing import Any, TypeVar

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from chargpt.config import TrainerConfig
from chargpt.errors import require

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a run, along one axis named `batch`."""

    mesh: Mesh

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

    def split_layers(self, tree: Tree) -> Tree:
        """Stacks of matrices [layer, …], some layers on each device if they share out evenly."""

        def shared(leaf: Any) -> bool:
            return eqx.is_array(leaf) and leaf.ndim == 3 and leaf.shape[0] % len(self) == 0

        return eqx.combine(self.split(eqx.filter(tree, shared)), tree)

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


def choose_devices(trainer: TrainerConfig) -> Devices:
    """`trainer.num_devices` devices; by default as many as can share a batch evenly."""
    available = jax.devices()
    share = trainer.batch_size // trainer.grad_accum_steps
    number = trainer.num_devices
    if number is None:
        number = max(count for count in range(1, len(available) + 1) if share % count == 0)
    found = f"there are {len(available)} ({available[0].platform})"
    few = f"trainer.num_devices={number}: {found}; write that or fewer, or null"
    require(number <= len(available), few)
    return Devices(Mesh(np.array(available[:number]), ("batch",)))
