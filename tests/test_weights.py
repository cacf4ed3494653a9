"""Weights leave and enter: bit for bit through our own files, and as Hugging Face's library understands them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from chargpt import checkpoint, weights
from chargpt.cli import run_tool
from chargpt.config import AttentionType, Config
from chargpt.errors import BAD_INPUT
from chargpt.run.directory import read_config
from chargpt.train import TrainState, init_state

VOCABULARY = "\n abcdé😀"
TEXT = VOCABULARY * 40
TINY = ["model.d_model=8", "model.num_heads=4", "model.d_ff=12", "dataset.seq_len=8"]
LLAMA = [*TINY, "model.activation=swiglu"]


def random_state(config: Config, step: int = 7) -> TrainState:
    """A state whose model is random bits, every kind of NaN among them, and whose counters are not zero."""
    rng = np.random.default_rng(0)

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return jnp.array(
            np.frombuffer(rng.bytes(leaf.size * leaf.dtype.itemsize), leaf.dtype).reshape(
                leaf.shape
            )
        )

    state = jax.tree.map(fill, eqx.filter_eval_shape(init_state, config, len(VOCABULARY), 0))
    return eqx.tree_at(lambda s: s.step, state, jnp.array(step, jnp.int32))


def make_run(run_dir: Path, config: Config) -> TrainState:
    """A run directory with a best checkpoint; the state in it."""
    state = random_state(config)
    (run_dir / "checkpoints").mkdir(parents=True)
    header = checkpoint.Header(
        config, VOCABULARY, "0f" * 32, 7, 1.5, 0.5, 7, {"jax": "0"}, {"metrics.jsonl": 5}
    )
    checkpoint.save(run_dir / "checkpoints" / "best.eqx", state, header)
    return state


def export(tmp_path: Path, *overrides: str) -> tuple[Path, TrainState]:
    """The exported file of a new run, and the run's state."""
    state = make_run(tmp_path / "run", small_config(*overrides))
    file = tmp_path / "out.safetensors"
    assert run_tool(["export", f"run={tmp_path / 'run'}", f"file={file}"]) == 0
    return file, state


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]


def assert_round_trip(tmp_path: Path, *overrides: str) -> None:
    config = small_config(*overrides)
    file, state = export(tmp_path, *overrides)
    again = tmp_path / "again"
    assert run_tool(["import", f"file={file}", f"run={again}"]) == 0
    fresh = eqx.filter_jit(lambda: init_state(config, len(VOCABULARY), config.seed))()
    for name in ("best", "last"):
        found, header = checkpoint.load(again / "checkpoints" / f"{name}.eqx")
        assert jax.tree.structure(found) == jax.tree.structure(state)
        assert checkpoint.describe_leaves(found) == checkpoint.describe_leaves(state)
        assert bits(found.model) == bits(state.model)
        assert bits(found.opt_state) == bits(fresh.opt_state) != bits(state.opt_state)
        assert [int(found.step), int(found.skipped), int(found.skipped_in_a_row)] == [0, 0, 0]
        assert (header.config, header.vocabulary, header.corpus_sha256) == (
            config,
            VOCABULARY,
            "0f" * 32,
        )
        assert (header.step, header.seconds, header.best_val_loss, header.record_sizes) == (
            0,
            0.0,
            None,
            {},
        )
    assert read_config(again / "config.yaml") == config


def test_export_and_import_restore_every_weight_bit_for_bit(
    mha_type: AttentionType, tmp_path: Path
) -> None:
    assert_round_trip(tmp_path, *TINY, f"model.mha_type={mha_type.name}")


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.tie_embeddings=true",),
        ("model.rope=false", "model.learned_positions=true"),
        ("model.qk_norm=true", "model.mha_type=gqa"),
        ("model.activation=swiglu", "model.num_layers=1"),
        ("model.norm=layernorm", "model.norm_position=post", "model.dropout=0.1"),
        ("model.mha_type=mla", "model.mla.q_lora_rank=4"),
    ],
    ids=" ".join,
)
def test_so_do_the_other_options_of_the_model(overrides: tuple[str, ...], tmp_path: Path) -> None:
    assert_round_trip(tmp_path, *TINY, *overrides)


def names_of(file: Path) -> set[str]:
    """The tensors of a file, those of layer 0 without its number; every layer has the same ones."""
    names = set(load_file(file))
    layers = [
        {name.split(".", 3)[3] for name in names if name.startswith(f"model.layers.{i}.")}
        for i in range(2)
    ]
    assert layers[0] == layers[1] and sum(map(len, layers)) == len(
        [name for name in names if ".layers." in name]
    )
    return {name for name in names if ".layers." not in name} | layers[0]


OUTSIDE = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
NORMS = {"input_layernorm.weight", "post_attention_layernorm.weight"}
QKVO = {f"self_attn.{letter}_proj.weight" for letter in "qkvo"}
FEED_FORWARD = {"mlp.up_proj.weight", "mlp.down_proj.weight"}


@pytest.mark.parametrize("kind", ["standard", "gqa", "mqa", "selective", "equinox"])
def test_names_are_those_of_llama(kind: str, tmp_path: Path) -> None:
    file, _ = export(tmp_path, *LLAMA, f"model.mha_type={kind}")
    assert names_of(file) == OUTSIDE | NORMS | QKVO | FEED_FORWARD | {"mlp.gate_proj.weight"}


def test_names_beyond_llamas_are_those_of_qwen3_and_deepseek(tmp_path: Path) -> None:
    overrides = ["model.qk_norm=true", "model.tie_embeddings=true", "model.learned_positions=true"]
    file, _ = export(tmp_path / "1", *TINY, *overrides)
    outside = OUTSIDE - {"lm_head.weight"} | {"model.embed_positions.weight"}
    qk_norm = {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    assert names_of(file) == outside | NORMS | QKVO | FEED_FORWARD | qk_norm
    file, _ = export(tmp_path / "2", *TINY, "model.mha_type=mla", "model.mla.q_lora_rank=4")
    latent = (
        "q_a_proj",
        "q_a_layernorm",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "kv_a_layernorm",
        "kv_b_proj",
        "o_proj",
    )
    assert names_of(file) == OUTSIDE | NORMS | FEED_FORWARD | {
        f"self_attn.{name}.weight" for name in latent
    }


def test_each_layer_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    file, state = export(tmp_path, *LLAMA)
    tensors = load_file(file)
    for i in range(2):
        gate = np.asarray(state.model.blocks.feed_forward.gate_proj.weight)[i]
        assert tensors[f"model.layers.{i}.mlp.gate_proj.weight"].tobytes() == gate.tobytes()


def test_an_imported_model_writes_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = Foreign(tmp_path).write()
    assert run_tool(foreign.command()) == 0
    assert run_tool(["sample", f"run={tmp_path / 'new'}", "prompt=a", "num_chars=3"]) == 0
    assert len(capsys.readouterr().out) == 1 + 3 + 1


# ---- from elsewhere


class Foreign:
    """A Llama file as others write it: tensors without our metadata, config.json beside it; to be changed and written."""

    def __init__(self, folder: Path, *overrides: str):
        config = small_config(*LLAMA, *overrides)
        rng = np.random.default_rng(0)
        shapes, rest = eqx.partition(
            eqx.filter_eval_shape(init_state, config, len(VOCABULARY), 0).model,
            lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct),
        )
        numbers = jax.tree.map(
            lambda leaf: jnp.array(rng.normal(size=leaf.shape), jnp.float32), shapes
        )
        model = eqx.combine(numbers, rest)
        self.folder, self.model, self.header = folder, config.model, None
        self.tensors = weights.to_tensors(model)
        self.fields: dict[str, Any] = dict(
            architectures=["LlamaForCausalLM"],
            model_type="llama",
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=config.model.kv_heads,
            head_dim=config.model.head_width,
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
        return [
            "import",
            f"file={self.folder / 'model.safetensors'}",
            f"run={self.folder / 'new'}",
            *text,
            *more,
        ]

    def imported(self, *more: str) -> tuple[TrainState, checkpoint.Header]:
        assert run_tool(self.command(*more)) == 0
        return checkpoint.load(self.folder / "new" / "checkpoints" / "best.eqx")


def refusal(command: list[str], capsys: pytest.CaptureFixture[str], run_dir: Path) -> str:
    """The one line with which a command is refused; it has made nothing."""
    capsys.readouterr()
    assert run_tool(command) == BAD_INPUT
    assert not run_dir.exists()
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.removesuffix("\n").isprintable(), err
    return err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.mha_type=gqa", "model.num_kv_heads=2", "model.head_dim=6"),
        ("model.mha_type=mqa", "model.tie_embeddings=true"),
    ],
    ids=["standard", "gqa", "mqa"],
)
def test_a_llama_file_becomes_the_model_that_it_is(
    overrides: tuple[str, ...], tmp_path: Path
) -> None:
    foreign = Foreign(tmp_path, *overrides).write()
    state, header = foreign.imported()
    found = weights.to_tensors(state.model)
    assert found.keys() == foreign.tensors.keys()
    assert all(np.array_equal(found[name], foreign.tensors[name]) for name in found)
    model = header.config.model
    assert (model.mha_type, model.kv_heads, model.head_width) == (
        foreign.model.mha_type,
        foreign.model.kv_heads,
        foreign.model.head_width,
    )
    assert (model.rope_theta, model.ff_width, model.tie_embeddings) == (
        500.0,
        12,
        foreign.model.tie_embeddings,
    )
    assert (header.config.dataset.seq_len, header.vocabulary) == (16, "".join(sorted(VOCABULARY)))


def test_what_config_json_leaves_out_has_the_value_that_hugging_face_gives_it(
    tmp_path: Path,
) -> None:
    foreign = Foreign(tmp_path)
    for name in (
        "architectures",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "rope_theta",
        "rope_scaling",
        "vocab_size",
    ):
        del foreign.fields[name]
    foreign.fields |= {
        "rope_parameters": {"rope_type": "default", "rope_theta": 250},
        "tie_word_embeddings": None,
    }
    _, header = foreign.write().imported("dataset.seq_len=9")
    assert (
        header.config.model.rope_theta == 250.0
        and header.config.model.mha_type is AttentionType.standard
    )
    assert header.config.dataset.seq_len == 9


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
        ({"model_type": "mistral"}, 'model_type="mistral": llama alone'),
        ({"model_type": None}, "model_type=null: llama alone"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "architectures=.*: LlamaForCausalLM alone",
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
def test_a_configuration_that_is_not_ours_to_run_is_refused_by_name(
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
        (
            transpose,
            r"model.layers.1.mlp.down_proj.weight has shape \[12, 8\], its configuration asks for \[8, 12\]",
        ),
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
    assert re.search(
        message, refusal(Foreign(tmp_path).write().command(*more), capsys, tmp_path / "new")
    )


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "\x00\xff", "[" * 100_000, '{"hidden_size": ' + "1" * 5000 + "}"]
)
def test_a_file_that_is_no_configuration_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = Foreign(tmp_path).write()
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    assert "config.json: is no JSON" in refusal(foreign.command(), capsys, tmp_path / "new")


# ---- damage and forgery


def test_a_damaged_file_is_refused_wherever_it_is_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, _ = export(tmp_path, *TINY)
    data = file.read_bytes()
    command = ["import", f"file={file}", f"run={tmp_path / 'new'}"]
    begin = int.from_bytes(data[:8], "little") + 8
    for size in [0, 7, 8, 9, begin - 1, begin, begin + 1, len(data) - 1]:
        file.write_bytes(data[:size])
        assert "cannot be read as safetensors" in refusal(command, capsys, tmp_path / "new")
    for forged in (data + b"\0", (1 << 62).to_bytes(8, "little") + data[8:], b"\x80\x04N." + data):
        file.write_bytes(forged)
        assert "cannot be read as safetensors" in refusal(command, capsys, tmp_path / "new")


def forge(file: Path, **changes: str | None) -> None:
    """Write the file again with other metadata, None for an entry that is left out."""
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata() | changes
    save_file(
        load_file(file),
        file,
        {name: value for name, value in metadata.items() if value is not None},
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"chargpt_format": "1"}, "is of format '1'; this version of chargpt reads '2'"),
        ({"vocabulary": '"ba"'}, "not a sorted string"),
        ({"vocabulary": "[1]"}, "not a sorted string"),
        (
            {"vocabulary": '"abc"'},
            r"model.embed_tokens.weight has shape \[8, 8\], its configuration asks for \[3, 8\]",
        ),
        ({"vocabulary": None}, "'vocabulary' is missing"),
        ({"config": None}, "'config' is missing"),
        ({"corpus_sha256": None}, "'corpus_sha256' is missing"),
        ({"config": "{}"}, "metadata does not fit"),
        ({"config": "[" * 100_000}, "metadata does not fit"),
        ({"config": '{"seed": "${oc.env:HOME}"}'}, "plain values"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_metadata_is_data_that_must_fit(
    changes: dict[str, str | None], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, _ = export(tmp_path, *TINY)
    forge(file, **changes)
    command = ["import", f"file={file}", f"run={tmp_path / 'new'}"]
    assert re.search(message, refusal(command, capsys, tmp_path / "new"))


@pytest.mark.parametrize(
    "name, value", [("num_layers", 10**12), ("d_model", 4 * 10**12), ("num_layers", 1)]
)
def test_a_configuration_with_other_shapes_than_the_file_is_refused(
    name: str, value: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, _ = export(tmp_path, *TINY)
    with safe_open(file, "numpy") as opened:
        plain = json.loads(opened.metadata()["config"])
    plain["model"][name] = value
    forge(file, config=json.dumps(plain))
    message = refusal(
        ["import", f"file={file}", f"run={tmp_path / 'new'}"], capsys, tmp_path / "new"
    )
    assert re.search("too few for|makes no model|asks for|no place for", message)


def test_our_own_files_take_no_configuration_from_outside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, _ = export(tmp_path, *TINY)
    for option in (
        "config=config.json",
        "dataset.name=shakespeare",
        "dataset.filepath=x",
        "dataset.seq_len=4",
    ):
        message = refusal(
            ["import", f"file={file}", f"run={tmp_path / 'new'}", option], capsys, tmp_path / "new"
        )
        assert message.startswith(f"{option.split('=')[0]}: ") and "leave" in message


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, _ = export(tmp_path, *TINY)
    before = file.read_bytes()
    assert "exists already" in refusal(
        ["export", f"run={tmp_path / 'run'}", f"file={file}"], capsys, tmp_path / "new"
    )
    assert file.read_bytes() == before
    assert run_tool(["import", f"file={file}", f"run={tmp_path / 'run'}"]) == BAD_INPUT
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == [
        "best.eqx",
        "checkpoints",
    ]
    missing = tmp_path / "nowhere" / "x.safetensors"
    assert "cannot be written" in refusal(
        ["export", f"run={tmp_path / 'run'}", f"file={missing}"], capsys, tmp_path / "new"
    )
    assert "run=" in refusal(
        ["export", f"run={tmp_path / 'gone'}", f"file={missing}"], capsys, tmp_path / "new"
    )
    assert "file: is missing" in refusal(
        ["export", f"run={tmp_path / 'run'}"], capsys, tmp_path / "new"
    )


# ---- parity


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "kv_heads, head_dim", [(4, 8), (2, 12), (1, 8)], ids=["standard", "gqa", "mqa"]
)
def test_logits_equal_those_of_hugging_face(
    kv_heads: int, head_dim: int, tied: bool, tmp_path: Path, record_property: Callable
) -> None:
    """What transformers saves, we import, and the logits are within 1e-4; what we export, transformers loads bit for bit."""
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
        for (
            name,
            parameter,
        ) in (
            theirs.named_parameters()
        ):  # large enough that every part of the model shows in the logits
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
    assert expected.std() > 1  # or closeness proves nothing
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
