"""The formulas of `chargpt plan` beside what XLA compiles, on virtual devices of this CPU.

    python benchmarks/scaling.py              # 8 devices
    python benchmarks/scaling.py devices=64   # and other options of a run: model.d_model=256

Nothing runs. In float32, since XLA for a CPU computes 16-bit products in it. XLA for a CPU has no
reduce-scatter: it sums complete gradients and cuts them. It sums the gradients of each projection
that reads the stream by itself, where XLA for a GPU adds them first: 6 sums a layer in place of 4
(make gpu-check).
"""

import os
import sys
from pathlib import Path

from arguments import read

CHOSEN, OTHERS = read(sys.argv[1:], devices=8)
NUMBER = CHOSEN["devices"]
os.environ["JAX_NUM_CPU_DEVICES"] = str(NUMBER)
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import cuda

from chargpt.compose import compose
from chargpt.parallel import choose_devices
from chargpt.study.plan import ACTIVATIONS, plan

VOCABULARY = 65
SIZES = ["dataset.seq_len=128", "trainer.precision=float32", f"trainer.batch_size={2 * NUMBER}"]
LAYOUTS: dict[str, list[str]] = {
    "data": [],
    "fsdp": ["parallel.fsdp=true"],
    "fsdp, Muon": ["parallel.fsdp=true", "optimizer.name=muon"],
    "tensor 2": ["parallel.tensor=2"],
    "fsdp, tensor 2": ["parallel.fsdp=true", "parallel.tensor=2"],
}


def main() -> None:
    print(f"{NUMBER} devices; MB a device, formula / XLA")
    print("| layout | state | everything else | gathered and summed |")
    print(4 * "|---" + "|")
    for name, layout in LAYOUTS.items():
        config = compose((*SIZES, *OTHERS, f"trainer.num_devices={NUMBER}", *layout))
        devices, found = choose_devices(config), plan(config, NUMBER, VOCABULARY)
        compiled = cuda.training(config, VOCABULARY, 1, devices, on_gpu=False).compile()
        memory = compiled.memory_analysis()
        state = sum(found.held.get(part, 0) for part in ("parameters", "moments", "averages"))
        tensor = devices.tensor
        # What a device sends, as the sizes of the arrays that it is a share of
        whole = 0.0
        for purpose, sent in found.sent.items():
            parts = {ACTIVATIONS: tensor, "Muon's matrices": NUMBER}.get(purpose, devices.shares)
            twice = purpose in (ACTIVATIONS, "norms and losses") or (
                purpose == "sums of gradients" and not devices.fsdp
            )
            whole += sent * parts / (parts - 1) / (2 if twice else 1)
        cells = (
            (state, memory.argument_size_in_bytes - 4 * cuda.CORPUS),
            (sum(found.held.values()) - state, memory.temp_size_in_bytes),
            (whole, sum(size for _, size in cuda.collectives(compiled.as_text()))),
        )
        print(
            f"| {name} | {' | '.join(f'{a / 1e6:,.2f} / {b / 1e6:,.2f}' for a, b in cells)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
