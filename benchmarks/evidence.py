"""What the types of experiment=evidence cost in speed: training steps and decoding, interleaved.

    python benchmarks/evidence.py
    python benchmarks/evidence.py model.match=params
    python benchmarks/evidence.py rounds=5 batch=64 dataset.seq_len=256

`rounds` and `batch`, the texts that are decoded at once, are the benchmark's own; other arguments
are overrides of a run. A ratio is the median over rounds of the speed beside that of the first type
in the same round; a speed is the median. Memory is what XLA allots to the compiled steps of all
devices. Decoding starts from one token and fills the context.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from decode import chargpt_arm
from peers import VOCABULARY
from population import Arm
from train import machine, read_sizes

from chargpt.compose import compose
from chargpt.config import AttentionType, Config
from chargpt.parallel import offer_cpu_devices
from chargpt.train import init_state

STEPS = 10  # in a call
EXPERIMENT = ("experiment=evidence", "dataset.name=shakespeare")  # speed is the same for any text


def speeds(arms: dict[str, Callable[[], Any]], tokens: int, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each arm, round by round."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, run in arms.items():
            begin = time.perf_counter()
            run()
            if number > 0:  # the first round compiles
                found[name].append(tokens / (time.perf_counter() - begin))
    return found


def main(arguments: Sequence[str]) -> None:
    numbers = {"rounds": 9, "batch": 1}
    own = [argument for argument in arguments if argument.partition("=")[0] in numbers]
    numbers = read_sizes(own, numbers)
    overrides = [*EXPERIMENT, *(argument for argument in arguments if argument not in own)]
    rounds, batch = numbers["rounds"], numbers["batch"]
    offer_cpu_devices()
    jax.config.update("jax_enable_compilation_cache", False)
    configs: dict[str, Config] = {
        kind.name: compose((*overrides, f"model.mha_type={kind.name}")) for kind in AttentionType
    }
    seq_len = configs["standard"].dataset.seq_len
    per_step = configs["standard"].trainer.batch_size * seq_len
    steps = {name: Arm([config], None, STEPS) for name, config in configs.items()}
    training = speeds(dict(steps), STEPS * per_step, rounds)
    models = {name: init_state(config, VOCABULARY, 0).model for name, config in configs.items()}
    writers = {name: chargpt_arm(model, batch, seq_len) for name, model in models.items()}
    decoding = speeds(dict(writers), batch * (seq_len - 1), rounds)
    print(f"{machine()}, {jax.device_count()} devices; {numbers}")
    print(f"{' '.join(overrides)}\n")
    columns = ["type", "cache, bytes per token", "training, tokens/s", "of the first"]
    columns += ["memory, MB", "decoding, tokens/s", "of the first"]
    print(f"| {' | '.join(columns)} |\n{len(columns) * '|---'}|")
    for name, arm in steps.items():
        cells = []
        for found in (training, decoding):
            pairs = zip(found[name], found["standard"], strict=True)
            ratio = statistics.median(own / first for own, first in pairs)
            cells.append(f"{statistics.median(found[name]):,.0f} | {ratio:.2f}")
        megabytes = (arm.program.memory_bytes or 0) * len(arm.program.devices) / 1e6
        cache = arm.program.cache_bytes / seq_len
        print(f"| {name} | {cache:,.0f} | {cells[0]} | {megabytes:,.0f} | {cells[1]} |")


if __name__ == "__main__":
    main(sys.argv[1:])
