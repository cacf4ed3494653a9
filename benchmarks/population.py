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
import time
from collections.abc import Sequence

import jax
import numpy as np
from train import machine

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
DEFAULT = {"sizes": "0.03M/0.2M/0.8M", "members": "1/2/4/8/16/32", "rounds": "5", "steps": "5"}
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

    def __call__(self) -> np.ndarray:
        """Train a chunk; the loss of every step, [members, steps]."""
        assert self.states is not None
        ends = [2**30] * self.members
        self.states, metrics = self.program.train(self.steps, self.states, self.inputs, ends)
        return np.asarray(metrics.loss).reshape(self.members, self.steps)


def read(arguments: Sequence[str]) -> dict[str, str]:
    chosen = DEFAULT | {"agreement": ""}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name not in chosen or not equals:
            sys.exit(f"error: {argument}: write {', '.join(f'{key}=…' for key in chosen)}")
        chosen[name] = value
    if unknown := set(chosen["sizes"].split("/")) - set(SIZES):
        sys.exit(f"error: sizes={'/'.join(sorted(unknown))}: there are {'/'.join(SIZES)}")
    return chosen


def speeds(chosen: dict[str, str]) -> None:
    print(f"{machine()}, {jax.device_count()} devices; {chosen['rounds']} rounds")
    print("| size | members | tokens/s of all | gain | memory, MB | compile, s |")
    print(6 * "|---" + "|")
    for size in chosen["sizes"].split("/"):
        config = compose(("mode=disabled", *SIZES[size]))
        arms = {}
        for members in (None, *map(int, chosen["members"].split("/"))):
            arms[members] = Arm([config] * (members or 1), members, int(chosen["steps"]))
            arms[members]()
        measured: dict[int | None, list[float]] = {members: [] for members in arms}
        for _ in range(int(chosen["rounds"])):
            for members, arm in arms.items():
                arm()  # its arrays take the place of the last one's in the processor's caches
                begin = time.perf_counter()
                arm()
                measured[members].append(arm.tokens / (time.perf_counter() - begin))
        for members, arm in arms.items():
            pairs = zip(measured[members], measured[None], strict=True)
            gain = statistics.median(own / alone for own, alone in pairs)
            speed, program = statistics.median(measured[members]), arm.program
            megabytes = (program.memory_bytes or 0) * len(program.devices) / 1e6
            cells = f"{speed:,.0f} | {gain:.2f} | {megabytes:,.0f} | {program.compile_seconds:.1f}"
            print(f"| {size} | {members or 'alone'} | {cells} |", flush=True)


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
    chosen = read(arguments)
    offer_cpu_devices()
    jax.config.update("jax_enable_compilation_cache", False)
    if chosen["agreement"]:
        agreement(int(chosen["agreement"]))
    else:
        speeds(chosen)


if __name__ == "__main__":
    main(sys.argv[1:])
