"""What the parts of a training step cost, forward and backward, beside the same parts in PyTorch.

    python benchmarks/parts.py                    # 64 wide, 2 heads, 4 layers, 300 tokens, batch 16
    python benchmarks/parts.py d_model=128 num_heads=4 seq_len=64 batch_size=12 rounds=9

Each part descends along its own gradient, in a loop whose buffers are donated, so that no page of
memory is fresh. Rounds are interleaved and each figure is the fastest round, times how often the
part occurs in a step. The cores of a CPU share the batch, as in main.py; PyTorch (eager) uses its
own threads. The last row is the whole step, and how much of it the parts explain.
"""

import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from arguments import read_all
from common import in_turns, machine, make_config
from peers import VOCABULARY
from train import Arm

from chargpt.attention.base import projection
from chargpt.attention.kernel import CAUSAL, dot_product_attention
from chargpt.config import Activation, AttentionType, Norm
from chargpt.model import FeedForward, init_weights, make_norm, take_rows
from chargpt.optimizer import hyperparameters, keep_unless, make_optimizer
from chargpt.parallel import Devices, choose_devices, offer_cpu_devices
from chargpt.train import cross_entropy, init_state

REPEATS = 10  # of a part in one call
RATE = 1e-9  # of the descent: it changes the values, but not what they cost


def ours(apply: Callable[[Any, Any], Any], module: Any, x: Any, devices: Devices) -> Callable:
    """Calls of REPEATS forward and backward passes of `apply(module, x)`."""
    carry, rest = eqx.partition((devices.replicate(module), devices.split(x)), eqx.is_inexact_array)

    def loss(carry: Any) -> Any:
        return sum(
            jnp.sum(jnp.square(y)) for y in jax.tree.leaves(apply(*eqx.combine(carry, rest)))
        )

    def body(carry: Any, _: None) -> tuple[Any, None]:
        return jax.tree.map(lambda a, g: a - RATE * g, carry, jax.grad(loss)(carry)), None

    return repeated(body, carry)


def repeated(body: Callable, carry: Any) -> Callable[[], None]:
    steps = jax.jit(lambda carry: jax.lax.scan(body, carry, length=REPEATS)[0], donate_argnums=0)

    def run() -> None:
        nonlocal carry
        carry = jax.block_until_ready(steps(carry))

    return run


def theirs(apply: Callable[..., Any], *parameters: Any) -> Callable[[], None]:
    """The same in PyTorch."""
    import torch

    def run() -> None:
        for _ in range(REPEATS):
            torch.square(apply(*parameters)).sum().backward()
            with torch.no_grad():
                for parameter in parameters:
                    parameter.add_(parameter.grad, alpha=-RATE)
                    parameter.grad = None

    return run


def our_optimizer(config: Any, params: Any, devices: Devices) -> Callable[[], None]:
    optimizer = make_optimizer(config.optimizer, hyperparameters(config))

    def body(carry: Any, _: None) -> tuple[Any, None]:
        params, state, grads = carry
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        finite = jnp.isfinite(norm)
        updates, state = optimizer.update(grads, state, params, norm=norm, finite=finite)
        return (keep_unless(finite, eqx.apply_updates(params, updates), params), state, grads), None

    grads = jax.tree.map(jnp.ones_like, params)
    # Placed as the step returns them: other places would compile it a second time
    return repeated(body, devices.replicate((params, optimizer.init(params), grads)))


def their_optimizer(shapes: list[tuple[int, ...]]) -> Callable[[], None]:
    import torch

    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, fused=True)

    def run() -> None:
        for _ in range(REPEATS):
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

    return run


def parts(sizes: dict[str, int], config: Any) -> dict[str, tuple[int, Callable, Any]]:
    """{name: (times in a step, ours, PyTorch's or None)}."""
    try:
        import torch
        from torch.nn.functional import cross_entropy as loss_of
        from torch.nn.functional import embedding, gelu, linear, rms_norm
        from torch.nn.functional import scaled_dot_product_attention as attend
    except ImportError:
        torch = None
    width, heads, layers = sizes["d_model"], sizes["num_heads"], sizes["num_layers"]
    batch, length = sizes["batch_size"], sizes["seq_len"]
    devices, keys = choose_devices(config), jax.random.split(jax.random.key(0), 9)
    rows = jax.random.normal(keys[0], (batch * length, width))
    qkv = tuple(jax.random.normal(key, (batch, length, heads, width // heads)) for key in keys[1:4])
    tokens = jax.random.randint(keys[4], (batch * length,), 0, VOCABULARY)
    square = [projection(width, width, key) for key in keys[5:]]
    feed_forward = init_weights(
        FeedForward(width, 4 * width, Activation.gelu, key=keys[5]), {}, key=keys[6]
    )
    table = jax.random.normal(keys[7], (VOCABULARY, width))
    model = init_state(config, VOCABULARY, config.seed).model
    params = eqx.filter(model, eqx.is_inexact_array)
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]

    def attention(_: None, qkv: Any) -> Any:
        scale = (width // heads) ** -0.5
        return jax.vmap(lambda *one: dot_product_attention(*one, CAUSAL, scale))(*qkv)

    def projections(square: Any, x: Any) -> Any:
        q, k, v, o = (layer.weight for layer in square)
        return (x @ q.T + x @ k.T + x @ v.T) @ o.T

    def ends(ends: Any, tokens: Any) -> Any:
        logits = take_rows(ends[0], tokens) @ ends[1].T
        return cross_entropy(logits, tokens).mean()

    table_of = {
        "attention": (layers, ours(attention, None, qkv, devices)),
        "projections": (layers, ours(projections, square, rows, devices)),
        "feed-forward": (layers, ours(lambda f, x: f(x), feed_forward, rows, devices)),
        "norms": (
            2 * layers + 1,
            ours(lambda n, x: jax.vmap(n)(x), make_norm(Norm.rmsnorm, width), rows, devices),
        ),
        "embedding, head, loss": (1, ours(ends, (table, table + 1), tokens, devices)),
        "optimizer": (1, our_optimizer(config, params, devices)),
    }
    if torch is None:
        return {name: (*part, None) for name, part in table_of.items()}

    def new(*shape: int) -> Any:
        return torch.nn.Parameter(torch.randn(shape) * 0.02)

    x, labels = new(batch * length, width), torch.from_numpy(np.array(tokens, np.int64))
    head_first = [new(batch, heads, length, width // heads) for _ in range(3)]
    square_of = [new(width, width) for _ in range(4)]
    peers = {
        "attention": theirs(lambda *qkv: attend(*qkv, is_causal=True), *head_first),
        "projections": theirs(
            lambda x, q, k, v, o: linear(linear(x, q) + linear(x, k) + linear(x, v), o),
            x,
            *square_of,
        ),
        "feed-forward": theirs(
            lambda x, up, down: linear(gelu(linear(x, up), approximate="tanh"), down),
            *(x, new(4 * width, width), new(width, 4 * width)),
        ),
        "norms": theirs(lambda x, gain: rms_norm(x, (width,), gain), x, new(width)),
        "embedding, head, loss": theirs(
            lambda table, head: loss_of(linear(embedding(labels, table), head), labels),
            *(new(VOCABULARY, width), new(VOCABULARY, width)),
        ),
        "optimizer": their_optimizer(shapes),
    }
    return {name: (*part, peers[name]) for name, part in table_of.items()}


def main(arguments: list[str]) -> None:
    defaults = dict(d_model=64, num_heads=2, num_layers=4, seq_len=300, batch_size=16)
    sizes = read_all(arguments, **defaults, rounds=5)
    rounds = sizes.pop("rounds")
    offer_cpu_devices()
    config = make_config(sizes, AttentionType.standard)
    text = np.random.default_rng(1).integers(0, VOCABULARY, 200_000).astype(np.int32)
    arm = Arm(config, jnp.asarray(text), REPEATS)
    table = parts(sizes, config)
    arms = {(name, side): part[1 + side] for name, part in table.items() for side in (0, 1)}
    arms = {key: run for key, run in arms.items() if run is not None} | {("step", 0): arm}
    best = {key: min(found) / REPEATS for key, found in in_turns(arms, rounds).items()}
    step, total = best["step", 0], 0.0
    print(f"{machine()}; {sizes}")
    print(
        "| part | times | ours, ms | PyTorch, ms | ratio | share of the step |\n" + 6 * "|---" + "|"
    )
    for name, (times, _, peer) in table.items():
        mine = times * best[name, 0]
        total += mine
        other = times * best[name, 1] if peer else float("nan")
        row = f"{1e3 * mine:.1f} | {1e3 * other:.1f} | {mine / other:.2f} | {mine / step:.0%}"
        print(f"| {name} | {times} | {row} |")
    print(f"| the whole step | 1 | {1e3 * step:.1f} | | | parts: {total / step:.0%} |")


if __name__ == "__main__":
    main(sys.argv[1:])
