"""Beginning from another model, and converting one: numbers, characters, what is refused."""

import dataclasses
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import filled, small_config
from safetensors.numpy import save_file

from chargpt import checkpoint, weights
from chargpt.checkpoint import describe_leaves
from chargpt.cli import run_tool
from chargpt.config import AttentionType, Config, settings_of
from chargpt.errors import ConfigError
from chargpt.model import GPT
from chargpt.origin import load_text, shapes_of
from chargpt.run import start
from chargpt.run.program import Program
from chargpt.run.resume import restore

TEXT = 40 * "to be, or not to be: that is the question.\n"
PART = 40 * "to be or not to be\n"  # fewer characters
FEW = ["trainer.num_steps=2", "trainer.sample_chars=0", "mode=disabled"]


@dataclasses.dataclass
class Folder:
    """A folder with a text, and models on its characters."""

    path: Path

    def config(self, *overrides: str, text: str = TEXT) -> Config:
        file = self.path / f"{len(set(text))}.txt"
        file.write_text(text)
        return small_config("dataset.name=file", f"dataset.filepath={file}", *FEW, *overrides)

    def run(self, name: str, *overrides: str) -> tuple[str, GPT]:
        """A run directory at step 0, and its model."""
        config, vocabulary = self.config(*overrides), "".join(sorted(set(TEXT)))
        model = filled(shapes_of(config, len(vocabulary)), 0.2)
        header = weights.at_step_0(config, vocabulary, load_text(config).sha256)
        weights.write_run(self.path / name, header, model)
        return str(self.path / name), model


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def arrays(tree: object) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]


def assert_same(one: object, two: object) -> None:
    for a, b in zip(arrays(one), arrays(two), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_begins_with_the_weights_of_another_and_everything_else_new(
    mha_type: AttentionType, folder: Folder
) -> None:
    kind = f"model.mha_type={mha_type.name}"
    path, model = folder.run("old", kind)
    options = ("model.window=4", "model.dropout=0.1", "optimizer.ema_decay=0.9", "seed=3")
    config = folder.config(kind, f"init_from={path}", *options)
    state = Program(config, load_text(config)).initial_state(config.seed)
    assert_same(state.model, model)
    assert_same(state.ema, model)
    assert int(state.step) == 0 and not any(leaf.any() for leaf in arrays(state.opt_state))
    assert state.model.windows == (4, 4) and state.model.dropout == 0.1


def test_a_population_and_an_exported_file_begin_there_too(folder: Folder) -> None:
    path, model = folder.run("old")
    file = str(folder.path / "old.safetensors")
    assert run_tool(["export", f"run={path}", f"file={file}"]) == 0
    for source in (path, file):
        config = folder.config(f"init_from={source}")
        program = Program(config, load_text(config), 2)
        states = program.put(None, 0, program.initial_state(0))
        for lane in range(2):
            assert_same(program.take(states, lane).model, model)


def test_the_characters_are_those_of_the_first_model_from_the_start_to_a_resumed_end(
    folder: Folder,
) -> None:
    """Even if that model is gone by then."""
    path, _ = folder.run("old")
    new = folder.path / "new"
    config = folder.config(f"init_from={path}", text=PART)
    assert load_text(config).tokenizer.vocabulary == "".join(sorted(set(TEXT)))
    new.mkdir()
    start.train(config, new)
    (folder.path / "old").rename(folder.path / "gone")
    start.resume(new, ["trainer.num_steps=4"])
    _, restored = restore(new, [], print)
    assert restored is not None and restored[1].step == 4
    assert restored[1].vocabulary == "".join(sorted(set(TEXT)))
    assert run_tool(["evaluate", f"run={new}"]) == 0


def test_what_a_run_cannot_begin_from_is_refused_by_name(folder: Folder) -> None:
    path, _ = folder.run("old", "model.mha_type=gqa", "model.d_model=8")
    fitting = (f"init_from={path}", "model.mha_type=gqa", "model.d_model=8")
    refusals = [
        (
            folder.config(f"init_from={path}"),
            r"^init_from=\S+old: its model has another shape \(at \S+\); it was trained with "
            "model.mha_type=gqa model.d_model=8: write those that matter for it$",
        ),
        (
            folder.config(*fitting, "model.num_heads=2", "model.num_kv_heads=1"),
            "its model has another shape",
        ),
        (
            folder.config("init_from=/nowhere"),
            "^init_from=/nowhere: is neither a run directory nor a safetensors file",
        ),
        (
            folder.config(*fitting, text=TEXT + "é"),
            "^dataset.filepath=.*: has characters not in the vocabulary: 'é'",
        ),
    ]
    foreign = folder.path / "llama.safetensors"
    save_file({"x": np.zeros(1, np.float32)}, foreign)
    config = folder.config(f"init_from={foreign}")
    refusals.append((config, "not written by chargpt export; write chargpt import"))
    for config, message in refusals:
        with pytest.raises(ConfigError, match=message):
            load_text(config)


# --- conversion


def convert(folder: Folder, path: str, *arguments: str) -> tuple[GPT, Config]:
    out = folder.path / f"converted-{len(list(folder.path.iterdir()))}"
    assert run_tool(["convert", f"run={path}", f"out={out}", *arguments]) == 0
    state, header = checkpoint.load(out / "checkpoints" / "best.eqx")
    return state.model, header.config


def heads_of(model: GPT, name: str) -> np.ndarray:
    """[layer, head, width, d_model]."""
    weight = np.asarray(getattr(model.stacked.attention, name).weight)
    return weight.reshape(2, -1, 4, 16)


@pytest.mark.parametrize("fewer", [1, 2])
def test_heads_of_a_group_are_pooled_and_all_else_stays(fewer: int, folder: Folder) -> None:
    path, model = folder.run("old", "model.qk_norm=true")
    kind = ["model.mha_type=gqa", f"model.num_kv_heads={fewer}"]
    for pool in ("mean", "first", "random"):
        converted, _ = convert(folder, path, *kind, f"pool={pool}")
        for name in ("k_proj", "v_proj"):
            groups = heads_of(model, name).reshape(2, fewer, 4 // fewer, 4, 16)
            found = heads_of(converted, name)
            assert found.shape == (2, fewer, 4, 16)
            if pool == "random":
                assert found.std() == pytest.approx(groups.std(), rel=0.2)
                assert np.abs(found[0] - found[1]).max() > 0.1
            else:
                expected = groups.mean(2) if pool == "mean" else groups[:, :, 0]
                np.testing.assert_allclose(found, expected, atol=1e-7)
        same = lambda m: [m.stacked.attention.k_proj, m.stacked.attention.v_proj]  # noqa: E731
        none = [None, None]
        assert_same(eqx.tree_at(same, converted, none), eqx.tree_at(same, model, none))


def test_as_many_heads_are_the_same_model_and_equal_heads_lose_nothing(folder: Folder) -> None:
    path, model = folder.run("old")
    converted, _ = convert(folder, path, "model.mha_type=gqa", "model.num_kv_heads=4")
    assert_same(converted, model)

    def repeated(weight: jax.Array) -> jax.Array:
        first = weight.reshape(2, 4, 4, 16)[:, ::2]
        return jnp.repeat(first, 2, axis=1).reshape(weight.shape)

    pairs = lambda m: [m.stacked.attention.k_proj.weight, m.stacked.attention.v_proj.weight]  # noqa: E731
    equal = eqx.tree_at(pairs, model, replace_fn=repeated)
    _, state, header = checkpoint.open_run(path, checkpoint.Which.best)
    weights.write_run(folder.path / "equal", header, equal)
    for pool in ("mean", "first"):
        kind = ["model.mha_type=gqa", "model.num_kv_heads=2", f"pool={pool}"]
        converted, config = convert(folder, str(folder.path / "equal"), *kind)
        tokens = jnp.arange(12)
        np.testing.assert_allclose(converted(tokens), equal(tokens), atol=1e-5)
    assert config.model.mha_type is AttentionType.gqa
    assert describe_leaves(state.model) != describe_leaves(converted)


MLA = ["model.mha_type=mla", "model.mla.latent_norm=false", "model.mla.v_head_dim=4"]


@pytest.mark.parametrize(
    ("source", "heads", "rank"),
    [
        ("gqa model.positions=alibi", "qk_nope_head_dim=4 qk_rope_head_dim=2", 16),
        ("gqa model.positions=none model.sink=learned", "qk_nope_head_dim=4", 20),
        ("mqa", "qk_rope_head_dim=4 qk_nope_head_dim=3", 4),
    ],
)
def test_grouped_heads_are_latent_ones_exactly_if_the_rank_allows(
    source: str, heads: str, rank: int, folder: Folder, capsys: pytest.CaptureFixture
) -> None:
    path, model = folder.run("old", *f"model.mha_type={source}".split())
    kind = [*MLA, *(f"model.mla.{head}" for head in heads.split())]
    tokens = jnp.arange(12)
    converted, _ = convert(folder, path, *kind, f"model.mla.kv_lora_rank={rank}")
    assert "by layer: 0.00%, 0.00%" in capsys.readouterr().err
    np.testing.assert_allclose(converted(tokens), model(tokens), atol=2e-5)
    smaller, _ = convert(folder, path, *kind, f"model.mla.kv_lora_rank={rank // 2}")
    lost = re.search(r"by layer: ([\d.]+)%", capsys.readouterr().err)
    assert lost is not None and 5 < float(lost[1]) < 80
    assert np.abs(smaller(tokens) - model(tokens)).max() > 1e-2


MISFITS = {
    "model.mla.latent_norm=true": "model.mla.latent_norm=true: is not linear; write",
    "model.mla.v_head_dim=8": "model.mla.v_head_dim=8: that run needs 4; write that",
    "model.mla.qk_nope_head_dim=8": "model.mla.qk_nope_head_dim=8: that run needs 4; write that",
    "model.mla.q_lora_rank=4": "model.mla.q_lora_rank: queries stay as they are; write null",
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_sizes_that_cannot_be_those_of_the_run_are_named(
    misfit: str, folder: Folder, capsys: pytest.CaptureFixture
) -> None:
    path, _ = folder.run("old", "model.mha_type=gqa", "model.positions=none")
    fitting = [option for option in MLA if option.split("=")[0] != misfit.split("=")[0]]
    out = folder.path / "new"
    assert run_tool(["convert", f"run={path}", f"out={out}", *fitting, misfit]) == 2
    assert MISFITS[misfit] in capsys.readouterr().err and not out.exists()


def test_every_weight_of_a_latent_layer_made_so_can_learn(folder: Folder) -> None:
    """Also where the function would not change if there were zeros on both sides."""
    path, _ = folder.run("old", "model.mha_type=mqa")
    sizes = ["qk_rope_head_dim=4", "qk_nope_head_dim=3", "kv_lora_rank=6"]
    model, _ = convert(folder, path, *MLA, *(f"model.mla.{size}" for size in sizes))
    tokens = jnp.arange(12)
    grads = eqx.filter_jit(eqx.filter_grad(lambda m: m(tokens)[:, 0].sum()))(model)
    for name in ("q_proj", "kv_b_proj"):
        weight = getattr(model.stacked.attention, name).weight
        grad = getattr(grads.stacked.attention, name).weight
        moves = (np.abs(weight) > 0) | (np.abs(grad) > 0)
        assert moves.all(), name


def test_a_converted_run_keeps_the_characters_of_the_first_model(
    folder: Folder, capsys: pytest.CaptureFixture
) -> None:
    path, _ = folder.run("old")
    config = folder.config(f"init_from={path}", text=PART)
    (folder.path / "new").mkdir()
    start.train(config, folder.path / "new")
    out = folder.path / "converted"
    arguments = [f"run={folder.path / 'new'}", f"out={out}", "model.mha_type=gqa"]
    assert run_tool(["convert", *arguments, "model.num_kv_heads=4"]) == 0
    losses = []
    for run in ("new", "converted"):
        capsys.readouterr()
        assert run_tool(["evaluate", f"run={folder.path / run}"]) == 0
        losses.append(capsys.readouterr().out)
    assert losses[0] == losses[1]


def test_a_matched_feed_forward_layer_keeps_its_width(folder: Folder) -> None:
    path, model = folder.run("old", "model.mha_type=gqa", "model.match=params")
    width = model.stacked.feed_forward.up_proj.out_features
    converted, config = convert(folder, path, "model.mha_type=mqa")
    assert width != 64 == 4 * config.model.d_model
    assert converted.stacked.feed_forward.up_proj.out_features == width
    settings = settings_of(config)
    assert (settings["model.match"], settings["model.d_ff"]) == ("none", width)


REFUSED = {
    "model.mha_type=selective": "there is no conversion from gqa; write gqa, mqa or mla",
    "model.mha_type=mla": "the 2 key heads of that run turn by RoPE, and MLA has one",
    "model.mha_type=standard": "key/value heads=4: does not divide those of that run=2",
    "model.mha_type=mqa model.d_model=32": "model.d_model: a conversion changes model.mha_type, ",
    "model.qk_norm=true": "model.qk_norm: a conversion changes model.mha_type, model.num_kv_heads",
    "trainer.num_steps=5": "trainer.num_steps: a conversion changes model.mha_type, ",
    "pol=first": "leave it out; did you mean pool?",
    "model.num_kv_heads=(2": "model.num_kv_heads=(2",
    "experiment=debug": "experiment=debug: ",
    "": "nothing to convert to; write model.mha_type=gqa",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_cannot_be_converted_is_refused_and_nothing_is_written(
    override: str, folder: Folder, capsys: pytest.CaptureFixture
) -> None:
    path, _ = folder.run("old", "model.mha_type=gqa")
    out = folder.path / "new"
    arguments = ["convert", f"run={path}", f"out={out}", *override.split()]
    assert run_tool(arguments) == 2
    assert REFUSED[override] in capsys.readouterr().err
    assert not out.exists()
