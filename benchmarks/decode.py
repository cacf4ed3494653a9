"""Tokens per second of generation, for every attention type, beside peers and the memory floor.

    python benchmarks/decode.py                                     # 4 layers, 128 wide, context 64
    python benchmarks/decode.py num_layers=6 num_heads=6 d_model=384 seq_len=256 batches=1

cacheless: nanoGPT's way, the whole context read again for every token, compiled. Hugging Face
GPT-2 and Llama of the same sizes, with their own caches, run if torch and transformers are
installed (pip install torch transformers). The floor at batch 1 is memory: every weight and the
mean cache are read once per token, at the bandwidth that a large sum reaches in the same process.
Arms are interleaved; each figure is the best round.
"""

import sys
import time
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from arguments import read_all
from common import in_turns, machine, make_config
from peers import VOCABULARY, torch_models

from chargpt.config import AttentionType, Config
from chargpt.costs import count_parameters, kv_cache_bytes
from chargpt.generate import generate
from chargpt.model import GPT
from chargpt.train import init_state


def chargpt_arm(model: GPT, batch: int, seq_len: int) -> Callable[[], int]:
    keys = jax.random.split(jax.random.key(0), batch)

    def run() -> int:
        pieces = generate(
            model,
            np.zeros(1, np.int32),
            seq_len - 1,
            max_seq_len=seq_len,
            keys=keys,
            tokens_per_piece=seq_len,
        )
        return batch * sum(piece.shape[1] for piece in pieces)

    return run


def cacheless_arm(model: GPT, batch: int, seq_len: int) -> Callable[[], int]:
    """Full context throughout: nanoGPT's way with every token of a text longer than the context."""

    @eqx.filter_jit
    def next_tokens(model, tokens, key):
        logits = model.batch(tokens)[:, -1]
        new = jax.random.categorical(key, logits, axis=-1)
        return jnp.concatenate([tokens[:, 1:], new[:, None]], axis=1)

    def run() -> int:
        tokens = jnp.zeros((batch, seq_len), jnp.int32)
        for step in range(24):
            tokens = next_tokens(model, tokens, jax.random.key(step))
        tokens.block_until_ready()
        return batch * 24

    return run


def torch_arms(config: Config, batch: int) -> dict[str, Callable[[], int]]:
    """Hugging Face models of the same sizes, greedy, with their caches; empty if not installed."""
    models = {f"HF {name}": model for name, model in torch_models(config).items()}
    if models:
        import torch

        torch.set_grad_enabled(False)
    context = config.dataset.seq_len

    def arm(model) -> Callable[[], int]:
        def run() -> int:
            token, cache = torch.zeros((batch, 1), dtype=torch.long), None
            for _ in range(context - 1):
                out = model(token, past_key_values=cache, use_cache=True)
                token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            return batch * (context - 1)

        return run

    return {name: arm(model.eval()) for name, model in models.items()}


def measure_bandwidth() -> float:
    """Bytes per second of reading a large array, the best of a few."""
    data = jnp.ones(1 << 26, jnp.float32)
    total = jax.jit(jnp.sum)
    total(data).block_until_ready()
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        total(data).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return data.nbytes / best


def main(arguments: list[str]) -> None:
    defaults = dict(d_model=128, num_heads=4, num_layers=4, seq_len=64, batch_size=1)
    sizes = read_all(arguments, **defaults, rounds=4, batches="1,64")
    batches = [int(number) for number in sizes.pop("batches").split(",")]
    rounds, seq_len = sizes.pop("rounds"), sizes["seq_len"]
    models = {
        kind.name: init_state(make_config(sizes, kind), VOCABULARY, 0).model
        for kind in AttentionType
    }
    bandwidth = measure_bandwidth()
    print(f"{machine()}; {sizes}")
    print(f"memory bandwidth {bandwidth / 1e9:.1f} GB/s")
    for batch in batches:
        arms: dict[str, Callable[[], int]] = {
            "cacheless (standard)": cacheless_arm(models["standard"], batch, seq_len)
        }
        arms |= {name: chargpt_arm(model, batch, seq_len) for name, model in models.items()}
        arms |= torch_arms(make_config(sizes, AttentionType.standard), batch)
        tokens = {name: run() for name, run in arms.items()}
        seconds = in_turns(arms, rounds, compiled=True)
        best = {name: tokens[name] / min(found) for name, found in seconds.items()}
        print(f"\nbatch {batch}\n| | tokens/s | of cacheless | of the memory floor |")
        print(4 * "|---" + "|")
        for name, speed in best.items():
            share = ""
            if batch == 1 and name in models:
                cache = kv_cache_bytes(models[name], jnp.float32, seq_len) / 2
                weights = 4 * (
                    sum(count_parameters(models[name]).values()) - models[name].embedding.size
                )
                share = f"{speed * (weights + cache) / bandwidth:.0%}"
            print(
                f"| {name} | {speed:,.0f} | {speed / best['cacheless (standard)']:.1f} | {share} |"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
