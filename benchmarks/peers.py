"""What a training step is measured against: a flat JAX step, and Hugging Face models in PyTorch."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from chargpt.config import Config

VOCABULARY = 65


def flat_arm(config: Config, tokens: jax.Array, num_steps: int) -> Callable[[], None]:
    """The standard model's step as one function over a dictionary of arrays, without modules.

    Every call takes `num_steps` steps.
    """
    model, batch, length = config.model, config.trainer.batch_size, config.dataset.seq_len
    layers, width, heads, hidden = model.num_layers, model.d_model, model.num_heads, model.ff_width
    head_dim = width // heads
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(0, 0.02, shape), jnp.float32)

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
    angles = np.arange(length)[:, None] * model.rope_theta ** (
        -np.arange(0, head_dim, 2) / head_dim
    )
    cos, sin = (
        jnp.asarray(np.cos(angles), jnp.float32)[:, None],
        jnp.asarray(np.sin(angles), jnp.float32)[:, None],
    )

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
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-3, 0.9, 0.99, weight_decay=0.1, mask=mask)
    )

    def step(carry, index):
        p, opt_state = carry
        starts = jax.random.randint(
            jax.random.fold_in(jax.random.key(0), index), (batch,), 0, tokens.shape[0] - length
        )
        window = tokens[starts[:, None] + jnp.arange(length + 1)]
        loss, grads = jax.value_and_grad(loss_fn)(p, window[:, :-1], window[:, 1:])
        updates, opt_state = optimizer.update(grads, opt_state, p)
        return (optax.apply_updates(p, updates), opt_state), loss

    @functools.partial(jax.jit, donate_argnums=0)
    def steps(carry, start):
        return jax.lax.scan(step, carry, start + jnp.arange(num_steps))

    carry = (params, optimizer.init(params))

    def run() -> None:
        nonlocal carry
        carry, losses = steps(carry, 0)
        losses.block_until_ready()

    return run


def torch_models(config: Config) -> dict[str, Any]:
    """Hugging Face's GPT-2 and Llama of our sizes, freshly initialised; empty if not installed."""
    try:
        import transformers
    except ImportError:
        print("torch and transformers are not installed: no PyTorch arms", file=sys.stderr)
        return {}
    model, context = config.model, config.dataset.seq_len
    gpt2 = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=context,
        n_embd=model.d_model,
        n_layer=model.num_layers,
        n_head=model.num_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=None,
    )
    llama = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=model.d_model,
        intermediate_size=model.ff_width,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=None,
    )
    return {
        "GPT-2": transformers.GPT2LMHeadModel(gpt2),
        "Llama": transformers.LlamaForCausalLM(llama),
    }


def torch_arm(
    model: Any, config: Config, tokens: np.ndarray, num_steps: int, compiled: bool
) -> Callable[[], None]:
    """Steps in PyTorch, `num_steps` a call: batches, clipping, fused AdamW, precision as ours."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, length = config.trainer.batch_size, config.dataset.seq_len
    model.to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True
    )
    data = torch.from_numpy(np.asarray(tokens, np.int64)).to(device)

    def loss_fn(inputs, targets):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits.reshape(-1, VOCABULARY), targets.reshape(-1)
        )

    if compiled:
        loss_fn = torch.compile(loss_fn)

    def run() -> None:
        for _ in range(num_steps):
            starts = torch.randint(len(data) - length, (batch, 1), device=device)
            windows = data[starts + torch.arange(length + 1, device=device)]
            loss = loss_fn(windows[:, :-1], windows[:, 1:])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        loss.item()

    return run
