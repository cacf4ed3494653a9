"""What heads read: the recorded weights are those that made the output, and `chargpt inspect` shows them."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import filled, small_config
from omegaconf import OmegaConf
from test_attention import make, tokens

from chargpt import cli
from chargpt.attention import (
    AbstractAttention,
    EquinoxAttention,
    GroupedQueryAttention,
    MultiHeadLatentAttention,
    SelectiveAttention,
)
from chargpt.attention.base import fused_kernel, merge_heads, project_heads, record_weights, recording
from chargpt.checkpoint import Header, save
from chargpt.config import AttentionType, to_plain
from chargpt.inspection import Reading, draw_maps
from chargpt.model import GPT
from chargpt.train import attention_entropy, gradient_norms, init_state


def weights_of(layer: AbstractAttention, x: jax.Array) -> jax.Array:
    @jax.jit
    def run(x):
        with record_weights() as records:
            layer(x)
        (weights,) = records
        return weights

    return run(x)


def read(layer: AbstractAttention, x: jax.Array, weights: jax.Array) -> jax.Array:
    """The layer's output, made from attention weights that are given."""
    match layer:
        case GroupedQueryAttention():
            values = jnp.repeat(project_heads(x, layer.v_proj.weight, layer.num_kv_heads), 4 // layer.num_kv_heads, axis=1)
            return merge_heads(jnp.einsum("nts,snh->tnh", weights, values), layer.o_proj.weight)
        case SelectiveAttention():
            (_, _, skip), (_, values) = layer.project(x, jnp.arange(len(x)))
            return merge_heads(skip + jnp.einsum("nts,snh->tnh", weights, values), layer.o_proj.weight)
        case MultiHeadLatentAttention():
            _, (latents, _) = layer.project(x, jnp.arange(len(x)))
            expanded = project_heads(latents, layer.kv_b_proj.weight, layer.num_heads)
            values = expanded[..., layer.qk_nope_head_dim :]
            return merge_heads(jnp.einsum("nts,snh->tnh", weights, values), layer.o_proj.weight)
        case EquinoxAttention():
            values = project_heads(x, layer.mha.value_proj.weight, layer.mha.num_heads)
            return merge_heads(jnp.einsum("nts,snh->tnh", weights, values), layer.mha.output_proj.weight)
    raise AssertionError(layer)


@pytest.mark.parametrize("rope", [True, False], ids=["rope", "no_rope"])
def test_the_recorded_weights_are_those_that_made_the_output(mha_type: AttentionType, rope: bool) -> None:
    layer, x = make(mha_type, rope), tokens()
    weights = weights_of(layer, x)
    assert weights.shape == (4, len(x), len(x))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert not np.triu(weights, 1).any() and (np.tril(weights) > 0).sum() == 4 * len(x) * (len(x) + 1) // 2
    np.testing.assert_allclose(read(layer, x, weights), layer(x), rtol=1e-4, atol=1e-5)


def test_recording_ends_with_its_block_and_keeps_fused_kernels_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert fused_kernel(jnp.bfloat16, 32) and not recording()
    with pytest.raises(ZeroDivisionError), record_weights() as outer:
        with record_weights() as inner:
            make(AttentionType.standard)(tokens())
        assert len(inner) == 1 and outer == [] and recording()
        assert not fused_kernel(jnp.bfloat16, 32)
        _ = 1 // 0
    assert not recording()


def model_of(mha_type: AttentionType, *overrides: str) -> GPT:
    config = small_config(f"model.mha_type={mha_type.name}", *overrides)
    return filled(eqx.filter_eval_shape(init_state, config, 11, 0).model, 0.2)


def test_a_model_gives_the_weights_of_every_layer_and_its_entropies(mha_type: AttentionType) -> None:
    model, text = model_of(mha_type), jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    weights = eqx.filter_jit(lambda text: jax.vmap(model.attention_weights)(text))(text)
    assert weights.shape == (2, 2, 4, 5, 5)
    x = jax.vmap(model.layers()[0].attention_norm)(model._embed(text[1], jnp.arange(5)))
    np.testing.assert_allclose(weights[1, 0], weights_of(model.layers()[0].attention, x), rtol=1e-5, atol=1e-6)
    p = np.asarray(weights, np.float64)
    expected = -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), axis=-1)
    found = eqx.filter_jit(attention_entropy)(model, text)
    np.testing.assert_allclose(found, expected.mean(axis=(0, 3)), rtol=1e-4)
    np.testing.assert_allclose(Reading("a", Path(), p[0]).entropies, expected[0].mean(-1), rtol=1e-6)


def test_heads_that_read_evenly_have_the_entropy_of_their_number_of_tokens() -> None:
    model = jax.tree.map(lambda leaf: 0 * leaf if eqx.is_array(leaf) else leaf, model_of(AttentionType.standard))
    expected = np.mean(np.log(np.arange(1, 7)))
    np.testing.assert_allclose(attention_entropy(model, jnp.zeros((1, 6), int)), np.full((2, 4), expected), rtol=1e-5)


@pytest.mark.parametrize(
    "overrides", [[], ["model.tie_embeddings=true", "model.learned_positions=true", "model.norm_position=post"]]
)
def test_the_parts_of_the_gradient_are_all_of_it(mha_type: AttentionType, overrides: list[str]) -> None:
    grads = eqx.filter(model_of(mha_type, *overrides), eqx.is_inexact_array)
    norms = gradient_norms(grads)
    layers = [f"{part}_{layer}" for part in ("attention", "feed_forward") for layer in (0, 1)]
    assert list(norms) == ["embedding", *layers] + ([] if overrides else ["head"])
    total = np.sqrt(sum(float(norm) ** 2 for norm in norms.values()))
    np.testing.assert_allclose(total, optax.tree.norm(grads), rtol=1e-5)
    second = jax.tree.leaves(jax.tree.map(lambda leaf: leaf[1], (grads.blocks.attention, grads.blocks.attention_norm)))
    np.testing.assert_allclose(norms["attention_1"], np.sqrt(sum(np.square(leaf).sum() for leaf in second)), rtol=1e-5)


# --- the tool


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six runs that have a checkpoint, their weights random."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in AttentionType:
        config = small_config(f"model.mha_type={kind.name}", "model.num_layers=1")
        state = filled(eqx.filter_eval_shape(init_state, config, 11, 0), 0.2)
        state = eqx.tree_at(lambda state: state.step, state, jnp.asarray(3, jnp.int32))
        run = folder / kind.name
        (run / "checkpoints").mkdir(parents=True)
        (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(to_plain(config))))
        (run / "metrics.jsonl").write_text("")
        header = Header(config, "abcdefghi \n", "0" * 64, 3, 1.0, 2.0, 3, {}, {})
        save(run / "checkpoints" / "best.eqx", state, header)
    return folder


def test_inspect_shows_every_type_side_by_side(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run_tool(["inspect", f"run={trained}", "prompt=a bad cafe", "out=deep/maps"]) == 0
    out = capsys.readouterr().out
    names = sorted(kind.name for kind in AttentionType)
    assert [line.split(":")[0] for line in out.splitlines() if "entropy" in line] == names
    assert all(0 < float(value) <= np.log(10) for line in out.splitlines() if "layer" in line for value in line.split()[2:])
    files = [line for line in out.splitlines() if line.startswith("deep/")]
    assert [Path(file).suffix for file in files] == [".png", ".html"] + 6 * [".png"]
    assert all(Path(file).read_bytes().startswith(b"\x89PNG") for file in files if file.endswith(".png"))
    page = Path("deep/maps.html").read_text()
    assert all(f"attention maps of {name}" in page for name in names) and "http://" not in page.replace("http://www.w3.org", "")


def test_every_head_has_its_map() -> None:
    weights = np.tril(np.ones((2, 3, 5, 5))) / np.arange(1, 6)[:, None]
    figure = draw_maps(Reading("mqa", Path(), weights), "a$b\n{")
    assert [len(axis.images) for axis in figure.axes] == [1] * 6
    np.testing.assert_allclose(figure.axes[5].images[0].get_array(), np.sqrt(weights[1, 2]))
    assert [label.get_text() for label in figure.axes[3].get_yticklabels()] == ["a", "$", "b", "⏎", "{"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("prompt=", "is empty"),
        ("prompt=X", "not in the vocabulary: 'X'"),
        ("prompt=aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "has 35 characters"),
        ("checkpoint=last", "has no checkpoint checkpoints/last.eqx"),
        ("run=/nowhere", "holds no run"),
    ],
)
def test_bad_input_is_one_line(trained: Path, arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_tool(["inspect", str(trained / "mqa"), "prompt=a", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and out == ""
