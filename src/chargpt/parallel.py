"""Data parallelism: every device holds the whole model and takes its share of each batch."""

import contextlib
import dataclasses
import os
from typing import TypeVar

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from chargpt.config import TrainerConfig
from chargpt.errors import ConfigError

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
        """Arrays whose `axis` is the batch, a part on each device; also inside compiled code."""
        spec = PartitionSpec(*[None] * axis, "batch")
        return self._place(tree, NamedSharding(self.mesh, spec))

    def replicate(self, tree: Tree) -> Tree:
        """Arrays that every device holds whole."""
        return self._place(tree, NamedSharding(self.mesh, PartitionSpec()))

    def split_layers(self, tree: Tree) -> Tree:
        """Stacks of matrices [layer, …], some layers on each device if they share out evenly."""
        shared = eqx.filter(
            tree,
            lambda leaf: eqx.is_array(leaf) and leaf.ndim == 3 and leaf.shape[0] % len(self) == 0,
        )
        return eqx.combine(self.split(shared), tree)

    @staticmethod
    def first(tree: Tree) -> Tree:
        """The first device's copy of replicated arrays, for work that one device does alone."""
        return jax.tree.map(
            lambda leaf: leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf, tree
        )

    def _place(self, tree: Tree, sharding: NamedSharding) -> Tree:
        arrays, rest = eqx.partition(tree, eqx.is_array)
        return eqx.combine(jax.lax.with_sharding_constraint(arrays, sharding), rest)


def offer_cpu_devices() -> None:
    """Let a CPU appear as one device per core: XLA splits small operations badly, batches well.

    Has an effect only before JAX looks for devices. JAX_NUM_CPU_DEVICES sets another number.
    """
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", cores)


def choose_devices(trainer: TrainerConfig) -> Devices:
    """`trainer.num_devices` of them; by default as many as can share a batch evenly."""
    available = jax.devices()
    share = trainer.batch_size // trainer.grad_accum_steps
    number = trainer.num_devices
    if number is None:
        number = max(count for count in range(1, len(available) + 1) if share % count == 0)
    if number > len(available):
        kind = available[0].platform
        raise ConfigError(
            f"trainer.num_devices={number}: there are {len(available)} ({kind}); "
            "write that or fewer, or null"
        )
    return Devices(Mesh(np.array(available[:number]), ("batch",)))
