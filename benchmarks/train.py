"""What a training step costs: every attention type beside peers that do the same work.

    python benchmarks/train.py                    # 64 wide, 2 heads, 4 layers, 300 tokens, batch 16
    python benchmarks/train.py d_model=128 num_heads=4 seq_len=64 batch_size=12 rounds=7
    python benchmarks/train.py 'arms=standard/PyTorch compile*' steps=2   # some arms, steps a call

Peers (benchmarks/peers.py): a flat JAX step, the same mathematics as `standard` without Equinox,
modules or an interface; Hugging Face's GPT-2 and Llama, eager and under torch.compile, if torch and
transformers are installed (pip install torch transformers). Rounds are interleaved (A B C A B C …)
and each arm's figure is its fastest round, so that a noisy neighbour hits all alike. MFU is against
the fastest matrix product of the same process. Memory is what XLA allots to the compiled steps,
arguments and temporaries of all devices together. As in main.py, the cores of a CPU share each
batch as one device each; one arm leaves that to XLA's own threads, and one has Muon instead of
AdamW.
"""

import copy
import fnmatch
import functools
import sys
import time
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from arguments import read_all
from common import in_turns, machine, make_config
from peers import VOCABULARY, flat_arm, torch_arm, torch_models

from chargpt.config import AttentionType, Config
from chargpt.costs import flops_per_token
from chargpt.parallel import choose_devices, offer_cpu_devices
from chargpt.run.machine import measure_peak_flops, memory_bytes
from chargpt.train import compute_dtype, init_state, make_inputs, train_steps


class Arm:
    """Calls of our own compiled chunk of `num_steps` steps."""

    def __init__(self, config: Config, tokens: jax.Array, num_steps: int):
        devices = choose_devices(config)
        inputs, state = devices.replicate(
            (make_inputs(tokens, config), init_state(config, VOCABULARY, config.seed))
        )
        self.flops_per_token = flops_per_token(state.model, config.dataset.seq_len)
        steps = eqx.filter_jit(
            lambda inputs, s: train_steps(s, inputs, config, num_steps, devices),
            donate="all-except-first",
        )
        begin = time.perf_counter()
        self._steps = steps.lower(inputs, state).compile()
        self.compile_seconds = time.perf_counter() - begin
        self.megabytes = len(devices) * memory_bytes(self._steps.compiled) / 1e6
        self._inputs, self._state = inputs, state

    def __call__(self) -> None:
        self._state, metrics = self._steps(self._inputs, self._state)
        metrics.loss.block_until_ready()


def main(arguments: list[str]) -> None:
    defaults = dict(d_model=64, num_heads=2, num_layers=4, seq_len=300, batch_size=16)
    sizes = read_all(arguments, **defaults, rounds=5, steps=10, arms="*")
    rounds, steps, chosen = sizes.pop("rounds"), sizes.pop("steps"), sizes.pop("arms").split("/")
    offer_cpu_devices()
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, 200_000).astype(np.int32)
    configs = {kind.name: make_config(sizes, kind) for kind in AttentionType}
    standard = configs["standard"]
    configs["standard, one device"] = make_config(
        sizes, AttentionType.standard, "trainer.num_devices=1"
    )
    configs["standard, muon"] = make_config(sizes, AttentionType.standard, "optimizer.name=muon")
    makers: dict[str, Callable[[], Callable[[], None]]] = {
        name: functools.partial(Arm, config, jnp.asarray(tokens), steps)
        for name, config in configs.items()
    }
    makers["flat JAX"] = functools.partial(flat_arm, standard, jnp.asarray(tokens), steps)
    for name, model in torch_models(standard).items():
        for way in ("eager", "compile"):
            makers[f"PyTorch {way}, {name}"] = functools.partial(
                torch_arm, copy.deepcopy(model), standard, tokens, steps, way == "compile"
            )
    arms = {
        name: make()
        for name, make in makers.items()
        if any(fnmatch.fnmatch(name, pattern) for pattern in chosen)
    }
    if not arms:
        sys.exit(f"error: arms={'/'.join(chosen)}: there are {'/'.join(makers)}")
    ours = {name: arm for name, arm in arms.items() if isinstance(arm, Arm)}
    compile_seconds = {}
    for name, run in arms.items():
        begin = time.perf_counter()
        run()
        compile_seconds[name] = time.perf_counter() - begin
    compile_seconds |= {name: arm.compile_seconds for name, arm in ours.items()}
    peak = measure_peak_flops(compute_dtype(standard.trainer.precision))
    seconds_of = in_turns(arms, rounds, compiled=True)
    best = {name: min(found) / steps for name, found in seconds_of.items()}
    peak = max(peak, measure_peak_flops(compute_dtype(standard.trainer.precision)))
    print(f"{machine()}; {sizes}")
    print(f"matrix products: {peak / 1e9:,.0f} GFLOP/s")
    first = best[next(iter(best))]
    print(f"| step of | ms | tokens/s | of {next(iter(best))} | MFU | compile, s | memory, MB |")
    print(7 * "|---" + "|")
    for name, seconds in best.items():
        speed = sizes["batch_size"] * sizes["seq_len"] / seconds
        mfu, memory = "", ""
        if name in ours:
            mfu, memory = (
                f"{speed * ours[name].flops_per_token / peak:.0%}",
                f"{ours[name].megabytes:,.0f}",
            )
        speeds = f"{1e3 * seconds:.1f} | {speed:,.0f} | {seconds / first:.2f}"
        print(f"| {name} | {speeds} | {mfu} | {compile_seconds[name]:.1f} | {memory} |")


if __name__ == "__main__":
    main(sys.argv[1:])
