"""What a run needs of each device and what moves between them, before there is one: formulas.

docs/scaling.md derives them, and holds them against what XLA compiles.
"""

import collections
import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from rich.console import Console
from rich.table import Column, Table

from chargpt.attention import is_shape
from chargpt.compose import compose
from chargpt.config import Config, OptimizerName, Precision, Sink, require_at_least, require_between
from chargpt.corpus import load_corpus
from chargpt.costs import count_parameters, flops_per_token
from chargpt.errors import ConfigError, require
from chargpt.model import GPT
from chargpt.parallel import AXES, Devices, lay_out
from chargpt.train import cast, cross_entropy, init_state

GB = 1e9
TIMES_AS_MANY = 8  # devices, from one row of the table of scaling to the next
ACTIVATIONS = "sums of activations"
ADVICE = {"activations": "; trainer.grad_accum_steps=N computes a batch in N parts"}
ADVICE |= {"gradients": "; parallel.tensor=N cuts every layer"}


class TooManyParts(ConfigError):
    """More devices than can share the sequences of a batch evenly."""


@dataclasses.dataclass
class PlanOptions:
    """Memory, communication and the limits of scaling of a run that is not there yet."""

    overrides: tuple[str, ...]  # of the configuration
    devices: int = 8
    vocabulary: int | None = None  # symbols; null = those of the dataset
    memory: float = 80.0  # GB of a device
    speed: float = 400.0  # TFLOP/s that a device reaches in 16-bit products
    inside: float = 400.0  # GB/s that a device sends within its machine
    between: float = 45.0  # GB/s that it sends to other machines
    machine: int = 8  # devices of a machine

    def __post_init__(self) -> None:
        require_at_least("", self, 1, ["devices", "vocabulary", "machine"])
        names = ["memory", "speed", "inside", "between"]
        require_between("", self, 0.0, math.inf, names)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Of one device, in bytes and floating-point operations a step."""

    devices: Devices
    sequences: int  # of a batch, in each of its parts
    held: dict[str, int]  # what must fit
    sent: dict[str, float]  # what it sends to others, by what it is for
    flops: float

    def compute_seconds(self, options: PlanOptions) -> float:
        return self.flops / (options.speed * 1e12)

    def send_seconds(self, options: PlanOptions) -> float:
        """Tensor parallelism stays within a machine; other traffic leaves it if there are more."""
        tensor = self.devices.tensor
        seconds = 0.0
        for purpose, size in self.sent.items():
            spans = tensor if purpose == ACTIVATIONS else len(self.devices)
            speed = options.inside if spans <= options.machine else options.between
            seconds += size / (speed * GB)
        return seconds


def plan(config: Config, number: int, vocabulary: int) -> Plan:
    """What `config` needs of each of `number` devices; ConfigError if they cannot share it."""
    tensor, share = config.parallel.tensor, config.trainer.batch_size
    share //= config.trainer.grad_accum_steps
    data = number // tensor
    rule = f"parallel.tensor={tensor} does not divide it"
    require(number % tensor == 0, f"devices={number}: {rule}")
    rule = f"{data} parts of a batch, of which there are {share} sequences"
    choice = "write a trainer.batch_size that it divides, or parallel.tensor"
    if share % data:
        raise TooManyParts(f"devices={number}: {rule}; {choice}")
    mesh = AbstractMesh((data, tensor), AXES)
    devices, dtype = lay_out(config, mesh), precision(config)
    state = eqx.filter_eval_shape(init_state, config, vocabulary, 0)
    model = state.model

    def size(tree: Any, fsdp: bool, width: int | None = None) -> int:
        """Bytes on a device; of numbers `width` bytes wide, if that is given."""
        total = 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(eqx.filter(tree, is_shape)):
            spec = devices.spec(jax.tree_util.keystr(path), leaf.shape, fsdp)
            parts = math.prod(mesh.shape[axis] for axis in spec if axis is not None)
            total += leaf.size // parts * (leaf.dtype.itemsize if width is None else width)
        return total

    fsdp, narrow = config.parallel.fsdp, dtype.itemsize
    sequences = share // data
    whole = size(model, False, narrow)  # but for tensor parallelism
    held = {
        "parameters": size(model, fsdp),
        "moments": size(state.opt_state, fsdp),
        "averages": size(state.ema, fsdp),
        f"weights in {dtype.name}": whole if fsdp or narrow < 4 else 0,
        # In compute precision while they are summed, then each device's part in float32
        "gradients": (whole if narrow < 4 else 0) + size(model, fsdp, 4),
        "activations": sequences * activation_bytes(config, model, tensor, dtype),
    }
    held = {name: amount for name, amount in held.items() if amount}

    def around(parts: int) -> float:
        """Of an array, what a device sends to gather it, or to sum it into shares."""
        return (parts - 1) / parts

    sent: dict[str, float] = {}
    if data > 1:
        sums = config.trainer.grad_accum_steps if fsdp else 1
        sent["sums of gradients"] = (1 if fsdp else 2) * around(data) * whole * sums
        if fsdp:
            sent["weights"] = around(data) * whole * sums
    if tensor > 1:  # two forward, after both branches, and two backward, before them
        tokens = config.dataset.seq_len * sequences * config.trainer.grad_accum_steps
        stream = tokens * config.model.d_model * narrow
        sent[ACTIVATIONS] = 4 * config.model.num_layers * 2 * around(tensor) * stream
    if config.optimizer.name is OptimizerName.muon and number > 1:
        gathered = muon_matrices(state.opt_state, number)
        gathered += muon_matrices(state.opt_state, 1) if fsdp else 0
        sent["Muon's matrices"] = around(number) * narrow * gathered
    sent["norms and losses"] = 2 * around(number) * 4 * (3 + 2 * config.model.num_layers)
    tokens = config.trainer.batch_size * config.dataset.seq_len
    flops = tokens * flops_per_token(model, config.dataset.seq_len) / number
    return Plan(devices, sequences, held, {k: v for k, v in sent.items() if v}, flops)


def muon_matrices(opt_state: Any, number: int) -> int:
    """Numbers in Muon's stacks of matrices of a shape, filled up for `number` devices."""
    stacks: collections.Counter[tuple[int, ...]] = collections.Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(eqx.filter(opt_state, is_shape)):
        if "['muon']" in jax.tree_util.keystr(path) and leaf.ndim >= 3:
            stacks[tuple(sorted(leaf.shape[-2:]))] += math.prod(leaf.shape[:-2])
    return sum(math.prod(shape) * (n + -n % number) for shape, n in stacks.items())


def precision(config: Config) -> Any:
    """That of a GPU, if the configuration leaves it to the device."""
    return jnp.dtype((config.trainer.precision or Precision.bfloat16).name)


def activation_bytes(config: Config, model: GPT, tensor: int, dtype: Any) -> int:
    """What the forward pass of a sequence keeps for the backward pass, per device.

    Counted in JAX's own derivative, before XLA: the difference between two sequences and one. What
    is as wide as the feed-forward layer, or has an axis of heads, is cut by tensor parallelism.
    """

    def kept(sequences: int) -> int:
        tokens = jax.ShapeDtypeStruct((sequences, config.dataset.seq_len), jnp.int32)

        def backward(model: GPT, tokens: Any) -> Any:
            def loss(model: GPT) -> Any:
                return cross_entropy(cast(model, dtype).batch(tokens), tokens).mean()

            return eqx.filter_vjp(loss, model)[1]

        total = 0
        for leaf in jax.tree.leaves(eqx.filter_eval_shape(backward, model, tokens)):
            if is_shape(leaf):
                axes = {config.model.num_heads, config.model.ff_width}
                cut = tensor if leaf.ndim > 1 and axes & set(leaf.shape[1:]) else 1
                total += leaf.size * leaf.dtype.itemsize // cut
        return total

    return kept(2) - kept(1)


def show_plan(options: PlanOptions) -> None:
    """`chargpt plan`: print what one device holds and sends, and where more of them stop to pay."""
    config = compose(options.overrides)
    symbols = options.vocabulary or len(load_corpus(config.dataset).tokenizer)
    found = plan(config, options.devices, symbols)
    console = Console(highlight=False, soft_wrap=True)
    model = eqx.filter_eval_shape(init_state, config, symbols, 0).model
    total = sum(count_parameters(model).values())
    shape = f"data {found.devices.shares} x tensor {found.devices.tensor}"
    shape += ", fully sharded" if config.parallel.fsdp else ""
    what = f"{config.model.mha_type.name} attention, {config.optimizer.name.name}"
    console.print(f"{total:,} parameters, {what}, {precision(config).name}")
    console.print(
        f"{options.devices} devices: {shape}; {found.sequences} sequences at a time each\n"
    )

    def table(title: str, unit: str, rows: dict[str, float], number: str) -> None:
        grid = Table(Column(title), Column(unit, justify="right"), box=None, pad_edge=False)
        for name, amount in (rows | {"in all": sum(rows.values())}).items():
            grid.add_row(
                name, format(amount / GB, number), style="bold" if name == "in all" else ""
            )
        console.print(grid, "")

    table("a device holds", "GB", dict(found.held), ",.3f")
    table("a device sends, each step", "GB", found.sent, ",.4f")
    fits = sum(found.held.values()) <= options.memory * GB
    largest = max(found.held, key=lambda name: found.held[name])
    advice = "" if fits else ADVICE.get(largest, "; parallel.fsdp=true shares out the state")
    console.print(f"{'fits' if fits else 'does not fit'} in {options.memory:g} GB{advice}\n")
    if config.model.sink is not Sink.none or config.model.has_alibi:
        console.print("sinks and ALiBi: on a GPU, the scores of a whole layer are not counted\n")
    rows = scaling(config, options, symbols)
    names = ("devices", "GB held", "compute, ms", "send, ms", "useful", "")
    grid = Table(*(Column(name, justify="right") for name in names), box=None, pad_edge=False)
    for number, row in rows.items():
        if isinstance(row, str):
            grid.add_row(f"{number:,}", *4 * ["-"], row)
            continue
        held, compute, send = row
        useful = f"{compute / (compute + send):.0%} to {compute / max(compute, send):.0%}"
        remark = "" if held <= options.memory * GB else "does not fit"
        remark = remark or ("sends longer than it computes" if send > compute else "")
        cells = (short(number) for number in (held / GB, 1e3 * compute, 1e3 * send))
        grid.add_row(f"{number:,}", *cells, useful, remark)
    console.print(grid)
    console.print("\nuseful: if nothing of what is sent overlaps with computing, to all of it")


def short(number: float) -> str:
    """Three digits, without an exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def scaling(
    config: Config, options: PlanOptions, symbols: int
) -> dict[int, tuple[float, float, float] | str]:
    """{devices: (bytes held, seconds of computing, of sending), or why not} for the same batch."""
    rows: dict[int, tuple[float, float, float] | str] = {}
    number = min(options.devices, options.machine)
    while number <= max(options.devices, 4096):
        try:
            found = plan(config, number, symbols)
        except TooManyParts:
            rows[number] = "more parts than sequences"
            break
        except ConfigError as error:
            rows[number] = str(error)
            break
        times = found.compute_seconds(options), found.send_seconds(options)
        rows[number] = sum(found.held.values()), *times
        number *= TIMES_AS_MANY
    return rows
