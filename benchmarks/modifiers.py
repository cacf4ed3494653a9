"""What a modifier costs: training steps with each of them beside steps without, and cache bytes.

    python benchmarks/modifiers.py                            # the sizes of experiment=fast_cpu
    python benchmarks/modifiers.py experiment=null dataset.seq_len=1024 trainer.batch_size=2
    python benchmarks/modifiers.py rounds=9 model.mha_type=selective only=window

`only` chooses arms by a part of their names; other arguments are overrides of a run. Rounds are
interleaved; a ratio is the median over rounds of the time beside that of the plain model in the
same round. Memory is what XLA allots to the compiled steps. The cache is that of a full context,
per token.
"""

import statistics
import sys
from collections.abc import Sequence

import jax
from arguments import read
from common import in_turns, machine, ratio
from population import Arm

from chargpt.compose import compose
from chargpt.errors import ConfigError
from chargpt.parallel import offer_cpu_devices

ARMS = {
    "plain": (),
    "window, a quarter of the context": ("model.window=$quarter",),
    "the same in two layers of three": ("model.window=$quarter", "model.window_pattern=LLG"),
    "output_gate=head": ("model.output_gate=head",),
    "output_gate=element": ("model.output_gate=element",),
    "sink=learned": ("model.sink=learned",),
    "sink=zero": ("model.sink=zero",),
    "positions=alibi": ("model.positions=alibi",),
    "positions=sinusoidal": ("model.positions=sinusoidal",),
    "positions=learned": ("model.positions=learned",),
    "positions=none": ("model.positions=none",),
    "match=none": ("model.match=none",),
    "num_experts=8": ("model.match=none", "model.num_experts=8"),
}


def main(arguments: Sequence[str]) -> None:
    chosen, others = read(arguments, rounds=5, steps=10, only="", experiment="fast_cpu")
    overrides = [f"experiment={chosen['experiment']}", "dataset.name=shakespeare", *others]
    offer_cpu_devices()
    jax.config.update("jax_enable_compilation_cache", False)
    seq_len = compose(tuple(overrides)).dataset.seq_len
    quarter = str(max(1, seq_len // 4))
    print(f"{machine()}, {jax.device_count()} devices; {chosen['rounds']} rounds")
    print(f"{' '.join(overrides)}, context {seq_len}\n")
    arms: dict[str, Arm] = {}
    for name, own in ARMS.items():
        if name != "plain" and chosen["only"] not in name:
            continue
        own = tuple(override.replace("$quarter", quarter) for override in own)
        try:
            config = compose((*overrides, *own))
        except ConfigError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        arms[name] = Arm([config], None, chosen["steps"])
    seconds = in_turns(arms, chosen["rounds"], warm=True)
    print("| model | ms a step | to plain | memory, MB | cache, bytes per token |")
    print(5 * "|---" + "|")
    for name, arm in arms.items():
        step = 1e3 * statistics.median(seconds[name]) / chosen["steps"]
        cache = arm.program.cache_bytes / seq_len
        times = f"{step:.1f} | {ratio(seconds[name], seconds['plain']):.2f}"
        print(f"| {name} | {times} | {arm.megabytes:,.0f} | {cache:,.0f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
