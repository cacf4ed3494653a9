"""What composes, what is refused and how; rules of attention types; names of folders."""

import dataclasses
import functools
import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import equinox as eqx
import hydra
import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT, layer_of, make_config, small_config, time_limit
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt import compose, config
from chargpt.attention import CROSSING, OPTIONAL, abstract, make_attention
from chargpt.compose import change, quoted, read_overrides, slug
from chargpt.config import (
    Activation,
    AttentionType,
    ModelConfig,
    Norm,
    NormPosition,
    Precision,
    differences,
    from_plain,
    spell,
    to_plain,
)
from chargpt.errors import ConfigError
from chargpt.model import GPT, check
from chargpt.train import cast, compute_dtype

EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml"))
TYPES = [kind.name for kind in AttentionType]


def refusal(*overrides: str) -> str:
    """The one line with which a composition is refused."""
    with pytest.raises(ConfigError) as error:
        make_config(*overrides)
    text = str(error.value)
    assert text.isprintable() and len(text) < 300
    return text


# --- what does not compose


@pytest.mark.parametrize(
    "override",
    [
        "model.mha_type=linear",
        "model.activation=tanh",
        "model.norm=batchnorm",
        "model.norm_position=mid",
        "trainer.precision=float16",
        "optimizer.name=sgd",
        "optimizer.schedule=step",
        "dataset.name=enwik8",
        "mode=on",
        "model.rope=maybe",
        "model.d_model=1.5",
        "model.d_model=nan",
        "model.d_model=wide",
        "seed=null",
        "model=3",
        "model.mla=null",
        "model.d_modl=8",
        "colour=red",
        "wandb.name=null",
        "wandb.tags=null",
        "model.dropout=[0.1]",
    ],
)
def test_values_of_another_type_and_unknown_options_are_refused_by_name(override):
    assert refusal(override).startswith(override.partition("=")[0])


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        (
            "model.mha_typ=mla",
            "model.mha_typ: there is no such option; did you mean model.mha_type? "
            "(all are in configs/default.yaml)",
        ),
        ("colour=red", "colour: there is no such option (all are in configs/default.yaml)"),
        ("model=3", "model: is a group of options; name one of them, such as model.NAME=…"),
        (
            "experiment=debgu",
            "experiment=debgu: there is no such experiment; did you mean debug?; "
            f"write one of {', '.join(EXPERIMENTS)}",
        ),
        ("model.dropout=1.0", "model.dropout=1.0: must be a finite number in [0, 1)"),
    ],
)
def test_the_message_says_what_to_write(override, answer):
    assert refusal(override) == answer


@pytest.mark.parametrize(
    ("override", "guess"),
    [("model.mha_type=selctive", "selective"), ("model.activation=swigl", "swiglu")],
)
def test_the_message_for_a_misspelt_choice_names_the_nearest(override, guess):
    text = refusal(override)
    assert text.startswith(f"{override.partition('=')[0]}: ")
    assert text.endswith(f"; did you mean {guess}?")


def test_an_unknown_mode_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert "dryrun" in refusal()
    monkeypatch.setenv("WANDB_MODE", "online")
    assert make_config().mode is config.Mode.online
    monkeypatch.delenv("WANDB_MODE")
    assert make_config().mode is config.Mode.offline


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.d_model=1000000000000000", "model.num_heads=3"),
        (
            "model.mha_type=gqa",
            "model.d_model=2000000000000000",
            "model.num_heads=1000000000000000",
            "model.num_kv_heads=3",
        ),
        ("trainer.batch_size=1000000000000000", "trainer.grad_accum_steps=3"),
    ],
)
def test_absurd_sizes_are_answered_at_once(overrides):
    with time_limit(5), pytest.raises(ConfigError, match="does not divide") as error:
        make_config(*overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "override", [r"wandb.name='\${x}'", r"wandb.tags=['\${oc.env:HOME}']", r"wandb.group='a\${'"]
)
def test_a_literal_interpolation_is_refused_because_it_could_not_be_read_back(override):
    assert refusal(override).startswith("wandb.")


# --- rules that depend on the attention type


@pytest.mark.parametrize(
    "option", ["model.qk_norm=true", "model.head_dim=6", "model.rope=false"], ids=str
)
def test_an_option_is_accepted_by_the_types_that_declare_it_and_refused_by_the_others(
    mha_type, option
):
    name = option.partition("=")[0].removeprefix("model.")
    kind = f"model.mha_type={mha_type.name}"
    if name in layer_of(mha_type).accepts:
        assert spell(getattr(make_config(kind, option).model, name)) == option.partition("=")[2]
        return
    advice = f"write model.{name}={spell(OPTIONAL[name])}"
    why = r"does not implement it( \(.+\))?"
    expected = rf"{re.escape(option)}: {mha_type.name} attention {why}; {re.escape(advice)}"
    assert re.fullmatch(expected, refusal(kind, option))


@pytest.mark.parametrize("kind", ["selective", "mla", "equinox"])
def test_qk_norm_is_refused_with_the_reason_that_the_type_declares(kind):
    text = refusal(f"model.mha_type={kind}", "model.qk_norm=true")
    expected = rf"{kind} attention does not implement it \(.+\); write model\.qk_norm=false"
    assert re.fullmatch(rf"model\.qk_norm=true: {expected}", text)


def test_types_declare_only_options_that_types_may_refuse():
    for kind in AttentionType:
        layer = layer_of(kind)
        assert layer.accepts <= set(OPTIONAL)
        assert set(layer.refuses) <= set(OPTIONAL) | set(CROSSING)
        assert not layer.accepts & set(layer.refuses)


@pytest.mark.parametrize("kind", ["standard", "gqa", "mqa", "selective", "equinox"])
def test_heads_divide_the_width_if_head_dim_follows_from_it(kind):
    advice = "does not divide model.d_model=128; write one of 1, 2, 4, 8, 16, 32, 64, 128"
    text = refusal(f"model.mha_type={kind}", "model.num_heads=3")
    assert text == f"model.num_heads=3: {advice}"


def test_heads_of_mla_and_of_a_given_head_dim_need_not_divide_the_width():
    assert make_config("model.mha_type=mla", "model.num_heads=3").model.num_heads == 3
    for kind in ("standard", "gqa", "mqa"):
        heads = ["model.head_dim=6", "model.num_heads=3", "model.num_kv_heads=3"]
        composed = make_config(f"model.mha_type={kind}", *heads).model
        layer = abstract(make_attention, composed)
        assert (layer.head_dim, layer.num_heads) == (6, 3)


@pytest.mark.parametrize("num_kv_heads", [3, 8])
def test_kv_heads_of_gqa_divide_the_heads(num_kv_heads):
    text = refusal("model.mha_type=gqa", f"model.num_kv_heads={num_kv_heads}")
    advice = "does not divide model.num_heads=4; write one of 1, 2, 4"
    assert text == f"model.num_kv_heads={num_kv_heads}: {advice}"


@pytest.mark.parametrize("kind", ["standard", "mqa", "gqa"])
@pytest.mark.parametrize("num_heads", [1, 2, 4, 6, 8])
def test_kv_heads_are_half_of_the_heads_for_gqa_all_for_standard_and_one_for_mqa(num_heads, kind):
    expected = {"standard": num_heads, "gqa": max(1, num_heads // 2), "mqa": 1}[kind]
    sizes = ["model.d_model=384", f"model.num_heads={num_heads}"]
    layer = layer_of(AttentionType[kind], *sizes)
    assert layer.num_kv_heads == expected
    given = layer_of(AttentionType[kind], *sizes, f"model.num_kv_heads={num_heads}")
    assert given.num_kv_heads == (num_heads if kind == "gqa" else expected)


@pytest.mark.parametrize("kind", ["standard", "gqa", "mqa"])
def test_an_odd_head_dim_is_refused_only_with_rope(kind):
    overrides = (f"model.mha_type={kind}", "model.head_dim=7")
    text = refusal(*overrides)
    assert text.startswith("model.head_dim=7: ") and "even" in text
    assert text.endswith("or write model.rope=false")
    composed = make_config(*overrides, "model.rope=false").model
    assert abstract(make_attention, composed).head_dim == 7


@pytest.mark.parametrize("kind", ["standard", "gqa", "mqa", "selective", "equinox"])
def test_an_odd_width_that_follows_from_d_model_is_refused_only_with_rope(kind):
    overrides = (f"model.mha_type={kind}", "model.d_model=12", "model.num_heads=4")
    text = refusal(*overrides)
    assert "=3: " in text and "even" in text and text.endswith("or write model.rope=false")
    if kind in ("selective", "equinox"):  # no head_dim to set: the message names what can be set
        assert "model.head_dim" not in text and "num_heads" in text
    assert make_config(*overrides, "model.rope=false").model.d_model == 12


def test_an_odd_rope_width_of_mla_is_refused_only_with_rope():
    overrides = ("model.mha_type=mla", "model.mla.qk_rope_head_dim=3")
    text = refusal(*overrides)
    assert text.startswith("model.mla.qk_rope_head_dim=3: ")
    assert text.endswith("or write model.rope=false")
    assert make_config(*overrides, "model.rope=false").model.mla.qk_rope_head_dim == 3


# --- what composes

ATTENTION_CHOICES: dict[str, list[Any]] = {
    "rope": [True, False],
    "qk_norm": [False, True],
    "head_dim": [None, 6],
    "num_kv_heads": [None, 1, 3, 4],
}
BLOCK_CHOICES: dict[str, list[Any]] = {
    "activation": list(Activation),
    "norm": list(Norm),
    "norm_position": list(NormPosition),
    "tie_embeddings": [False, True],
    "learned_positions": [False, True],
    "dropout": [0.0, 0.5],
    "d_ff": [None, 5],
}


def combinations(choices: dict[str, list[Any]]) -> list[dict[str, Any]]:
    rows = itertools.product(*choices.values())
    return [dict(zip(choices, values, strict=True)) for values in rows]


def declined(model: ModelConfig) -> dict[str, Any]:
    """Options that the attention type of `model` refuses, with their neutral values."""
    asked = {name for name, neutral in OPTIONAL.items() if getattr(model, name) != neutral}
    return {n: v for n, v in OPTIONAL.items() if n in asked - accepted(model.mha_type)}


@functools.cache
def accepted(mha_type: AttentionType) -> frozenset[str]:
    return layer_of(mha_type).accepts


def test_every_combination_of_attention_options_is_built_or_refused_with_what_to_write(mha_type):
    small = dataclasses.replace(small_config().model, mha_type=mha_type)
    for options in combinations(ATTENTION_CHOICES):
        model = dataclasses.replace(small, **options)
        try:
            check(model)
        except ConfigError as error:
            # A type may read num_kv_heads, and 3 does not divide 4 heads.
            assert declined(model) or options["num_kv_heads"] == 3, error
            assert re.fullmatch(r"model\.\w+=\w+: .+; write .+", str(error))
        else:
            assert not declined(model), options


def test_every_combination_of_the_other_model_options_is_built():
    small = small_config().model
    for options in combinations(BLOCK_CHOICES):
        check(dataclasses.replace(small, **options))


@st.composite
def model_configs(draw) -> ModelConfig:
    choices = ATTENTION_CHOICES | BLOCK_CHOICES
    options = {name: draw(st.sampled_from(values)) for name, values in choices.items()}
    options["mha_type"] = draw(st.sampled_from(AttentionType))
    if options["num_kv_heads"] == 3:
        options["num_kv_heads"] = 2
    options["zero_init"] = not options["tie_embeddings"] and draw(st.booleans())
    options["residual_scale"] = draw(st.sampled_from([1.0, 0.5]))
    options["logit_softcap"] = draw(st.sampled_from([None, 15.0]))
    small = small_config().model
    latent = dataclasses.replace(small.mla, q_lora_rank=draw(st.sampled_from([None, 3])))
    model = dataclasses.replace(small, **options, mla=latent)
    return dataclasses.replace(model, **declined(model))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(model_configs(), st.sampled_from(Precision))
def test_what_composes_is_a_model_in_either_precision(model_config, precision):
    def logits(key):
        model = GPT(model_config, 7, 5, key=key)
        return cast(model, compute_dtype(precision))(jnp.arange(5), key=key)

    shape = eqx.filter_eval_shape(logits, jax.random.key(0))
    assert (shape.shape, shape.dtype) == ((5, 7), compute_dtype(precision))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_with_every_attention_type_and_comes_back_from_json(
    experiment, mha_type
):
    """An option that the type refuses is named, with the value that makes the experiment fit."""
    overrides = [f"experiment={experiment}", f"model.mha_type={mha_type.name}"]
    model = compose.compose((overrides[0],)).model
    for name, value in declined(dataclasses.replace(model, mha_type=mha_type)).items():
        assert f"; write model.{name}={spell(value)}" in refusal(*overrides)
        overrides.append(f"model.{name}={spell(value)}")
    composed = make_config(*overrides)
    assert composed.model.mha_type is mha_type
    assert differences(composed)
    named = change(composed, {"wandb.tags": ["a", "b c"], "optimizer.grad_clip": None})
    for one in (composed, named):
        assert from_plain(json.loads(json.dumps(to_plain(one)))) == one


@pytest.mark.parametrize(
    ("experiment", "model", "steps", "batch_size", "seq_len", "dropout"),
    [("nanogpt_cpu", (4, 4, 128), 2000, 12, 64, 0.0), ("nanogpt", (6, 6, 384), 5000, 64, 256, 0.2)],
)
def test_nanogpt_recipes_are_those_of_nanogpt(
    experiment, model, steps, batch_size, seq_len, dropout
):
    composed = make_config(f"experiment={experiment}")
    found, trainer, optimizer = composed.model, composed.trainer, composed.optimizer
    assert (found.num_layers, found.num_heads, found.d_model) == model
    sizes = (trainer.num_steps, trainer.batch_size, composed.dataset.seq_len)
    assert sizes == (steps, batch_size, seq_len)
    assert found.dropout == dropout and trainer.grad_accum_steps == 1
    assert (found.norm, found.norm_position) == (Norm.layernorm, NormPosition.pre)
    assert found.activation is Activation.gelu and found.ff_width == 4 * found.d_model
    assert found.learned_positions and found.tie_embeddings and not found.rope
    assert composed.dataset.name is config.DatasetName.tinyshakespeare
    assert composed.dataset.val_fraction == 0.1
    assert optimizer.schedule is config.Schedule.cosine and composed.warmup_steps == 100
    numbers = (optimizer.learning_rate, optimizer.beta1, optimizer.beta2, optimizer.eps)
    assert numbers == (1e-3, 0.9, 0.99, 1e-8)
    assert optimizer.learning_rate * optimizer.final_lr_fraction == pytest.approx(1e-4, rel=1e-12)
    assert (optimizer.weight_decay, optimizer.grad_clip) == (0.1, 1.0)


@pytest.mark.parametrize("overrides", [[], *([f"experiment={name}"] for name in EXPERIMENTS)])
def test_an_experiment_compiles_steps_for_chunks_of_one_length(overrides):
    trainer = make_config(*overrides).trainer
    for number in (trainer.num_steps, trainer.eval_every, trainer.checkpoint_every):
        assert number % trainer.log_every == 0


def test_debug_is_twenty_steps():
    composed = make_config("experiment=debug")
    assert composed.trainer.num_steps == 20 and composed.trainer.eval_every <= 20


# --- changing a configuration that was composed


def test_a_changed_configuration_is_the_one_that_would_have_been_composed():
    overrides = ["model.mha_type=mla", "model.mla.q_lora_rank=5", "optimizer.learning_rate=1e-2"]
    overrides += ["wandb.tags=[a,b]", "dataset.sampling=epochs", "trainer.eval_tokens=null"]
    before = make_config()
    changed = change(before, read_overrides(overrides))
    fixed = ["wandb.name=standard", "wandb.group=standard"]  # names follow what was typed
    assert changed == make_config(*overrides, *fixed)
    assert before == make_config()


@pytest.mark.parametrize(
    ("name", "value", "answer"),
    [
        ("model.d_modl", 8, "there is no such option; did you mean model.d_model?"),
        ("colour", "red", "there is no such option"),
        ("model.d_model", "wide", "'wide' of type 'str' could not be converted to Integer"),
        ("model.dropout", 1.0, "must be a finite number"),
        ("model.num_heads", 3, "does not divide model.d_model=128"),
    ],
)
def test_a_change_is_checked_like_an_override(name, value, answer):
    with pytest.raises(ConfigError) as error:
        change(make_config(), {name: value})
    text = str(error.value)
    assert text.startswith(name) and answer in text and text.isprintable()


@pytest.mark.parametrize("override", ["experiment=debug", "launcher=joblib", "+model.x=1", "~seed"])
def test_an_override_that_chooses_adds_or_deletes_is_not_a_value(override):
    with pytest.raises(ConfigError, match=re.escape(f"{override}: cannot be combined with resume")):
        read_overrides(["seed=1", override])


def test_overrides_of_hydra_itself_are_not_options():
    assert read_overrides(["hydra.run.dir=x", "seed=3", "model.rope=false", "wandb.name=a b"]) == {
        "seed": 3,
        "model.rope": False,
        "wandb.name": "a b",
    }


# --- names


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("standard", "standard"),
        ("lr=1e-3,seed=1_a.b", "lr-1e-3-seed-1_a.b"),
        ("../../x", "x"),
        ("/etc/passwd", "etc-passwd"),
        ("a/../b", "a-..-b"),
        ("..", "run"),
        (".hidden", "hidden"),
        ("", "run"),
        (" ", "run"),
        ("a\nb", "a-b"),
        ("\x1b[31mred\x1b[0m", "31mred-0m"),
        ("\0", "run"),
        ("été", "t"),
        ("日本", "run"),
        ("a" * 300, "a" * 80),
    ],
)
def test_names_become_plain_folder_names(name, folder):
    assert slug(name) == folder


@settings(deadline=None)
@given(st.text())
def test_no_name_leaves_its_folder(name):
    assert re.fullmatch(r"[A-Za-z0-9_+][A-Za-z0-9._+-]{0,79}", slug(name))
    assert (Path("/parent") / slug(name)).resolve().parent == Path("/parent")


@settings(deadline=None)
@given(
    st.text(st.characters(exclude_characters="\0\r\n"))
    | st.sampled_from(["null", "True", "1", "1e3", "a=b,c", "it's \\"])
)
def test_a_quoted_text_is_read_as_it_was(text):
    (override,) = OverridesParser.create().parse_overrides([f"resume={quoted(text)}"])
    assert override.value() == text and not override.is_sweep_override()


def test_a_command_is_printed_as_a_shell_reads_it():
    arguments = ["resume=outputs/a b", "wandb.name='x'"]
    assert shlex.split(compose.command(arguments)) == ["python", "main.py", *arguments]


def run_dir(*overrides: str) -> str:
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        composed = hydra.compose("default", list(overrides), return_hydra_config=True)
        return composed.hydra.run.dir


@pytest.mark.parametrize(
    ("name", "end"), [("'../../x'", "x"), ("'a/b'", "a-b"), ("123", "123"), ("''", "run")]
)
def test_a_run_directory_is_inside_outputs_whatever_the_name(name, end):
    expected = rf"outputs/\d{{4}}-\d\d-\d\d/\d\d-\d\d-\d\d_{end}"
    assert re.fullmatch(expected, run_dir(f"wandb.name={name}"))


def test_a_resumed_run_stays_in_its_directory_and_keeps_the_files_of_its_beginning(tmp_path):
    (tmp_path / "config.yaml").touch()
    assert compose.run_dir(str(tmp_path), "fresh") == str(tmp_path)
    assert compose.run_dir(None, "fresh") == "fresh"
    assert compose.hydra_files(str(tmp_path), None) is None
    assert compose.hydra_files(None, None) == ".hydra"
    with pytest.raises(ConfigError, match=r"^resume=/nowhere: is not a run directory"):
        compose.run_dir("/nowhere", "fresh")


def test_a_run_is_named_after_its_attention_type(mha_type):
    override = f"model.mha_type={mha_type.name}"
    assert make_config(override).wandb.name == mha_type.name
    assert run_dir(override).endswith(f"_{mha_type.name}")


def test_the_seed_and_options_that_are_not_incidental_belong_in_a_name():
    inside = ["seed=1", "model.rope=false", "optimizer.name=muon", "dataset.name=file"]
    outside = ["mode=online", "resume=x", "wandb.tags=[a]", "dataset.filepath=x", "+model.x=1"]
    outside += ["launcher=joblib", "trainer.log_every=5", "experiment=debug", "~seed"]
    assert list(filter(compose.belongs_in_name, [*inside, *outside])) == inside


SLURM = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (SLURM, ("SLURM", 3)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),  # before srun
        (MPI, ("Open MPI", 1)),
        (KUBERNETES, ("Kubernetes", 0)),
        ({"JOB_COMPLETION_INDEX": "1"}, None),
    ],
)
def test_which_launcher_has_started_several_processes(variables, expected, monkeypatch):
    for name in SLURM | MPI | KUBERNETES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert compose.launched() == expected
    first = expected is None or expected[1] == 0
    assert compose.hydra_files(None, None) == (".hydra" if first else None)
    assert compose.hydra_files(None, 1) == (".hydra" if expected and first else None)
