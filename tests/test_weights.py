"""Weights leave and enter bit for bit through our own files, under the usual names."""

import json
import re
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

from chargpt import checkpoint
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
    """A state whose model is random bits, including NaNs of every kind, and its step not zero."""
    rng = np.random.default_rng(0)

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        random = np.frombuffer(rng.bytes(leaf.size * leaf.dtype.itemsize), leaf.dtype)
        return jnp.array(random.reshape(leaf.shape))

    state = jax.tree.map(fill, eqx.filter_eval_shape(init_state, config, len(VOCABULARY), 0))
    return eqx.tree_at(lambda s: s.step, state, jnp.array(step, jnp.int32))


def make_run(run_dir: Path, config: Config) -> TrainState:
    """A run directory with a best checkpoint; the state in it."""
    state = random_state(config)
    (run_dir / "checkpoints").mkdir(parents=True)
    numbers = (7, 1.5, 0.5, 7, {"jax": "0"}, {"metrics.jsonl": 5})
    header = checkpoint.Header(config, VOCABULARY, "0f" * 32, *numbers)
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
        source = (header.config, header.vocabulary, header.corpus_sha256)
        assert source == (config, VOCABULARY, "0f" * 32)
        progress = (header.step, header.seconds, header.best_val_loss, header.record_sizes)
        assert progress == (0, 0.0, None, {})
    assert read_config(again / "config.yaml") == config


def test_export_and_import_restore_every_weight_bit_for_bit(
    mha_type: AttentionType, tmp_path: Path
) -> None:
    assert_round_trip(tmp_path, *TINY, f"model.mha_type={mha_type.name}")


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.tie_embeddings=true",),
        ("model.rope=false", "model.learned_positions=true", "model.ngram=3"),
        ("model.qk_norm=true", "model.mha_type=gqa"),
        ("model.activation=swiglu", "model.num_layers=1"),
        ("model.norm=layernorm", "model.norm_position=post", "model.dropout=0.1"),
        ("model.mha_type=mla", "model.mla.q_lora_rank=4"),
    ],
    ids=" ".join,
)
def test_models_with_other_options_are_restored_too(
    overrides: tuple[str, ...], tmp_path: Path
) -> None:
    assert_round_trip(tmp_path, *TINY, *overrides)


def names_of(file: Path) -> set[str]:
    """The names of a file's tensors, those of a layer without its number: all have the same."""
    names = set(load_file(file))
    inside = {name for name in names if ".layers." in name}
    first, second = (
        {name.removeprefix(layer) for name in inside if name.startswith(layer)}
        for layer in ("model.layers.0.", "model.layers.1.")
    )
    assert first == second and len(first) + len(second) == len(inside)
    return (names - inside) | first


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
    latent = "q_a_proj q_a_layernorm q_b_proj kv_a_proj_with_mqa kv_a_layernorm kv_b_proj o_proj"
    attention = {f"self_attn.{name}.weight" for name in latent.split()}
    assert names_of(file) == OUTSIDE | NORMS | FEED_FORWARD | attention


def test_each_layer_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    file, state = export(tmp_path, *LLAMA)
    tensors = load_file(file)
    for i in range(2):
        gate = np.asarray(state.model.blocks.feed_forward.gate_proj.weight)[i]
        assert tensors[f"model.layers.{i}.mlp.gate_proj.weight"].tobytes() == gate.tobytes()


def refusal(command: list[str], capsys: pytest.CaptureFixture[str], run_dir: Path) -> str:
    """The one line with which a command is refused; it has created nothing."""
    capsys.readouterr()
    assert run_tool(command) == BAD_INPUT
    assert not run_dir.exists()
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.removesuffix("\n").isprintable(), err
    return err.removeprefix("error: ").rstrip("\n")


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
    """Write the file again with other metadata; None removes an entry."""
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata() | changes
    given = {name: value for name, value in metadata.items() if value is not None}
    save_file(load_file(file), file, given)


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
    command = ["import", f"file={file}", f"run={tmp_path / 'new'}"]
    message = refusal(command, capsys, tmp_path / "new")
    assert re.search("too few for|makes no model|asks for|no place for", message)


def test_our_own_files_take_no_configuration_from_outside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, _ = export(tmp_path, *TINY)
    command = ["import", f"file={file}", f"run={tmp_path / 'new'}"]
    options = ["config=config.json", "dataset.name=shakespeare", "dataset.filepath=x"]
    for option in [*options, "dataset.seq_len=4"]:
        message = refusal([*command, option], capsys, tmp_path / "new")
        assert message.startswith(f"{option.split('=')[0]}: ") and "leave" in message


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, _ = export(tmp_path, *TINY)
    before, run_dir, new = file.read_bytes(), f"run={tmp_path / 'run'}", tmp_path / "new"
    assert "exists already" in refusal(["export", run_dir, f"file={file}"], capsys, new)
    assert file.read_bytes() == before
    assert run_tool(["import", f"file={file}", run_dir]) == BAD_INPUT
    assert {path.name for path in (tmp_path / "run").rglob("*")} == {"best.eqx", "checkpoints"}


def test_an_export_that_cannot_be_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(tmp_path, *TINY)
    run_dir, new = f"run={tmp_path / 'run'}", tmp_path / "new"
    missing = f"file={tmp_path / 'nowhere' / 'x.safetensors'}"
    assert "cannot be written" in refusal(["export", run_dir, missing], capsys, new)
    assert "run=" in refusal(["export", f"run={tmp_path / 'gone'}", missing], capsys, new)
    assert "file: is missing" in refusal(["export", run_dir], capsys, new)
