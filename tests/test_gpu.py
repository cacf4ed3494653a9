"""What an NVIDIA GPU is handed, lowered here without one: fused attention, and nothing slow."""

import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import cuda
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, make_config, small_config
from jax._src import cache_key
from jax.sharding import Mesh

from chargpt.attention import kernel
from chargpt.config import AttentionType, Config, OptimizerName
from chargpt.parallel import AXES, Devices, choose_devices
from chargpt.train import compute_dtype, init_state, loss_fn

sys.path.append(str(ROOT / "benchmarks"))
import gpu_bench

VOCABULARY = 20
STEPS = 2
# Widths that cuDNN takes
WIDTHS = ["model.d_model=32", "model.mla.qk_nope_head_dim=4", "model.mla.qk_rope_head_dim=4"]
SLOW = ("sort", "case", "if", "scatter")


def config_of(mha_type: AttentionType, *overrides: str) -> Config:
    wide = [*WIDTHS, "trainer.precision=null", *overrides]
    return small_config(f"model.mha_type={mha_type.name}", *wide)


def is_fused(config: Config) -> bool:
    """Whether this type hands its attention to the kernel at all; Equinox's has its own."""
    calls = []

    def spy(*arguments: object, **named: object) -> object:
        calls.append(arguments)
        return attention(*arguments, **named)

    attention = kernel.dot_product_attention
    model = eqx.filter_eval_shape(init_state, config, VOCABULARY, 0).model
    with mock.patch.object(kernel, "dot_product_attention", spy):
        eqx.filter_eval_shape(lambda model: model(jnp.zeros(5, jnp.int32)), model)
    return bool(calls)


def fused_calls(config: Config) -> set[int]:
    """How many calls of it a program may have: up to jax 0.11, layers share one function."""
    return {1, config.model.num_layers} if is_fused(config) else {0}


def assert_has_no(operations: tuple[str, ...], text: str) -> None:
    for operation in operations:
        assert f"stablehlo.{operation}" not in text


def products(text: str) -> list[str]:
    """The types of operands and result of every matrix product."""
    return re.findall(r"stablehlo.dot_general .*? : (\(.*?\) -> \S+)", text)


@pytest.mark.parametrize("optimizer", list(OptimizerName))
def test_a_training_step_has_fused_attention_and_16_bit_products_only(mha_type, optimizer):
    config = config_of(mha_type, f"optimizer.name={optimizer.name}")
    text = cuda.training(config, VOCABULARY, STEPS).as_text()
    forward = text.count("@__cudnn$fmhaSoftmax(")
    assert forward in fused_calls(config)
    assert text.count("@__cudnn$fmhaSoftmaxBackward(") == forward
    assert_has_no(SLOW, text)
    assert text.count("stablehlo.while") == 1  # the chunk, of a known number of steps
    assert len(products(text)) > 20
    assert [kinds for kinds in products(text) if "f32" in kinds] == []


def test_the_fused_kernel_knows_windows_and_sinks_and_alibi_have_none():
    """The layers of a pattern each have their own; without a window it says 0."""
    pattern = ["model.num_layers=2", "model.window=4", "model.window_pattern=LG"]
    text = cuda.training(config_of(AttentionType.standard, *pattern), VOCABULARY, STEPS).as_text()
    assert set(re.findall(r"sliding_window_length[^:]*: (\d+)", text)) == {"4", "0"}
    for option in ("model.sink=zero", "model.positions=alibi"):
        config = config_of(AttentionType.standard, option)
        text = cuda.training(config, VOCABULARY, STEPS).as_text()
        assert "cudnn" not in text
        assert_has_no(SLOW, text)


def test_a_step_of_a_population_has_one_fused_kernel_for_all_members(mha_type):
    config = config_of(mha_type)
    devices = choose_devices(config, members=3)
    text = cuda.population(config, VOCABULARY, STEPS, devices, None).as_text()
    forward = text.count("@__cudnn$fmhaSoftmax(")
    assert forward in fused_calls(config)
    assert text.count("@__cudnn$fmhaSoftmaxBackward(") == forward
    assert_has_no(SLOW, text)
    assert text.count("stablehlo.while") == 1
    assert [kinds for kinds in products(text) if "f32" in kinds] == []


def test_an_evaluation_has_fused_attention_and_16_bit_products_only(mha_type):
    config = config_of(mha_type)
    text = cuda.evaluation(config, VOCABULARY).as_text()
    assert text.count("@__cudnn$fmhaSoftmax(") in fused_calls(config)
    assert "Backward" not in text
    assert_has_no(SLOW, text)
    assert products(text) and "f32" not in "".join(products(text))


def test_the_sampler_reads_its_cache_without_the_fused_kernel(mha_type):
    """Which has no plan for one query. Its scatters are writes of one row, slices to XLA."""
    text = cuda.sampler(config_of(mha_type), VOCABULARY).as_text()
    assert "cudnn" not in text
    assert_has_no(SLOW[:-1], text)
    assert products(text) and "f32" not in "".join(products(text))


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "length", "expected"),
    [
        ((9, 0), jnp.bfloat16, 32, 2, True),
        ((8, 0), jnp.float16, 128, 2, True),
        ((10, 0), jnp.bfloat16, 8, 2, True),
        ((7, 5), jnp.bfloat16, 32, 2, False),  # T4
        (None, jnp.bfloat16, 32, 2, False),
        ((9, 0), jnp.float32, 32, 2, False),
        ((9, 0), jnp.bfloat16, 36, 2, False),
        ((9, 0), jnp.bfloat16, 136, 2, False),
        ((9, 0), jnp.bfloat16, 32, 1, False),
    ],
)
def test_the_fused_kernel_is_asked_for_where_cudnn_has_a_plan(
    capability, dtype, width, length, expected, monkeypatch
):
    monkeypatch.setattr(kernel, "cuda_capability", lambda: capability)
    assert kernel.fused_kernel(dtype, width, length) is expected


@pytest.mark.parametrize(
    ("name", "expected"), [("9.0", (9, 0)), ("12.1", (12, 1)), ("gfx90a", None), (None, None)]
)
def test_only_nvidia_gpus_have_a_cuda_capability(name, expected, monkeypatch):
    device = SimpleNamespace(**({} if name is None else {"compute_capability": name}))
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert kernel.cuda_capability() == expected


def test_precision_is_16_bits_on_a_gpu_unless_it_is_chosen():
    chosen = small_config("trainer.precision=float32").trainer.precision
    assert compute_dtype(None) == compute_dtype(chosen) == jnp.float32
    with cuda.as_on_a_gpu():
        assert (compute_dtype(None), compute_dtype(chosen)) == (jnp.bfloat16, jnp.float32)


def gradient(model: eqx.Module, x: jax.Array, dtype: Any) -> list[jax.Array]:
    """Loss and gradients, traced anew at every call."""

    def loss(model: eqx.Module) -> jax.Array:
        return loss_fn(model, x[:, :-1], x[:, 1:], None, dtype)

    return jax.tree.leaves(eqx.filter_jit(eqx.filter_value_and_grad(loss))(model))


def test_the_fused_branch_is_the_formula(mha_type):
    """With XLA's form of the call in cuDNN's place; values narrower than keys, so padded in MLA."""
    config = config_of(mha_type, "model.mla.v_head_dim=6")
    model = init_state(config, VOCABULARY, 0).model
    x = jax.random.randint(jax.random.key(1), (2, 17), 0, VOCABULARY)
    real, calls = jax.nn.dot_product_attention, []

    def in_place(*arguments: jax.Array, implementation: str, **how: object) -> jax.Array:
        calls.append(implementation)
        return real(*arguments, implementation="xla", **how)

    plain = gradient(model, x, jnp.float32)
    with (
        mock.patch.object(kernel, "fused_kernel", lambda *_: True),
        mock.patch.object(jax.nn, "dot_product_attention", in_place),
    ):
        fused = gradient(model, x, jnp.float32)
    assert set(calls) == ({"cudnn"} if is_fused(config) else set())
    for one, other in zip(plain, fused, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="runs on the GPU itself")
def test_fused_attention_on_the_device_is_that_of_xla(mha_type):
    """Loss and gradients in bfloat16, which rounds each of them to 8 bits."""
    config = config_of(mha_type, "dataset.seq_len=100")
    model = init_state(config, VOCABULARY, 0).model
    x = jax.random.randint(jax.random.key(1), (4, 101), 0, VOCABULARY)

    fused = gradient(model, x, jnp.bfloat16)
    with mock.patch.object(kernel, "fused_kernel", lambda *_: False):
        plain = gradient(model, x, jnp.bfloat16)
    for one, other in zip(fused, plain, strict=True):
        assert np.linalg.norm(one - other) <= 0.03 * np.linalg.norm(other)


def test_the_benchmark_for_a_gpu_keeps_what_it_measured(tmp_path):
    """Rehearsed here: a part, and one for which no time is left."""

    def bench(*arguments: str) -> subprocess.CompletedProcess:
        script = ROOT / "benchmarks" / "gpu_bench.py"
        command = [sys.executable, script, f"folder={tmp_path}", "rehearse=true", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    done = bench("parts=train-0.8M")
    assert done.returncode == 0 and "train-0.8M: done" in done.stdout, done.stdout + done.stderr
    assert "| standard |" in (tmp_path / "summary.md").read_text()
    done = bench("parts=record", "minutes=0")
    assert done.returncode == 1 and "record: not begun: no time was left" in done.stdout
    assert "| standard |" in (tmp_path / "train-0.8M.txt").read_text()


@pytest.mark.parametrize("rehearse", [False, True])
def test_the_benchmark_for_a_gpu_trains_recipes_that_exist(rehearse):
    commands = [command for command, _ in gpu_bench.parts(rehearse, ROOT).values()]
    recipes = [overrides for script, *overrides in commands if script == "main.py"]
    assert len(recipes) == 2
    for overrides in recipes:
        make_config(*(name for name in overrides if not name.startswith("hydra.")))


def two_devices() -> Devices:
    return Devices(Mesh(np.array(jax.devices()[:2]).reshape(2, 1), AXES))


@pytest.mark.parametrize("optimizer", list(OptimizerName))
def test_two_devices_sum_gradients_and_move_no_layers_about(optimizer):
    """Three layers, which two devices do not share evenly."""
    overrides = ["trainer.num_devices=2", "model.num_layers=3", f"optimizer.name={optimizer.name}"]
    config = small_config(*overrides)
    lowered = cuda.training(config, VOCABULARY, STEPS, two_devices(), on_gpu=False)
    text = lowered.compile().as_text()
    moves = re.findall(r" (all-to-all|collective-permute|all-gather|all-reduce)\(", text)
    assert {"all-to-all", "collective-permute"}.isdisjoint(moves) and "all-reduce" in moves
    # Muon's matrices have two shapes: square, and of the feed-forward layers
    assert moves.count("all-gather") == (2 if optimizer is OptimizerName.muon else 0)


def test_the_cache_key_of_a_step_on_two_gpus_leaves_out_an_address():
    """Of an object in lowered attention: another one each time that it is lowered.

    tests/run/test_cache.py checks that runs leave it out.
    """
    config = config_of(AttentionType.standard, "trainer.num_devices=2", "model.num_layers=1")
    modules = [
        cuda.training(config, VOCABULARY, STEPS, two_devices()).compiler_ir("stablehlo")
        for _ in range(2)
    ]
    assert "CustomSPMDPartitioning" in str(modules[0])

    def texts(ignored: object) -> set[bytes]:
        return {cache_key._canonicalize_ir(module, ignored) for module in modules}

    names = getattr(cache_key, "IgnoreCallbacks", None)  # a boolean from jax 0.12 on
    nothing, address = (names.NO, names.CUSTOM_PARTITIONING) if names else (False, True)
    assert len(texts(address)) == 1
    assert len(texts(nothing)) == 2


@pytest.mark.parametrize(
    ("batch_size", "seq_len", "expected"),
    [(4, 16, 1), (64, 1024, 8), (64, 256, 4), (6, 1 << 14, 6), (16, 256, 1)],
)
def test_small_batches_take_few_gpus(batch_size, seq_len, expected, monkeypatch):
    gpus = [mock.Mock(platform="gpu") for _ in range(8)]
    monkeypatch.setattr(jax, "devices", lambda: gpus)
    sizes = [f"trainer.batch_size={batch_size}", f"dataset.seq_len={seq_len}"]
    config = small_config("trainer.num_devices=null", *sizes)
    devices = choose_devices(config)
    assert len(devices) == expected
    assert devices.reason == {8: "", 6: "of 8"}.get(expected, "of 8, 4,096 tokens or more each")
    chosen = small_config("trainer.num_devices=2", *sizes)
    assert len(choose_devices(chosen)) == 2
