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
from collections.abc import Sequence

import jax
from arguments import read
from common import in_turns, machine, ratio
from decode import chargpt_arm
from peers import VOCABULARY
from population import Arm

from chargpt.compose import compose
from chargpt.config import AttentionType, Config
from chargpt.parallel import offer_cpu_devices
from chargpt.train import init_state

STEPS = 10  # in a call
EXPERIMENT = ("experiment=evidence", "dataset.name=shakespeare")  # speed is the same for any text


def main(arguments: Sequence[str]) -> None:
    chosen, others = read(arguments, rounds=9, batch=1)
    overrides = [*EXPERIMENT, *others]
    rounds, batch = chosen["rounds"], chosen["batch"]
    offer_cpu_devices()
    jax.config.update("jax_enable_compilation_cache", False)
    configs: dict[str, Config] = {
        kind.name: compose((*overrides, f"model.mha_type={kind.name}")) for kind in AttentionType
    }
    seq_len = configs["standard"].dataset.seq_len
    tokens = STEPS * configs["standard"].trainer.batch_size * seq_len
    steps = {name: Arm([config], None, STEPS) for name, config in configs.items()}
    training = in_turns(steps, rounds)
    models = {name: init_state(config, VOCABULARY, 0).model for name, config in configs.items()}
    writers = {name: chargpt_arm(model, batch, seq_len) for name, model in models.items()}
    decoding = in_turns(writers, rounds)
    print(f"{machine()}, {jax.device_count()} devices; {chosen}")
    print(f"{' '.join(overrides)}\n")
    columns = ["type", "cache, bytes per token", "training, tokens/s", "of the first"]
    columns += ["memory, MB", "decoding, tokens/s", "of the first"]
    print(f"| {' | '.join(columns)} |\n{len(columns) * '|---'}|")
    for name, arm in steps.items():
        cells = []
        for found, number in ((training, tokens), (decoding, batch * (seq_len - 1))):
            speed = number / statistics.median(found[name])
            cells.append(f"{speed:,.0f} | {ratio(found['standard'], found[name]):.2f}")
        cache = arm.program.cache_bytes / seq_len
        print(f"| {name} | {cache:,.0f} | {cells[0]} | {arm.megabytes:,.0f} | {cells[1]} |")


if __name__ == "__main__":
    main(sys.argv[1:])
