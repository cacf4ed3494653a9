"""The attention product, forward and backward: our formula against `jax.nn.dot_product_attention`.

    python benchmarks/attention.py    # batch 16, 300 tokens, 2 heads of 32; then two other sizes

Both are called per sequence under `jax.vmap`, as the model does. Rounds are interleaved; each
figure is the best one.
"""

from collections.abc import Callable
from typing import Any

import jax
from common import in_turns, machine

from chargpt.attention.kernel import CAUSAL, dot_product_attention

SIZES = [(16, 300, 2, 32), (12, 64, 4, 32), (4, 256, 6, 64)]
ROUNDS = 15


def arm(kernel: Callable, weight: jax.Array, *qkv: jax.Array) -> Callable[[], Any]:
    """Calls of the gradient of a weighted sum of what `kernel` gives."""

    def total(*qkv: jax.Array) -> jax.Array:
        return (jax.vmap(kernel)(*qkv) * weight).sum()

    gradient = jax.jit(jax.grad(total, (0, 1, 2)))
    return lambda: jax.block_until_ready(gradient(*qkv))


def main() -> None:
    print(machine())
    print("| batch, tokens, heads, width | jax.nn, ms | chargpt, ms | ratio |\n|---|---|---|---|")
    for batch, tokens, heads, width in SIZES:
        q, k, v, weight = (
            jax.random.normal(key, (batch, tokens, heads, width))
            for key in jax.random.split(jax.random.key(0), 4)
        )
        kernels = {
            "jax.nn": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True),
            "chargpt": lambda q, k, v, scale=width**-0.5: dot_product_attention(
                q, k, v, CAUSAL, scale=scale
            ),
        }
        arms = {name: arm(kernel, weight, q, k, v) for name, kernel in kernels.items()}
        best = {name: min(found) for name, found in in_turns(arms, ROUNDS).items()}
        row = " | ".join(f"{1e3 * seconds:.1f}" for seconds in best.values())
        ratio = best["chargpt"] / best["jax.nn"]
        print(f"| {batch}, {tokens}, {heads}, {width} | {row} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
