"""How the cost of one attention layer, forward and backward, grows with context and width.

    python benchmarks/growth.py                       # writes growth.png beside the table it prints
    python benchmarks/growth.py figure=docs/growth.png

Context from 256 to 8192 tokens at 64 wide, then width from 64 to 1024 at 256 tokens; two heads, one
sequence, float32, every attention type. `literal` is selective attention as its definition reads, a
[t, s, m] tensor of keys and one of values per layer; it is left out where that would take more than
MEMORY_LIMIT bytes. Memory is what XLA allots: arguments, results and temporaries. `PyTorch`, if it
is installed, is standard attention around its scaled_dot_product_attention, timed only.
"""

import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
from arguments import read_all
from common import in_turns, machine, make_config
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from chargpt.attention import SelectiveAttention, make_attention
from chargpt.attention.base import merge_heads
from chargpt.attention.rope import apply_rope
from chargpt.config import AttentionType
from chargpt.run.machine import memory_bytes
from chargpt.study.figures import LIGHT, MARKERS

CONTEXTS = [(tokens, 64) for tokens in (256, 512, 1024, 2048, 4096, 8192)]
WIDTHS = [(256, width) for width in (64, 128, 256, 512, 1024)]
MEMORY_LIMIT = 4e9


def literal_selective(layer: SelectiveAttention, x: jax.Array) -> jax.Array:
    """k_ij = W_k [q_i ; x_j], v_ij = W_v [q_i ; x_j], every pair of them."""
    tokens, heads = x.shape[0], layer.num_heads
    positions = jnp.arange(tokens)
    q = x @ layer.q_proj.weight.T
    pairs = jnp.concatenate(
        [
            jnp.broadcast_to(q[:, None], (tokens, *x.shape)),
            jnp.broadcast_to(x[None], (tokens, *x.shape)),
        ],
        -1,
    )

    def split(y: jax.Array) -> jax.Array:
        return y.reshape(*y.shape[:-1], heads, -1)

    def rotate(y: jax.Array) -> jax.Array:
        return apply_rope(y, positions, layer.rope_theta)

    keys, values = (
        jax.vmap(rotate)(split(pairs @ layer.k_proj.weight.T)),
        split(pairs @ layer.v_proj.weight.T),
    )
    scores = jnp.einsum("tnh,tsnh->nts", rotate(split(q)), keys) * layer.head_dim**-0.5
    weights = jax.nn.softmax(
        jnp.where(positions[None] <= positions[:, None], scores, -jnp.inf), axis=-1
    )
    return merge_heads(jnp.einsum("nts,tsnh->tnh", weights, values), layer.o_proj.weight)


def measure(name: str, tokens: int, width: int) -> tuple[float, float]:
    """(seconds, bytes) of one layer's loss and gradients; the best of a few calls."""
    if name == "PyTorch":
        return measure_torch(tokens, width)
    kind = AttentionType.selective if name == "literal" else AttentionType[name]
    sizes = dict(d_model=width, num_heads=2, num_layers=1, seq_len=tokens, batch_size=1)
    mla = dict(
        kv_lora_rank=width // 4,
        qk_nope_head_dim=width // 4,
        qk_rope_head_dim=width // 4,
        v_head_dim=width // 2,
    )
    config = make_config(
        sizes, kind, *(f"model.mla.{option}={value}" for option, value in mla.items())
    )
    layer = make_attention(config.model, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (tokens, width))
    forward = literal_selective if name == "literal" else lambda layer, x: layer(x)
    gradients = eqx.filter_jit(eqx.filter_grad(lambda both: jnp.sum(jnp.square(forward(*both)))))
    compiled = gradients.lower((layer, x)).compile()
    seconds = fastest(lambda: jax.block_until_ready(compiled((layer, x))), tokens)
    return seconds, memory_bytes(compiled.compiled)


def measure_torch(tokens: int, width: int) -> tuple[float, float]:
    """(seconds, nan) of standard attention, without RoPE, in PyTorch."""
    import torch

    x = torch.randn(1, tokens, width, requires_grad=True)
    q, k, v, o = (torch.nn.Linear(width, width, bias=False) for _ in range(4))

    def step() -> None:
        heads = (w(x).reshape(1, tokens, 2, -1).transpose(1, 2) for w in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        o(out.transpose(1, 2).reshape(x.shape)).square().sum().backward()

    return fastest(step, tokens), float("nan")


def fastest(step: Callable[[], None], tokens: int) -> float:
    return min(in_turns({"": step}, 4 if tokens < 2048 else 2)[""])


def main(arguments: list[str]) -> None:
    figure_path = read_all(arguments, figure="growth.png")["figure"]
    names = [*(kind.name for kind in AttentionType), "literal"]
    if importlib.util.find_spec("torch") is not None:
        names.append("PyTorch")
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    print(f"{machine()}; ms / MB")
    styles = list(zip(itertools.cycle(LIGHT), itertools.cycle(MARKERS), names, strict=False))
    for column, (axis_name, points) in enumerate((("context", CONTEXTS), ("width", WIDTHS))):
        values = [point[column] for point in points]
        print(f"\n| {axis_name} | {' | '.join(map(str, values))} |\n|---|{'---|' * len(values)}")
        for colour, marker, name in styles:
            possible = [
                point
                for point in points
                if name != "literal" or 40 * point[0] ** 2 * point[1] < MEMORY_LIMIT
            ]
            results = [measure(name, *point) for point in possible]
            cells = [
                f"{1e3 * seconds:,.1f}" + (f" / {size / 1e6:,.0f}" if size == size else "")
                for seconds, size in results
            ]
            print(
                f"| {name} | {' | '.join(cells + ['-'] * (len(values) - len(cells)))} |", flush=True
            )
            for row, series in enumerate(zip(*results, strict=True)):
                scale = (1e3, 1e-6)[row]
                axes[row, column].plot(
                    values[: len(series)],
                    [scale * y for y in series],
                    marker=marker,
                    color="black" if name == "PyTorch" else colour,
                    linestyle="--" if name == "PyTorch" else "-",
                    label=name,
                )
        axes[1, column].set_xlabel(("context, tokens (64 wide)", "width (256 tokens)")[column])
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_major_formatter("{x:,g}")
    axes[0, 0].set_ylabel("time, ms")
    axes[1, 0].set_ylabel("memory, MB")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(
        f"One attention layer, forward and backward, float32, {jax.devices()[0].device_kind}"
    )
    Path(figure_path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(figure_path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
