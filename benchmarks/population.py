"""What a population gains: one to 32 members of one program, beside a run by itself.

    python benchmarks/population.py                          # three sizes, 1 to 32 members
    python benchmarks/population.py sizes=0.8M members=8/32 rounds=5
    python benchmarks/population.py agreement=200            # members against runs alone, 200 steps

Speed is tokens per second of all members together. Rounds are interleaved (alone, 1, 2, 4, …); the
gain is the median over rounds of the quotient to the run alone of the same round. Memory is what
XLA allots to the compiled chunk, on all devices together; nothing is read from the cache of
executables. `agreement` trains three members of different seeds and learning rates, and each of
them by itself, and prints how far apart their losses are at any step, relative to the loss; beside
it the same between a run on one device and on all, which differ only in how sums are rounded.
"""

import statistics
import sys
from collections.abc import Sequence

import jax
import numpy as np
from arguments import read_all
from common import in_turns, machine, ratio

from chargpt.compose import compose
from chargpt.config import AttentionType, Config
from chargpt.corpus import load_corpus
from chargpt.parallel import offer_cpu_devices
from chargpt.run.program import Program

SIZES = {
    "0.03M": ["experiment=debug"],
    "0.2M": ["model.d_model=64", "model.num_heads=2"],
    "0.8M": [],
    "10.7M": ["model.d_model=384", "model.num_heads=6", "model.num_layers=6"],
}
TINY = [*SIZES["0.03M"], "mode=disabled", "trainer.num_steps=400", "optimizer.warmup_steps=20"]
OPTIMIZERS = {"adamw": [], "muon": ["optimizer.name=muon"]}


class Arm:
    """Chunks of a program's steps, for as many members as there are configurations."""

    def __init__(self, configs: Sequence[Config], members: int | None, steps: int):
        corpus = load_corpus(configs[0].dataset)
        self.program, self.steps = Program(configs[0], corpus, members), steps
        self.inputs, self.states = self.program.inputs(configs), None
        for lane, config in enumerate(configs):
            state = self.program.initial_state(config.seed)
            self.states = self.program.put(self.states, lane, state)
        self.program.compile([steps], self.inputs)
        self.members, trainer = members or 1, configs[0].trainer
        self.tokens = self.members * steps * trainer.batch_size * configs[0].dataset.seq_len

    @property
    def megabytes(self) -> float:
        """What XLA allots to the compiled chunk, on all devices together."""
        return (self.program.memory_bytes or 0) * len(self.program.devices) / 1e6

    def __call__(self) -> np.ndarray:
        """Train a chunk; the loss of every step, [members, steps]."""
        assert self.states is not None
        ends = [2**30] * self.members
        self.states, metrics = self.program.train(self.steps, self.states, self.inputs, ends)
        return np.asarray(metrics.loss).reshape(self.members, self.steps)


def speeds(sizes: Sequence[str], members: Sequence[int], rounds: int, steps: int) -> None:
    print(f"{machine()}, {jax.device_count()} devices; {rounds} rounds")
    print("| size | members | tokens/s of all | gain | memory, MB | compile, s |")
    print(6 * "|---" + "|")
    for size in sizes:
        config = compose(("mode=disabled", *SIZES[size]))
        arms = {number: Arm([config] * (number or 1), number, steps) for number in (None, *members)}
        seconds = in_turns(arms, rounds, warm=True)
        for number, arm in arms.items():
            gain = (number or 1) * ratio(seconds[None], seconds[number])
            speed = arm.tokens / statistics.median(seconds[number])
            cells = f"{speed:,.0f} | {gain:.2f} | {arm.megabytes:,.0f}"
            cells += f" | {arm.program.compile_seconds:.1f}"
            print(f"| {size} | {number or 'alone'} | {cells} |", flush=True)


def agreement(num_steps: int) -> None:
    print(f"{machine()}, {jax.device_count()} devices; {num_steps} steps")
    print("| type | optimizer | member, alone | one device, all |")
    print(4 * "|---" + "|")
    for kind in AttentionType:
        for name, overrides in OPTIMIZERS.items():
            common = (*TINY, f"model.mha_type={kind.name}", *overrides)
            members = [(f"seed={n}", f"optimizer.learning_rate={n + 1}e-3") for n in range(3)]
            configs = [compose((*common, *own)) for own in members]
            apart = [compose((*common, *own, "trainer.num_devices=1")) for own in members]
            together = Arm(configs, len(configs), num_steps)()
            alone, one_device = (
                np.concatenate([Arm([config], None, num_steps)() for config in each])
                for each in (configs, apart)
            )
            cells = [f"{np.abs(losses / alone - 1).max():.1e}" for losses in (together, one_device)]
            print(f"| {kind.name} | {name} | {' | '.join(cells)} |", flush=True)


def main(arguments: Sequence[str]) -> None:
    lists = {"sizes": "0.03M/0.2M/0.8M", "members": "1/2/4/8/16/32"}
    chosen = read_all(arguments, **lists, rounds=5, steps=5, agreement="")
    sizes, members = (chosen[name].split("/") for name in lists)
    if unknown := set(sizes) - set(SIZES):
        sys.exit(f"error: sizes={'/'.join(sorted(unknown))}: there are {'/'.join(SIZES)}")
    offer_cpu_devices()
    jax.config.update("jax_enable_compilation_cache", False)
    if chosen["agreement"]:
        agreement(int(chosen["agreement"]))
    else:
        speeds(sizes, list(map(int, members)), chosen["rounds"], chosen["steps"])


if __name__ == "__main__":
    main(sys.argv[1:])
