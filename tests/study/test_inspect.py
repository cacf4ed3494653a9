"""What heads read: the weights that make the output, and `chargpt inspect`, which shows them."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import filled, layer_of, small_config
from pages import type_sizes

from chargpt import cli
from chargpt.attention import (
    AbstractAttention,
    EquinoxAttention,
    GroupedQueryAttention,
    MultiHeadLatentAttention,
    SelectiveAttention,
)
from chargpt.attention.base import merge_heads, project_heads
from chargpt.checkpoint import Header, save
from chargpt.config import AttentionType
from chargpt.model import GPT
from chargpt.run.directory import write_config
from chargpt.run.evaluate import attention_entropy
from chargpt.study.inspect import Reading, draw_maps
from chargpt.train import gradient_norms, init_state

LENGTH = 7


Read = tuple[AbstractAttention, jax.Array, jax.Array, jax.Array]


@pytest.fixture(params=[True, False], ids=["rope", "no_rope"])
def read(request: pytest.FixtureRequest, mha_type: AttentionType) -> Read:
    """(layer, input, weights, output) of every type that has weights, with and without RoPE."""
    declared = layer_of(mha_type)
    if not request.param and "rope" not in declared.accepts:
        pytest.skip("RoPE cannot be turned off in it")
    layer = filled(layer_of(mha_type, f"model.rope={request.param}"), 0.3)
    numbers = np.random.default_rng(0).normal(size=(LENGTH, layer.d_model))
    x = jnp.asarray(numbers, jnp.float32)
    weights, output = eqx.filter_jit(lambda x: (layer.attention_weights(x), layer(x)))(x)
    if weights is None:
        pytest.skip("its attention has no weights")
    return layer, x, weights, output


def test_the_weights_of_every_head_share_out_the_past(read: Read) -> None:
    _, _, weights, _ = read
    assert weights.ndim == 3 and weights.shape[1:] == (LENGTH, LENGTH)
    assert not np.triu(weights, 1).any() and (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_the_weights_are_those_that_make_the_output(read: Read) -> None:
    layer, x, weights, output = read
    assert len(weights) == 4 and (np.tril(weights) > 0).sum() == 4 * LENGTH * (LENGTH + 1) // 2
    np.testing.assert_allclose(output_of(layer, x, weights), output, rtol=1e-4, atol=1e-5)


def output_of(layer: AbstractAttention, x: jax.Array, weights: jax.Array) -> jax.Array:
    """The layer's output, made from attention weights that are given."""

    def merged(values: jax.Array, o_proj: eqx.nn.Linear, skip: jax.Array | float = 0) -> jax.Array:
        return merge_heads(skip + jnp.einsum("nts,snv->tnv", weights, values), o_proj.weight)

    match layer:
        case GroupedQueryAttention():
            values = project_heads(x, layer.v_proj.weight, layer.num_kv_heads)
            group = layer.num_heads // layer.num_kv_heads
            return merged(jnp.repeat(values, group, axis=1), layer.o_proj)
        case SelectiveAttention():
            (_, _, skip), (_, values) = layer.project(x, jnp.arange(LENGTH))
            return merged(values, layer.o_proj, skip)
        case MultiHeadLatentAttention():
            _, (latents, _) = layer.project(x, jnp.arange(LENGTH))
            expanded = project_heads(latents, layer.kv_b_proj.weight, layer.num_heads)
            return merged(expanded[..., layer.qk_nope_head_dim :], layer.o_proj)
        case EquinoxAttention():
            values = project_heads(x, layer.mha.value_proj.weight, layer.mha.num_heads)
            return merged(values, layer.mha.output_proj)
    pytest.skip("there is no second formula of its output here")


def model_of(mha_type: AttentionType, *overrides: str) -> GPT:
    config = small_config(f"model.mha_type={mha_type.name}", *overrides)
    return filled(eqx.filter_eval_shape(init_state, config, 11, 0).model, 0.2)


def test_a_model_gives_the_weights_of_every_layer_and_its_entropies(
    mha_type: AttentionType,
) -> None:
    model, text = model_of(mha_type), jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    weights = eqx.filter_jit(lambda text: jax.vmap(model.attention_weights)(text))(text)
    found = eqx.filter_jit(attention_entropy)(model, text)
    first = model.layers()[0]
    x = jax.vmap(first.attention_norm)(model._embed(text[1], jnp.arange(5)))
    expected = eqx.filter_jit(first.attention.attention_weights)(x)
    if expected is None:
        assert weights is None and found is None
        return
    assert weights.shape[:2] == (2, 2) and weights.shape[3:] == (5, 5)
    np.testing.assert_allclose(weights[1, 0], expected, rtol=1e-5, atol=1e-6)
    p = np.asarray(weights, np.float64)
    entropies = -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), axis=-1)
    np.testing.assert_allclose(found, entropies.mean(axis=(0, 3)), rtol=1e-4)
    np.testing.assert_allclose(Reading("a", p[0]).entropies, entropies[0].mean(-1), rtol=1e-6)


def test_heads_that_read_evenly_have_the_entropy_of_their_number_of_tokens() -> None:
    model = jax.tree.map(
        lambda leaf: 0 * leaf if eqx.is_array(leaf) else leaf, model_of(AttentionType.standard)
    )
    expected = np.mean(np.log(np.arange(1, 7)))
    np.testing.assert_allclose(
        attention_entropy(model, jnp.zeros((1, 6), int)), np.full((2, 4), expected), rtol=1e-5
    )


@pytest.mark.parametrize(
    "overrides",
    [[], ["model.tie_embeddings=true", "model.learned_positions=true", "model.norm_position=post"]],
)
def test_the_parts_of_the_gradient_are_all_of_it(
    mha_type: AttentionType, overrides: list[str]
) -> None:
    grads = eqx.filter(model_of(mha_type, *overrides), eqx.is_inexact_array)
    norms = gradient_norms(grads)
    layers = [f"{part}_{layer}" for part in ("attention", "feed_forward") for layer in (0, 1)]
    assert list(norms) == ["embedding", *layers] + ([] if overrides else ["head"])
    total = np.sqrt(sum(float(norm) ** 2 for norm in norms.values()))
    np.testing.assert_allclose(total, optax.tree.norm(grads), rtol=1e-5)
    second = jax.tree.leaves(
        jax.tree.map(lambda leaf: leaf[1], (grads.blocks.attention, grads.blocks.attention_norm))
    )
    np.testing.assert_allclose(
        norms["attention_1"], np.sqrt(sum(np.square(leaf).sum() for leaf in second)), rtol=1e-5
    )


# --- the tool


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of every type that has a checkpoint, its weights random."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in AttentionType:
        config = small_config(f"model.mha_type={kind.name}", "model.num_layers=1")
        state = filled(eqx.filter_eval_shape(init_state, config, 11, 0), 0.2)
        state = eqx.tree_at(lambda state: state.step, state, jnp.asarray(3, jnp.int32))
        run = folder / kind.name
        (run / "checkpoints").mkdir(parents=True)
        write_config(run, config)
        (run / "metrics.jsonl").write_text("")
        header = Header(config, "abcdefghi \n", "0" * 64, 3, 1.0, 2.0, 3, {}, {})
        save(run / "checkpoints" / "best.eqx", state, header)
    return folder


def inspect(
    capsys: pytest.CaptureFixture[str], folder: Path, prompt: str
) -> tuple[list[str], list[str], str]:
    """(names of the runs with entropies, names of those without weights, the page).

    The PNGs must be there for the runs with entropies, and only for them.
    """
    assert cli.run_tool(["inspect", f"run={folder}", f"prompt={prompt}", "out=deep/maps"]) == 0
    lines = capsys.readouterr().out.splitlines()
    entropies = [float(v) for line in lines if "  layer" in line for v in line.split()[2:]]
    shown = [line.split(":")[0] for line in lines if "entropy of each head in nats" in line]
    assert len(entropies) >= len(shown) and all(0 < v <= np.log(len(prompt)) for v in entropies)
    pictures = ["deep/maps.png"] if shown else []
    pictures += [f"deep/maps-{number}-{name}.png" for number, name in enumerate(shown)]
    printed = [line for line in lines if line.startswith("deep/")]
    assert printed == ["deep/maps.html", *pictures]
    assert sorted(printed) == sorted(map(str, Path("deep").iterdir()))
    assert all(Path(file).read_bytes().startswith(b"\x89PNG") for file in pictures)
    missing = ": none (its attention has no weights)"
    without = [line.removesuffix(missing) for line in lines if line.endswith(missing)]
    page = Path("deep/maps.html").read_text()
    assert all(f"<p>{name}{missing}</p>" in page for name in without)
    assert [name for name in shown if f"attention maps of {name}" in page] == shown
    return shown, without, page


def test_inspect_shows_every_type_side_by_side(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shown, without, page = inspect(capsys, trained, "a bad cafe")
    assert sorted(shown + without) == sorted(kind.name for kind in AttentionType)
    assert {"standard", "mla"} <= set(shown)
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert len(type_sizes(page)) == 1


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The types of one class, which now has no attention weights."""
    monkeypatch.setattr(GroupedQueryAttention, "attention_weights", lambda self, x: None)
    of_class = [isinstance(layer_of(kind), GroupedQueryAttention) for kind in AttentionType]
    return {kind.name for kind, is_one in zip(AttentionType, of_class, strict=True) if is_one}


UNSEEN = "abcd"  # of a length that no other test compiles a model for: a trace would be found again


def test_a_run_whose_attention_has_no_weights_is_named_beside_the_others(
    no_weights: set[str],
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shown, without, page = inspect(capsys, trained, UNSEEN)
    assert no_weights <= set(without) and "mla" in shown
    assert sorted(shown + without) == sorted(kind.name for kind in AttentionType)
    assert "<svg" in page and not any(f"attention maps of {name}" in page for name in without)


def test_where_no_run_has_weights_the_page_says_so_and_there_is_no_picture(
    no_weights: set[str],
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shown, without, page = inspect(capsys, trained / "standard", UNSEEN)
    assert (shown, without) == ([], ["standard"]) and "standard" in no_weights
    assert "<svg" not in page and "<img" not in page


def test_every_head_has_its_map() -> None:
    weights = np.tril(np.ones((2, 3, 5, 5))) / np.arange(1, 6)[:, None]
    figure = draw_maps(Reading("mqa", weights), "a$b\n{")
    assert [len(axis.images) for axis in figure.axes] == [1] * 6
    np.testing.assert_allclose(figure.axes[5].images[0].get_array(), np.sqrt(weights[1, 2]))
    assert [label.get_text() for label in figure.axes[3].get_yticklabels()] == [
        "a",
        "$",
        "b",
        "⏎",
        "{",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("prompt=", "is empty"),
        ("prompt=X", "not in the vocabulary: 'X'"),
        ("prompt=aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "has 35 characters"),
        ("checkpoint=last", "has no checkpoint checkpoints/last.eqx"),
        ("run=/nowhere", "holds no run"),
        ("out=..", "is a folder"),
    ],
)
def test_bad_input_is_one_line(
    trained: Path, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run_tool(["inspect", str(trained / "mqa"), "prompt=a", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and out == ""
