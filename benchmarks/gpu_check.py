"""Compile the programs of a run for an NVIDIA H100 that is not there: kernels, memory, traffic.

    make gpu-check                                    # every attention type, then recipes
    make gpu-check ARGS="standard model.d_model=768"  # one type, other sizes
    make gpu-check ARGS=populations                   # the last table only

Needs JAX's CUDA wheels but no GPU and no driver: XLA compiles for a description of the device, and
nothing runs. So kernels are counted as compiled, without autotuning. Traffic is the sum of what
every kernel reads and writes, as if nothing stayed in a cache. The estimate of a step is, for each
kernel, the longer of its traffic at 80 % of an H100's 3.35 TB/s and its products at 600 TFLOP/s,
summed up: a bound by arithmetic, not a measurement.
"""

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import cuda

from chargpt.compose import compose
from chargpt.config import AttentionType, Config
from chargpt.parallel import AXES, Devices, lay_out

VOCABULARY, STEPS = 65, 2
SIZES = [
    "model.d_model=384",
    "model.num_layers=6",
    "model.num_heads=6",
    "dataset.seq_len=256",
    "trainer.batch_size=64",
]
BANDWIDTH, FLOPS = 0.8 * 3.35e12, 600e12
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 threads_per_core_limit: 2048
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  device_vendor: "NVIDIA Corporation" name: "NVIDIA H100 80GB HBM3"
  device_address_bits: 64 pcie_bandwidth: 34359738368
  driver_version: "12.9.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.28.0" device_interconnect_info { active_links: 18 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 28 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
LAYOUTS: dict[str, tuple[Any, ...]] = {
    "data 8": (8, 1),
    "data 8, fsdp": (8, 1, "parallel.fsdp=true"),
    "data 4, tensor 2, fsdp": (4, 2, "parallel.fsdp=true"),
    "data 8, fsdp, Muon": (8, 1, "parallel.fsdp=true", "optimizer.name=muon"),
}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
BYTES |= {f"{sign}{bits}": bits // 8 for sign in "su" for bits in (8, 16, 32, 64)}
NOTHING = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all"}

Instruction = tuple[str, str, list[str], str]  # shape, operation, operands, the rest of its line


def arrays(shape: str) -> list[tuple[str, list[int]]]:
    found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
    return [(kind, [int(side) for side in sides.split(",") if side]) for kind, sides in found]


def size(shape: str) -> int:
    return sum(BYTES.get(kind, 0) * math.prod(sides) for kind, sides in arrays(shape))


def parse(text: str) -> dict[str, dict[str, Instruction]]:
    """{computation: {name: instruction}} of optimised HLO."""
    found: dict[str, dict[str, Instruction]] = {}
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = found.setdefault(header[1], {})
        elif match := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", line):
            name, shape, operation, rest = match.groups()
            operands, _, rest = rest.partition(")")
            current[name] = shape, operation, re.findall(r"%([\w.\-]+)", operands), rest
    return found


def flops(computation: dict[str, Instruction]) -> float:
    """Of the matrix products."""
    total = 0.0
    for shape, operation, operands, rest in computation.values():
        if operation == "dot":
            ((_, out),) = arrays(shape)
            ((_, left),) = arrays(computation[operands[0]][0])
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
            assert axes is not None
            contracted = [left[int(axis)] for axis in axes[1].split(",") if axis]
            total += 2.0 * math.prod(out) * math.prod(contracted)
    return total


def traffic(body: dict[str, Instruction], instruction: Instruction, inside: Any) -> int:
    """Bytes that a kernel reads and writes; of an array that it only slices, the slice."""
    shape, _, operands, _ = instruction
    if inside is None:
        return size(shape) + sum(size(body[name][0]) for name in operands if name in body)
    total = size(shape)
    for name, (whole, kind, _, _) in inside.items():
        if kind == "parameter":
            users = [user for user in inside.values() if name in user[2]]
            slices = [user for user in users if user[1] in ("slice", "dynamic-slice", "gather")]
            only = users and len(slices) == len(users)
            total += (
                min(size(whole), sum(size(user[0]) for user in slices)) if only else size(whole)
            )
    return total


def count(text: str) -> tuple[int, int, float]:
    """(kernels, bytes, seconds at least) of one round of the longest loop."""
    computations = parse(text)
    loops = re.findall(r"body=%([\w.\-]+)", text)
    body = max((computations[name] for name in loops), key=len)
    kernels, total, seconds = 0, 0, 0.0
    for instruction in body.values():
        _, operation, _, rest = instruction
        if operation in NOTHING or operation.endswith("-done"):
            continue
        called = re.search(r"calls=%([\w.\-]+)", rest)
        inside = computations[called[1]] if called else None
        products = flops(inside) if inside else 0.0
        for name in re.findall(r"calls=%([\w.\-]+)", str(inside)):
            products += flops(computations[name])
        moved = traffic(body, instruction, inside)
        kernels, total = kernels + 1, total + moved
        seconds += max(moved / BANDWIDTH, products / FLOPS)
    return kernels, total, seconds


def configs(arguments: list[str]) -> Iterator[tuple[str, Config]]:
    kinds = [kind for kind in AttentionType if kind.name in arguments]
    overrides = [argument for argument in arguments if "=" in argument]
    for kind in kinds or AttentionType:
        yield kind.name, compose((*SIZES, f"model.mha_type={kind.name}", *overrides))
    if kinds:
        return
    for name in ("optimizer.name=muon", "trainer.precision=float32", "model.dropout=0.2"):
        yield f"standard, {name}", compose((*SIZES, name, *overrides))
    for name in ("nanogpt", "record"):
        yield f"experiment={name}", compose((f"experiment={name}", *overrides))


def gpus(data: int, tensor: int = 1) -> Mesh:
    topology = f"1x1x{data * tensor}"
    described = topologies.get_topology_desc(platform="cuda", target_config=H100, topology=topology)
    return Mesh(np.array(described.devices).reshape(data, tensor), AXES)


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """{kind: (number, bytes of the complete arrays)} of a training step."""
    found = {kind: (0, 0) for kind in COLLECTIVES}
    for instructions in parse(text).values():
        for shape, operation, *_ in instructions.values():
            kind = operation.removesuffix("-start")
            if kind in found and not operation.endswith("-done"):
                sizes = [BYTES[name] * math.prod(sides) for name, sides in arrays(shape)]
                half = len(sizes) // 2
                if kind == "all-reduce":
                    total = sum(sizes)
                else:  # a start has its operands, shares or wholes, and then its results
                    total = sum(map(max, zip(sizes[:half], sizes[half:], strict=True)))
                found[kind] = found[kind][0] + 1, found[kind][1] + total
    return found


def layouts() -> None:
    """A table of what moves between 8 GPUs in a step."""
    print(f"\n| 8 GPUs, standard | {' | '.join(f'{kind}, MB' for kind in COLLECTIVES)} |")
    print((1 + len(COLLECTIVES)) * "|---" + "|")
    for name, (data, tensor, *options) in LAYOUTS.items():
        config = compose((*SIZES, f"parallel.data={data}", f"parallel.tensor={tensor}", *options))
        devices = lay_out(config, gpus(data, tensor))
        text = cuda.training(config, VOCABULARY, STEPS, devices).compile().as_text()
        cells = [
            f"{n} of {total / 1e6:,.1f}" if n else "-" for n, total in collectives(text).values()
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def populations(mesh: Mesh) -> None:
    """A table of what a step costs that several runs of the default size share."""
    print(
        "\n| members, 0.8M | kernels a step | temporary memory, MB | traffic, MB | at least, ms |"
    )
    print(5 * "|---" + "|")
    place = NamedSharding(mesh, PartitionSpec())
    config = compose(("mode=disabled",))
    for members in (None, 1, 2, 8, 32):
        devices = Devices(mesh, members=members)
        if members is None:
            lowered = cuda.training(config, VOCABULARY, STEPS, devices)
        else:
            lowered = cuda.population(config, VOCABULARY, STEPS, devices, lambda *_: place)
        compiled = lowered.compile()
        memory = compiled.memory_analysis().temp_size_in_bytes
        kernels, moved, seconds = count(compiled.as_text())
        numbers = f"{memory / 1e6:,.0f} | {moved / 1e6:,.0f} | {1e3 * seconds:.3f}"
        print(f"| {members or 'alone'} | {kernels} | {numbers} |", flush=True)


def main(arguments: list[str]) -> None:
    mesh = gpus(1)
    if arguments == ["populations"]:
        populations(mesh)
        return
    place = NamedSharding(mesh, PartitionSpec())
    print(f"compiled for {mesh.devices.flat[0].device_kind} by jax {jax.__version__}; not run\n")
    print(
        "| program | kernels a step or token | temporary memory, MB | traffic, MB | at least, ms |"
    )
    print(5 * "|---" + "|")
    for name, config in configs(arguments):
        lowered = {
            "training step": cuda.training(config, VOCABULARY, STEPS, Devices(mesh)),
            "sampler": cuda.sampler(config, VOCABULARY, lambda *_: place),
        }
        for program, computation in lowered.items():
            compiled = computation.compile()
            memory = compiled.memory_analysis().temp_size_in_bytes
            kernels, moved, seconds = count(compiled.as_text())
            numbers = f"{memory / 1e6:,.0f} | {moved / 1e6:,.0f} | {1e3 * seconds:.2f}"
            print(f"| {name}, {program} | {kernels} | {numbers} |", flush=True)
        cuda.evaluation(config, VOCABULARY, lambda *_: place).compile()
    if not arguments:
        layouts()
        populations(mesh)


if __name__ == "__main__":
    main(sys.argv[1:])
