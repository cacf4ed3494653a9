"""What a training step costs: every attention type, side by side with a hand-written flat JAX step of the same sizes.

    python benchmarks/train.py                    # 64 wide, 2 heads, 4 layers, 300 tokens, batch 16
    python benchmarks/train.py d_model=128 num_heads=4 seq_len=64 batch_size=12 rounds=7

Rounds are interleaved (A B C A B C …) and each arm's figure is its fastest round, so that a noisy neighbour hits all alike.
The flat step is the same mathematics without Equinox, modules or an interface: what the house costs.
"""

import functools
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hydra import compose, initialize_config_dir

from chargpt import config as chargpt_config
from chargpt.config import AttentionType, Config
from chargpt.train import init_state, train_steps

CONFIGS = str(Path(__file__).parents[1] / "configs")
STEPS_PER_CALL = 10
VOCABULARY = 65


def make_config(sizes: dict[str, int], kind: AttentionType) -> Config:
    overrides = [
        f"model.mha_type={kind.name}",
        f"model.d_model={sizes['d_model']}",
        f"model.num_heads={sizes['num_heads']}",
        f"model.num_layers={sizes['num_layers']}",
        f"dataset.seq_len={sizes['seq_len']}",
        f"trainer.batch_size={sizes['batch_size']}",
    ]
    chargpt_config.register()
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return chargpt_config.parse(compose("default", overrides))


def chargpt_arm(config: Config, tokens: jax.Array) -> Callable[[], None]:
    """Calls of our own compiled chunk of steps."""
    state = init_state(config, VOCABULARY)
    steps = eqx.filter_jit(lambda tokens, s: train_steps(s, tokens, config, STEPS_PER_CALL), donate="all-except-first")

    def run() -> None:
        nonlocal state
        state, metrics = steps(tokens, state)
        metrics.loss.block_until_ready()

    return run


def flat_arm(config: Config, tokens: jax.Array) -> Callable[[], None]:
    """The standard model's step as one function over a dictionary of arrays: no modules, no interface, no checks."""
    model, batch, length = config.model, config.trainer.batch_size, config.dataset.seq_len
    layers, width, heads, hidden = model.num_layers, model.d_model, model.num_heads, model.ff_width
    head_dim = width // heads
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(0, 0.02, shape), jnp.float32)  # noqa: E731
    params = {
        "embedding": normal(VOCABULARY, width),
        "head": normal(width, VOCABULARY),
        "final": jnp.ones(width),
        "norm1": jnp.ones((layers, width)),
        "norm2": jnp.ones((layers, width)),
        "qkv": normal(layers, width, 3 * width),
        "out": normal(layers, width, width),
        "up": normal(layers, width, hidden),
        "down": normal(layers, hidden, width),
    }
    angles = np.arange(length)[:, None] * model.rope_theta ** (-np.arange(0, head_dim, 2) / head_dim)
    cos, sin = jnp.asarray(np.cos(angles), jnp.float32)[:, None], jnp.asarray(np.sin(angles), jnp.float32)[:, None]

    def norm(x, gain):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * gain

    def rope(x):
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def loss_fn(p, inputs, targets):
        x = jax.nn.one_hot(inputs, VOCABULARY) @ p["embedding"]
        for i in range(layers):
            qkv = (norm(x, p["norm1"][i]) @ p["qkv"][i]).reshape(batch, length, 3, heads, head_dim)
            q, k, v = rope(qkv[:, :, 0]), rope(qkv[:, :, 1]), qkv[:, :, 2]
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + y.reshape(batch, length, width) @ p["out"][i]
            x = x + jax.nn.gelu(norm(x, p["norm2"][i]) @ p["up"][i]) @ p["down"][i]
        logits = norm(x, p["final"]) @ p["head"]
        return optax.softmax_cross_entropy(logits, jax.nn.one_hot(targets, VOCABULARY)).mean()

    mask = {name: name not in ("embedding", "final", "norm1", "norm2") for name in params}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, 0.9, 0.99, weight_decay=0.1, mask=mask))

    def step(carry, index):
        p, opt_state = carry
        starts = jax.random.randint(jax.random.fold_in(jax.random.key(0), index), (batch,), 0, tokens.shape[0] - length)
        window = tokens[starts[:, None] + jnp.arange(length + 1)]
        loss, grads = jax.value_and_grad(loss_fn)(p, window[:, :-1], window[:, 1:])
        updates, opt_state = optimizer.update(grads, opt_state, p)
        return (optax.apply_updates(p, updates), opt_state), loss

    @functools.partial(jax.jit, donate_argnums=0)
    def steps(carry, start):
        return jax.lax.scan(step, carry, start + jnp.arange(STEPS_PER_CALL))

    carry = (params, optimizer.init(params))

    def run() -> None:
        nonlocal carry
        carry, losses = steps(carry, 0)
        losses.block_until_ready()

    return run


def read_sizes(arguments: list[str], sizes: dict[str, int]) -> dict[str, int]:
    """`sizes` with name=number arguments put in; the program ends with one line where an argument is none."""
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in sizes or not value.isdigit() or int(value) < 1:
            sys.exit(f"error: {argument}: write {' or '.join(sizes)} = a positive number")
        sizes[name] = int(value)
    return sizes


def main(arguments: list[str]) -> None:
    sizes = read_sizes(arguments, dict(d_model=64, num_heads=2, num_layers=4, seq_len=300, batch_size=16, rounds=5))
    rounds = sizes.pop("rounds")
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, VOCABULARY, 200_000), jnp.int32)
    configs = {kind.name: make_config(sizes, kind) for kind in AttentionType}
    arms = {"flat JAX": flat_arm(configs["standard"], tokens)}
    arms |= {name: chargpt_arm(config, tokens) for name, config in configs.items()}
    compile_seconds, best = {}, dict.fromkeys(arms, float("inf"))
    for name, run in arms.items():
        begin = time.perf_counter()
        run()
        compile_seconds[name] = time.perf_counter() - begin
    for _ in range(rounds):
        for name, run in arms.items():
            begin = time.perf_counter()
            run()
            best[name] = min(best[name], (time.perf_counter() - begin) / STEPS_PER_CALL)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, python {platform.python_version()}; {sizes}")
    print("| step of | ms | tokens/s | of standard | compile and first call, s |\n|---|---|---|---|---|")
    for name, seconds in best.items():
        speed = sizes["batch_size"] * sizes["seq_len"] / seconds
        print(
            f"| {name} | {1e3 * seconds:.1f} | {speed:,.0f} | {seconds / best['standard']:.2f} | {compile_seconds[name]:.1f} |"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
