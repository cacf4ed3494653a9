"""Importing models of Llama architecture: which ones, their numbers, and what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import filled, small_config
from safetensors.numpy import save_file
from test_weights import LLAMA, TEXT, VOCABULARY, refusal

from chargpt import checkpoint, weights
from chargpt.cli import run_tool
from chargpt.config import AttentionType
from chargpt.train import TrainState, init_state


class Foreign:
    """A Llama file as others write it, without our metadata and with config.json beside it.

    Tests change its `tensors` and `fields` before they write it.
    """

    def __init__(self, folder: Path, *overrides: str):
        config = small_config(*LLAMA, *overrides)
        shapes = eqx.filter_eval_shape(init_state, config, len(VOCABULARY), 0).model
        model = filled(shapes, 1.0)
        self.folder, self.attention, self.header = folder, model.stacked.attention, None
        self.tensors = weights.to_tensors(model)
        self.fields: dict[str, Any] = dict(
            architectures=["LlamaForCausalLM"],
            model_type="llama",
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=self.attention.num_kv_heads,
            head_dim=self.attention.head_dim,
            hidden_act="silu",
            rms_norm_eps=1e-5,
            max_position_embeddings=16,
            rope_theta=500.0,
            rope_scaling=None,
            tie_word_embeddings=config.model.tie_embeddings,
            attention_bias=False,
            mlp_bias=False,
            vocab_size=len(VOCABULARY),
        )

    def write(self) -> "Foreign":
        save_file(self.tensors, self.folder / "model.safetensors", self.header)
        (self.folder / "config.json").write_text(json.dumps(self.fields))
        (self.folder / "text.txt").write_text(TEXT)
        return self

    def command(self, *more: str) -> list[str]:
        text = ["dataset.name=file", f"dataset.filepath={self.folder / 'text.txt'}"]
        files = [f"file={self.folder / 'model.safetensors'}", f"run={self.folder / 'new'}"]
        return ["import", *files, *text, *more]

    def imported(self, *more: str) -> tuple[TrainState, checkpoint.Header]:
        assert run_tool(self.command(*more)) == 0
        return checkpoint.load(self.folder / "new" / "checkpoints" / "best.eqx")


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.mha_type=gqa", "model.num_kv_heads=2", "model.head_dim=6"),
        ("model.mha_type=mqa", "model.tie_embeddings=true"),
    ],
    ids=["standard", "gqa", "mqa"],
)
def test_a_llama_file_becomes_the_same_model(overrides: tuple[str, ...], tmp_path: Path) -> None:
    foreign = Foreign(tmp_path, *overrides).write()
    state, header = foreign.imported()
    found = weights.to_tensors(state.model)
    assert found.keys() == foreign.tensors.keys()
    assert all(np.array_equal(found[name], foreign.tensors[name]) for name in found)
    attention, model = state.model.stacked.attention, header.config.model
    sizes = (attention.num_heads, attention.num_kv_heads, attention.head_dim)
    expected = foreign.attention
    assert sizes == (expected.num_heads, expected.num_kv_heads, expected.head_dim)
    tied = foreign.fields["tie_word_embeddings"]
    assert (model.rope_theta, model.ff_width, model.tie_embeddings) == (500.0, 12, tied)
    kind = next((kind for kind in ("gqa", "mqa") if f"model.mha_type={kind}" in overrides), None)
    assert model.mha_type.name == (kind or "standard")
    assert (header.config.dataset.seq_len, header.vocabulary) == (16, "".join(sorted(VOCABULARY)))


def test_a_field_that_config_json_lacks_has_the_default_of_hugging_face(tmp_path: Path) -> None:
    foreign = Foreign(tmp_path)
    lacking = "architectures num_key_value_heads head_dim hidden_act rope_theta rope_scaling"
    for name in [*lacking.split(), "vocab_size"]:
        del foreign.fields[name]
    foreign.fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 250}
    foreign.fields["tie_word_embeddings"] = None
    _, header = foreign.write().imported("dataset.seq_len=9")
    model, dataset = header.config.model, header.config.dataset
    assert model.mha_type is AttentionType.standard and model.rope_theta == 250.0
    assert dataset.seq_len == 9


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_sixteen_bit_numbers_become_float32(dtype: Any, tmp_path: Path) -> None:
    foreign = Foreign(tmp_path)
    foreign.tensors = {name: tensor.astype(dtype) for name, tensor in foreign.tensors.items()}
    state, _ = foreign.write().imported()
    for name, tensor in weights.to_tensors(state.model).items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, foreign.tensors[name].astype(np.float32))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mistral"}, 'model_type="mistral": only llama can'),
        ({"model_type": None}, "model_type=null: only llama can"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "architectures=.*: only LlamaForCausalLM can",
        ),
        ({"attention_bias": True}, "attention_bias=true: our projections have no biases"),
        ({"mlp_bias": True}, "mlp_bias=true: our projections have no biases"),
        ({"hidden_act": "gelu"}, 'hidden_act="gelu": our gated activation is silu'),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps=1e-06: our norm uses 1e-05"),
        ({"rms_norm_eps": None}, "rms_norm_eps=1e-06: our norm uses 1e-05"),
        ({"sliding_window": 4096}, "sliding_window=4096: "),
        ({"use_sliding_window": True}, "use_sliding_window=true: "),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling=.*: our RoPE is neither scaled",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "rope_parameters=.*: our RoPE is neither scaled",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: "),
        ({"rope_theta": "big"}, 'rope_theta="big": must be a number'),
        ({"rope_theta": float("nan")}, "rope_theta=NaN: must be a number"),
        ({"hidden_size": None}, "hidden_size=null: must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: must be a whole number"),
        ({"num_attention_heads": True}, "num_attention_heads=true: must be a whole number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings="),
        ({"num_key_value_heads": 3}, "model.num_kv_heads=3: does not divide"),
        ({"num_hidden_layers": 10**9}, "too few for 1000000000 layers"),
        (
            {"hidden_size": 16},
            r"model.embed_tokens.weight has shape \[8, 8\], its configuration asks for \[8, 16\]",
        ),
        (
            {"intermediate_size": 10**30},
            "its configuration makes no model|its configuration asks for",
        ),
        (
            {"num_hidden_layers": 1},
            r"has a tensor 'model.layers.1\.\S+', which its configuration has no place for",
        ),
        (
            {"num_hidden_layers": 3},
            r"has no tensor model.layers.2\.\S+, which its configuration asks for",
        ),
        (
            {"tie_word_embeddings": True},
            "has a tensor 'lm_head.weight', which its configuration has no place for",
        ),
        (
            {"head_dim": 4},
            r"model.layers.0.self_attn.q_proj.weight has shape \[8, 8\], .* \[16, 8\]",
        ),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_a_configuration_that_is_not_of_our_model_is_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = Foreign(tmp_path)
    foreign.fields |= changes
    assert re.search(message, refusal(foreign.write().command(), capsys, tmp_path / "new"))


def drop(tensors: dict[str, np.ndarray]) -> None:
    del tensors["model.layers.1.self_attn.k_proj.weight"]


def drop_table(tensors: dict[str, np.ndarray]) -> None:
    del tensors["model.embed_tokens.weight"]


def add_bias(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(8, np.float32)


def add_control_characters(tensors: dict[str, np.ndarray]) -> None:
    tensors["\x1b[2J\n"] = np.zeros(8, np.float32)


def transpose(tensors: dict[str, np.ndarray]) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)


def whole_numbers(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.weight"] = np.ones(8, np.int8)


def more_rows(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.embed_tokens.weight"] = np.zeros((9, 8), np.float32)


@pytest.mark.parametrize(
    "change, message",
    [
        (drop, "has no tensor model.layers.1.self_attn.k_proj.weight"),
        (drop_table, "has no tensor model.embed_tokens.weight"),
        (add_bias, "has a tensor 'model.layers.0.self_attn.q_proj.bias'"),
        (add_control_characters, r"has a tensor '\\x1b\[2J\\n'"),
        (transpose, r"down_proj.weight has shape \[12, 8\], its configuration asks for \[8, 12\]"),
        (whole_numbers, "model.norm.weight holds I8 numbers; F32, F16, BF16 can be read"),
        (
            more_rows,
            r"has 8 different characters, but model.embed_tokens.weight has shape \[9, 8\]",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_tensor_that_does_not_fit_is_named(
    change: Callable, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = Foreign(tmp_path)
    change(foreign.tensors)
    assert re.search(message, refusal(foreign.write().command(), capsys, tmp_path / "new"))


@pytest.mark.parametrize(
    "more, message",
    [
        (["dataset.seq_len=17"], r"dataset.seq_len=17: must be in \[1, 16\]"),
        (["dataset.seq_len=0"], r"dataset.seq_len=0: must be in \[1, 16\]"),
        (["config=/nowhere/config.json"], "config=/nowhere/config.json: there is no such file"),
        (["dataset.name=null", "dataset.filepath=null"], "dataset.name: write the text"),
        (
            ["dataset.name=shakespeare", "dataset.filepath=null"],
            "dataset shakespeare: has 62 different characters",
        ),
        (["file=/nowhere/x.safetensors"], "file=/nowhere/x.safetensors: there is no such file"),
        (["file="], "file: is missing"),
        (["run="], "run: is missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_refused(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = Foreign(tmp_path).write().command(*more)
    assert re.search(message, refusal(command, capsys, tmp_path / "new"))


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "\x00\xff", "[" * 100_000, '{"hidden_size": ' + "1" * 5000 + "}"]
)
def test_a_file_that_is_not_a_configuration_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = Foreign(tmp_path).write()
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    expected = "is not a JSON object" if text == "[]" else "is not JSON"
    message = refusal(foreign.command(), capsys, tmp_path / "new")
    assert f"config.json: {expected}" in message


def test_an_imported_model_writes_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = Foreign(tmp_path).write()
    assert run_tool(foreign.command()) == 0
    assert run_tool(["sample", f"run={tmp_path / 'new'}", "prompt=a", "num_chars=3"]) == 0
    assert len(capsys.readouterr().out) == 1 + 3 + 1


# ---- parity


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "kv_heads, head_dim", [(4, 8), (2, 12), (1, 8)], ids=["standard", "gqa", "mqa"]
)
def test_logits_equal_those_of_hugging_face(
    kv_heads: int, head_dim: int, tied: bool, tmp_path: Path, record_property: Callable
) -> None:
    """An import from transformers has its logits within 1e-4; it loads our export exactly."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        # Large enough that every part of the model shows in the logits
        for name, parameter in theirs.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text(3 * TEXT)
    command = ["import", f"file={tmp_path / 'model.safetensors'}", f"run={tmp_path / 'new'}"]
    assert (
        run_tool([*command, "dataset.name=file", f"dataset.filepath={tmp_path / 'text.txt'}"]) == 0
    )

    ours = checkpoint.load(tmp_path / "new" / "checkpoints" / "best.eqx")[0].model
    tokens = np.random.default_rng(0).integers(0, len(VOCABULARY), 64)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens[None])).logits[0].numpy()
    found = np.asarray(eqx.filter_jit(ours)(jnp.asarray(tokens)))
    assert expected.std() > 1  # otherwise closeness proves nothing
    difference = np.abs(found - expected).max()
    record_property("max difference", float(difference))
    assert difference < 1e-4

    out = tmp_path / "out"
    out.mkdir()
    assert run_tool(["export", f"run={tmp_path / 'new'}", f"file={out / 'model.safetensors'}"]) == 0
    config.save_pretrained(out)
    again = transformers.LlamaForCausalLM.from_pretrained(out)
    for name, parameter in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], parameter), name
