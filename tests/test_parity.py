"""Modifiers and experts beside transformers' models that have them, with our weights."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import filled, small_config

from chargpt import weights
from chargpt.attention import GroupedQueryAttention
from chargpt.attention.kernel import CAUSAL, Reading
from chargpt.experts import MixtureOfExperts
from chargpt.model import GPT
from chargpt.train import init_state

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTH, WIDTH, HEADS, HEAD_DIM, THETA = 21, 32, 4, 8, 10000.0
TOKENS = np.random.default_rng(0).integers(0, 11, LENGTH)


@pytest.fixture
def torch() -> Any:
    pytest.importorskip("transformers")
    return pytest.importorskip("torch")


def make_model(*overrides: str) -> GPT:
    sizes = (f"model.d_model={WIDTH}", "model.activation=swiglu", "model.num_kv_heads=2")
    config = small_config("model.mha_type=gqa", *sizes, *overrides)
    return filled(eqx.filter_eval_shape(init_state, config, 11, 0).model, 0.3)


def make_layer(qk_norm: bool = False, theta: float | None = THETA) -> GroupedQueryAttention:
    def build(key: Any) -> GroupedQueryAttention:
        sizes = WIDTH, HEADS, 2, HEAD_DIM, theta
        return GroupedQueryAttention(*sizes, qk_norm=qk_norm, key=key)

    return filled(eqx.filter_eval_shape(build, jnp.zeros(2, jnp.uint32)), 0.3)


def stream() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(LENGTH, WIDTH)).astype(np.float32)


def causal_mask(torch: Any) -> Any:
    """What is added to scores: -inf above the diagonal."""
    return torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]


def copy(torch: Any, layer: GroupedQueryAttention, theirs: Any, *names: str) -> None:
    for name in names:
        weight = np.asarray(getattr(layer, f"{name}_proj").weight)
        getattr(theirs, f"{name}_proj").weight = torch.nn.Parameter(torch.tensor(weight))


def angles(torch: Any, width: int) -> tuple[Any, Any]:
    """(cos, sin) of RoPE, `width` numbers per position."""
    half = np.arange(LENGTH)[:, None] * THETA ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    both = torch.tensor(np.tile(half, width // half.shape[1])[None], dtype=torch.float32)
    return both.cos(), both.sin()


def assert_close(found: Any, expected: Any, record_property: Callable) -> None:
    expected = np.asarray(expected)
    difference = float(np.abs(found - expected).max())
    record_property("max difference", difference)
    assert expected.std() > 0.5  # otherwise closeness proves nothing
    assert difference < 1e-4


@pytest.mark.parametrize("pattern", ["L", "LG"])
def test_windows_are_those_of_qwen3(torch: Any, pattern: str, record_property: Callable) -> None:
    import transformers

    window = ("model.window=4", f"model.window_pattern={pattern}", "model.qk_norm=true")
    model = make_model(*window)
    kinds = {"L": "sliding_attention", "G": "full_attention"}
    config = transformers.Qwen3Config(
        vocab_size=11,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        rms_norm_eps=1e-5,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=[kinds[(2 * pattern)[layer]] for layer in range(2)],
        attn_implementation="eager",
    )
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    state = {name: torch.tensor(tensor) for name, tensor in weights.to_tensors(model).items()}
    theirs.load_state_dict(state)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS[None])).logits[0]
    assert_close(eqx.filter_jit(model)(jnp.asarray(TOKENS)), expected, record_property)


@pytest.mark.parametrize("sink", ["learned", "zero"])
def test_a_sink_is_that_of_gpt_oss(torch: Any, sink: str, record_property: Callable) -> None:
    from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

    layer = make_layer()
    config = gpt_oss.GptOssConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        attention_bias=False,
        layer_types=["full_attention"],
        num_hidden_layers=1,
        attn_implementation="eager",
    )
    theirs = gpt_oss.GptOssAttention(config, 0).eval()
    copy(torch, layer, theirs, "q", "k", "v", "o")
    sinks = np.zeros(4) if sink == "zero" else np.array([-1.0, 0.0, 1.0, 2.0])
    theirs.sinks = torch.nn.Parameter(torch.tensor(sinks, dtype=torch.float32))
    with torch.no_grad():
        x, places = torch.tensor(stream()[None]), angles(torch, HEAD_DIM // 2)
        expected = theirs(x, places, causal_mask(torch))[0][0]
    found = layer(jnp.asarray(stream()), Reading(sink=jnp.asarray(sinks, jnp.float32)))
    assert_close(found, expected, record_property)


def test_a_gate_is_that_of_qwen3_next(torch: Any, record_property: Callable) -> None:
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

    layer = make_layer(qk_norm=True)
    config = qwen3_next.Qwen3NextConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    theirs = qwen3_next.Qwen3NextAttention(config, 0).eval()
    copy(torch, layer, theirs, "k", "v", "o")
    gate_weight = np.random.default_rng(2).normal(size=(HEADS * HEAD_DIM, WIDTH)) * 0.3
    per_head = (HEADS, HEAD_DIM, WIDTH)  # theirs: queries and gates in turn, head by head
    fused = [np.asarray(layer.q_proj.weight).reshape(per_head), gate_weight.reshape(per_head)]
    fused = np.concatenate(fused, axis=1).reshape(-1, WIDTH)
    theirs.q_proj.weight = torch.nn.Parameter(torch.tensor(fused, dtype=torch.float32))
    for name in ("q_norm", "k_norm"):  # theirs multiplies by 1 + weight
        gain = torch.tensor(np.asarray(getattr(layer, name).weight) - 1)
        getattr(theirs, name).weight = torch.nn.Parameter(gain)
    with torch.no_grad():
        x, places = torch.tensor(stream()[None]), angles(torch, HEAD_DIM)
        expected = theirs(x, places, causal_mask(torch))[0][0]
    gate = 1 / (1 + np.exp(-stream() @ gate_weight.T)).reshape(LENGTH, HEADS, HEAD_DIM)
    found = layer(jnp.asarray(stream()), CAUSAL, jnp.asarray(gate, jnp.float32))
    assert_close(found, expected, record_property)


def test_alibi_is_that_of_mpt(torch: Any, record_property: Callable) -> None:
    from transformers.models.mpt import modeling_mpt as mpt

    layer = GroupedQueryAttention(WIDTH, HEADS, HEADS, HEAD_DIM, None, key=jnp.zeros(2, jnp.uint32))
    layer = filled(eqx.filter_eval_shape(lambda: layer), 0.3)
    config = mpt.MptConfig(d_model=WIDTH, n_heads=HEADS)
    theirs = mpt.MptAttention(config, 0).eval()
    fused = np.concatenate([getattr(layer, f"{name}_proj").weight for name in "qkv"])
    theirs.Wqkv.weight = torch.nn.Parameter(torch.tensor(fused))
    theirs.out_proj.weight = torch.nn.Parameter(torch.tensor(np.asarray(layer.o_proj.weight)))
    bias = mpt.build_mpt_alibi_tensor(HEADS, LENGTH)
    with torch.no_grad():
        blocked = causal_mask(torch) < 0
        expected = theirs(torch.tensor(stream()[None]), bias, attention_mask=blocked)[0][0]
    assert_close(layer(jnp.asarray(stream()), Reading(alibi=True)), expected, record_property)


def make_experts(*overrides: str) -> MixtureOfExperts:
    sizes = (f"model.d_model={WIDTH}", "model.activation=swiglu", "model.num_experts=6")
    config = small_config(*sizes, "model.expert_d_ff=24", *overrides).model
    shapes = eqx.filter_eval_shape(
        lambda key: MixtureOfExperts(config, key=key), jnp.zeros(2, "u4")
    )
    return filled(shapes, 0.3)


def copy_experts(torch: Any, layer: MixtureOfExperts, theirs: Any) -> None:
    """Router and experts; theirs have gate_proj and up_proj in one."""

    def tensor(*linears: eqx.nn.Linear) -> Any:
        weights = np.concatenate([linear.weight for linear in linears], axis=-2)
        return torch.nn.Parameter(torch.tensor(weights))

    experts = layer.experts
    assert experts.gate_proj is not None
    theirs.gate.weight = tensor(layer.router.proj)
    theirs.experts.gate_up_proj = tensor(experts.gate_proj, experts.up_proj)
    theirs.experts.down_proj = tensor(experts.down_proj)


def assert_same_layer(torch: Any, layer: Any, theirs: Any, record_property: Callable) -> None:
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(stream()[None]))[0]
    assert_close(eqx.filter_jit(layer)(jnp.asarray(stream())), expected, record_property)


def test_experts_and_their_loss_are_those_of_mixtral(torch: Any, record_property: Callable) -> None:
    from transformers.models.mixtral import modeling_mixtral as mixtral

    layer = make_experts()
    config = mixtral.MixtralConfig(
        hidden_size=WIDTH, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2
    )
    theirs = mixtral.MixtralSparseMoeBlock(config)
    copy_experts(torch, layer, theirs)
    assert_same_layer(torch, layer, theirs, record_property)
    with torch.no_grad():
        logits, *_ = theirs.gate(torch.tensor(stream()))
        loss = mixtral.load_balancing_loss_func((logits,), 6, 2)
    _, routing = eqx.filter_jit(lambda x: layer.routed(x))(jnp.asarray(stream()))
    # Theirs counts a token once for each of its experts, so that even loads are 2
    np.testing.assert_allclose(2 * routing.aux_loss, loss, rtol=1e-5)


@pytest.mark.parametrize("renormalise", [False, True])
def test_experts_are_those_of_olmoe(
    torch: Any, renormalise: bool, record_property: Callable
) -> None:
    from transformers.models.olmoe import modeling_olmoe as olmoe

    layer = make_experts(f"model.router_renormalise={renormalise}", "model.experts_per_token=3")
    config = olmoe.OlmoeConfig(
        hidden_size=WIDTH,
        intermediate_size=24,
        num_experts=6,
        num_experts_per_tok=3,
        norm_topk_prob=renormalise,
    )
    theirs = olmoe.OlmoeSparseMoeBlock(config)
    copy_experts(torch, layer, theirs)
    assert_same_layer(torch, layer, theirs, record_property)


def test_experts_are_those_of_deepseek_v3(torch: Any, record_property: Callable) -> None:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    layer = make_experts("model.router=sigmoid_bias", "model.shared_experts=2")
    bias = jnp.array([0.4, -0.3, 0.0, 0.2, -0.1, 0.1])
    plain, layer = layer, eqx.tree_at(lambda layer: layer.router.bias, layer, bias)
    config = deepseek.DeepseekV3Config(
        hidden_size=WIDTH,
        moe_intermediate_size=24,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_shared_experts=2,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )
    theirs = deepseek.DeepseekV3MoE(config)
    copy_experts(torch, layer, theirs)
    theirs.gate.e_score_correction_bias = torch.tensor(np.asarray(bias))
    assert layer.shared_experts is not None
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight = np.asarray(getattr(layer.shared_experts, name).weight)
        getattr(theirs.shared_experts, name).weight = torch.nn.Parameter(torch.tensor(weight))
    assert_same_layer(torch, layer, theirs, record_property)
    x = jnp.asarray(stream())
    assert np.abs(layer(x) - plain(x)).max() > 0.1  # the bias matters
