"""What heads read: the weights that make the output, and `chargpt inspect`, which shows them."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import filled, layer_of
from fake_runs import make_checkpoint
from pages import images, type_sizes

from chargpt import cli
from chargpt.attention import (
    AbstractAttention,
    EquinoxAttention,
    GroupedQueryAttention,
    MultiHeadLatentAttention,
    SelectiveAttention,
)
from chargpt.attention.base import merge_heads, project_heads
from chargpt.config import AttentionType
from chargpt.study.inspect import Reading, draw_maps

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


def test_the_weights_of_every_head_add_up_to_one_over_the_past(read: Read) -> None:
    _, _, weights, _ = read
    assert weights.ndim == 3 and weights.shape[1:] == (LENGTH, LENGTH)
    assert not np.triu(weights, 1).any() and (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_the_weights_are_those_that_make_the_output(read: Read) -> None:
    layer, x, weights, output = read
    np.testing.assert_allclose(output_of(layer, x, weights), output, rtol=1e-4, atol=1e-5)
    assert len(weights) == 4 and (np.tril(weights) > 0).sum() == 4 * LENGTH * (LENGTH + 1) // 2


def output_of(layer: AbstractAttention, x: jax.Array, weights: jax.Array) -> jax.Array:
    """The layer's output, made from given attention weights."""

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


# ---- the tool


def test_entropies_are_those_of_the_weights_with_zeros_among_them() -> None:
    p = np.tril(np.random.default_rng(0).uniform(size=(2, 3, 5, 5)))
    p /= p.sum(-1, keepdims=True)
    logarithms = np.log(p, where=p > 0, out=np.zeros_like(p))
    expected = -(p * logarithms).sum(-1).mean(-1)
    np.testing.assert_allclose(Reading("a", p).entropies, expected, rtol=1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of every type that has a checkpoint, its weights random."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in AttentionType:
        overrides = [f"model.mha_type={kind.name}", "model.num_layers=1"]
        make_checkpoint(folder / kind.name, *overrides, alphabet="abcdefghi \n")
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
    overview = ["attention maps of every run, layer and head"] if shown else []
    assert images(page) == overview + [f"attention maps of {name}" for name in shown]
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
    monkeypatch.setattr(GroupedQueryAttention, "attention_weights", lambda *_: None)
    of_class = [isinstance(layer_of(kind), GroupedQueryAttention) for kind in AttentionType]
    return {kind.name for kind, is_one in zip(AttentionType, of_class, strict=True) if is_one}


UNSEEN = "abcd"  # of a length for which no other test compiles a model: JAX would reuse a trace


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
    assert "<svg" in page


def test_if_no_run_has_weights_the_page_says_so_and_has_no_picture(
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
    labels = [label.get_text() for label in figure.axes[3].get_yticklabels()]
    assert labels == ["a", "$", "b", "⏎", "{"]


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
