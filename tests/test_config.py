"""Every rule of the schema and the line it answers with; what composes; saved configurations; names that become folders."""

import copy
import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT, make_config, small_config, time_limit
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from chargpt import config
from chargpt.config import (
    Activation,
    AttentionType,
    Config,
    ConfigError,
    ModelConfig,
    Norm,
    NormPosition,
    Precision,
    Sampling,
    did_you_mean,
    differences,
    flatten,
    from_plain,
    option_names,
    quoted,
    slug,
    to_plain,
)
from chargpt.model import GPT
from chargpt.train import cast, compute_dtype

DEFAULT = make_config()
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml"))
GROUPED = [AttentionType.standard, AttentionType.gqa, AttentionType.mqa]
OTHERS = [AttentionType.selective, AttentionType.mla, AttentionType.equinox]


def replace(group: Any, options: dict[str, Any]) -> Any:
    """A copy of `group` with dotted options set; the rules of every group on the way are checked again."""
    changes: dict[str, Any] = {}
    for name, value in options.items():
        head, _, rest = name.partition(".")
        changes[head] = replace(changes.get(head, getattr(group, head)), {rest: value}) if rest else value
    return dataclasses.replace(group, **changes)


def refusal(error: pytest.ExceptionInfo[ConfigError]) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 300
    return text


# --- rules that hold for every attention type

AT_LEAST_1 = (
    [f"model.{name}" for name in ("d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff")]
    + [f"model.mla.{field.name}" for field in dataclasses.fields(config.MLAConfig)]
    + ["dataset.seq_len", "optimizer.newton_schulz_steps"]
    + [f"trainer.{name}" for name in ("num_steps", "batch_size", "grad_accum_steps", "log_every", "eval_every")]
    + [f"trainer.{name}" for name in ("eval_tokens", "checkpoint_every", "max_skipped_steps")]
)
INTERVALS = {  # option: (the values refused, the interval that the answer names)
    "model.rope_theta": ((0.0, -1.0, "nan", "inf"), "(0, inf)"),
    "model.residual_scale": ((0.0, -1.0, "nan", "inf"), "(0, inf)"),
    "model.logit_softcap": ((0.0, -15.0, "nan", "inf"), "(0, inf)"),
    "model.dropout": ((-0.1, 1.0, "nan", "inf"), "[0, 1)"),
    "dataset.val_fraction": ((0.0, 1.0, -0.1, "nan", "-inf"), "(0, 1)"),
    "optimizer.learning_rate": ((0.0, -0.001, "nan", "inf"), "(0, inf)"),
    "optimizer.adam_learning_rate": ((0.0, -0.001, "nan", "inf"), "(0, inf)"),
    "optimizer.eps": ((0.0, "nan", "inf"), "(0, inf)"),
    "optimizer.grad_clip": ((0.0, -1.0, "nan", "inf"), "(0, inf)"),
    "optimizer.weight_decay": ((-0.1, "nan", "inf"), "[0, inf)"),
    "optimizer.beta1": ((-0.1, 1.0, "nan"), "[0, 1)"),
    "optimizer.beta2": ((-0.1, 1.0, "nan"), "[0, 1)"),
    "optimizer.momentum": ((-0.1, 1.0, "nan"), "[0, 1)"),
    "optimizer.ema_decay": ((-0.1, 1.0, "nan", "inf"), "[0, 1)"),
    "optimizer.decay_fraction": ((-0.1, 1.1, "nan"), "[0, 1]"),
    "optimizer.final_lr_fraction": ((-0.1, 1.1, "inf"), "[0, 1]"),
}
RULES: list[tuple[str, Any, str]] = [
    *((name, value, "must be at least 1") for name in AT_LEAST_1 for value in (0, -3)),
    *(
        (name, value, f"must be a finite number in {interval}")
        for name, (values, interval) in INTERVALS.items()
        for value in values
    ),
    ("trainer.sample_chars", -1, "must be at least 0"),
    ("optimizer.warmup_steps", -1, "must be at least 0"),
    ("optimizer.warmup_steps", 1601, "is longer than the run; write at most trainer.num_steps=1600"),
    ("optimizer.adam_learning_rate", 0.01, "is read only with optimizer.name=muon; write optimizer.learning_rate"),
    ("trainer.grad_accum_steps", 3, "does not divide trainer.batch_size=16; write one of 1, 2, 4, 8, 16"),
    ("dataset.seq_len", 2**20 + 1, "must be at most 1,048,576"),
    ("seed", -1, "must be in [0, 2^32)"),
    ("seed", 2**32, "must be in [0, 2^32)"),
    ("dataset.name", "file", "needs a text; write dataset.filepath=PATH"),
    ("dataset.filepath", "my.txt", "is read only with dataset.name=file, not shakespeare"),
]


@pytest.mark.parametrize(("name", "value", "advice"), RULES)
def test_a_broken_rule_is_answered_in_one_line_with_option_value_and_advice(name, value, advice):
    with pytest.raises(ConfigError) as error:
        make_config(f"{name}={value}")
    assert refusal(error) == f"{name}={value}: {advice}"


def test_no_attention_type_escapes_a_rule(mha_type):
    config = replace(DEFAULT, {"model.mha_type": mha_type})
    for name, value, advice in RULES:
        typed = float(value) if value in ("nan", "inf", "-inf") else value
        if name == "dataset.name":
            typed = type(config.dataset.name)[value]
        with pytest.raises(ConfigError, match=re.escape(advice)):
            replace(config, {name: typed})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 0),
        ("seed", 2**32 - 1),
        ("optimizer.warmup_steps", 0),
        ("optimizer.warmup_steps", 1600),
        ("model.dropout", 0.0),
        ("model.dropout", 0.999),
        ("optimizer.weight_decay", 0.0),
        ("optimizer.beta1", 0.0),
        ("optimizer.momentum", 0.0),
        ("optimizer.ema_decay", 0.0),
        ("optimizer.ema_decay", None),
        ("optimizer.newton_schulz_steps", 1),
        ("optimizer.adam_learning_rate", None),
        ("model.logit_softcap", None),
        ("optimizer.decay_fraction", 0.0),
        ("optimizer.decay_fraction", 1.0),
        ("optimizer.final_lr_fraction", 1.0),
        ("optimizer.grad_clip", None),
        ("trainer.eval_tokens", None),
        ("trainer.sample_chars", 0),
        ("trainer.grad_accum_steps", 16),
        ("trainer.log_every", 10**9),
    ],
)
def test_the_edge_of_a_rule_is_allowed(name, value):
    assert flatten(to_plain(replace(DEFAULT, {name: value})))[name] == value


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
def test_values_of_another_type_and_unknown_options_do_not_compose(override):
    with pytest.raises(Exception, match=override.partition("=")[0].rpartition(".")[2]):
        make_config(override)


def test_a_mode_in_the_environment_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    with pytest.raises((ConfigError, OmegaConfBaseException), match="dryrun"):
        make_config()
    monkeypatch.setenv("WANDB_MODE", "online")
    assert make_config().mode is config.Mode.online
    monkeypatch.delenv("WANDB_MODE")
    assert make_config().mode is config.Mode.offline


@pytest.mark.parametrize(
    "options",
    [
        {"model.d_model": 10**15, "model.num_heads": 3},
        {"model.mha_type": AttentionType.gqa, "model.d_model": 2 * 10**15, "model.num_heads": 10**15, "model.num_kv_heads": 3},
        {"trainer.batch_size": 10**15, "trainer.grad_accum_steps": 3},
    ],
)
def test_absurd_sizes_are_answered_at_once(options):
    with time_limit(5), pytest.raises(ConfigError, match="does not divide") as error:
        replace(DEFAULT, options)
    assert "\n" not in str(error.value)


# --- rules about two options


def test_zeros_for_a_head_are_refused_where_the_head_is_the_embedding(mha_type):
    with pytest.raises(ConfigError) as error:
        make_config("model.zero_init=true", "model.tie_embeddings=true", f"model.mha_type={mha_type.name}")
    advice = "an output head of zeros cannot be the embedding; write model.tie_embeddings=false"
    assert refusal(error) == f"model.zero_init=true: {advice}"
    assert make_config("model.zero_init=true").model.zero_init


def test_epochs_count_sequences_below_2_to_the_31():
    """They are counted in 32 bits on the device."""
    steps = {"trainer.num_steps": 2**26, "trainer.batch_size": 32, "trainer.grad_accum_steps": 32}
    with pytest.raises(ConfigError) as error:
        replace(DEFAULT, steps | {"dataset.sampling": Sampling.epochs})
    text = refusal(error)
    assert text.startswith("dataset.sampling=epochs: ") and "2^31" in text and "write dataset.sampling=random" in text
    assert replace(DEFAULT, steps).dataset.sampling is Sampling.random
    most = steps | {"trainer.num_steps": 2**26 - 1, "dataset.sampling": Sampling.epochs}
    assert replace(DEFAULT, most).dataset.sampling is Sampling.epochs


# --- rules that depend on the attention type


@pytest.mark.parametrize("mha_type", [kind for kind in AttentionType if kind is not AttentionType.mla])
def test_heads_divide_the_width_where_head_dim_follows_from_it(mha_type):
    with pytest.raises(ConfigError) as error:
        make_config(f"model.mha_type={mha_type.name}", "model.num_heads=3")
    advice = "does not divide model.d_model=128; write one of 1, 2, 4, 8, 16, 32, 64, 128"
    assert refusal(error) == f"model.num_heads=3: {advice}"


def test_heads_of_mla_and_of_a_given_head_dim_need_not_divide_the_width():
    assert make_config("model.mha_type=mla", "model.num_heads=3").model.num_heads == 3
    for kind in GROUPED:
        model = replace(DEFAULT.model, {"mha_type": kind, "head_dim": 6, "num_heads": 3, "num_kv_heads": 3})
        assert (model.head_width, model.num_heads) == (6, 3)


@pytest.mark.parametrize("num_kv_heads", [3, 8])
def test_kv_heads_of_gqa_divide_the_heads(num_kv_heads):
    with pytest.raises(ConfigError) as error:
        make_config("model.mha_type=gqa", f"model.num_kv_heads={num_kv_heads}")
    assert refusal(error) == f"model.num_kv_heads={num_kv_heads}: does not divide model.num_heads=4; write one of 1, 2, 4"


@pytest.mark.parametrize("num_heads", [1, 2, 4, 6, 8])
def test_kv_heads_are_half_of_the_heads_for_gqa_all_for_standard_and_one_for_mqa(num_heads):
    model = replace(DEFAULT.model, {"d_model": 48 * 8, "num_heads": num_heads})
    heads = {kind: replace(model, {"mha_type": kind}).kv_heads for kind in GROUPED}
    assert heads == {
        AttentionType.standard: num_heads,
        AttentionType.gqa: max(1, num_heads // 2),
        AttentionType.mqa: 1,
    }
    assert replace(model, {"mha_type": AttentionType.gqa, "num_kv_heads": num_heads}).kv_heads == num_heads


@pytest.mark.parametrize("mha_type", OTHERS)
def test_head_dim_is_refused_where_the_type_has_another_width(mha_type):
    with pytest.raises(ConfigError) as error:
        make_config(f"model.mha_type={mha_type.name}", "model.head_dim=32")
    assert re.fullmatch(rf"model\.head_dim=32: {mha_type.name} .*; write model\.head_dim=null", refusal(error))


@pytest.mark.parametrize("mha_type", GROUPED)
def test_an_odd_head_dim_is_refused_with_rope_alone(mha_type):
    overrides = (f"model.mha_type={mha_type.name}", "model.head_dim=7")
    with pytest.raises(ConfigError) as error:
        make_config(*overrides)
    text = refusal(error)
    assert text.startswith("model.head_dim=7: ") and "even" in text and text.endswith("or write model.rope=false")
    assert make_config(*overrides, "model.rope=false").model.head_width == 7


@pytest.mark.parametrize("mha_type", [kind for kind in AttentionType if kind is not AttentionType.mla])
def test_an_odd_width_that_follows_from_d_model_is_refused_with_rope_alone(mha_type):
    options = {"mha_type": mha_type, "d_model": 12, "num_heads": 4}
    with pytest.raises(ConfigError) as error:
        replace(DEFAULT.model, options)
    text = refusal(error)
    assert "=3: " in text and "even" in text and text.endswith("or write model.rope=false")
    assert replace(DEFAULT.model, options | {"rope": False}).head_width == 3
    if mha_type not in GROUPED:  # it has no head_dim to set: the answer names what can be set
        assert "model.head_dim" not in text and "num_heads" in text


def test_an_odd_rope_width_of_mla_is_refused_with_rope_alone():
    overrides = ("model.mha_type=mla", "model.mla.qk_rope_head_dim=3")
    with pytest.raises(ConfigError) as error:
        make_config(*overrides)
    text = refusal(error)
    assert text.startswith("model.mla.qk_rope_head_dim=3: ") and text.endswith("or write model.rope=false")
    assert make_config(*overrides, "model.rope=false").model.mla.qk_rope_head_dim == 3


@pytest.mark.parametrize("mha_type", OTHERS)
def test_qk_norm_is_refused_with_a_reason_where_a_type_cannot_have_it(mha_type):
    with pytest.raises(ConfigError) as error:
        make_config(f"model.mha_type={mha_type.name}", "model.qk_norm=true")
    expected = rf"model\.qk_norm=true: {mha_type.name} attention has none \(.+\); write model\.qk_norm=false"
    assert re.fullmatch(expected, refusal(error))


# --- what composes

CHOICES: dict[str, list[Any]] = {
    "activation": list(Activation),
    "norm": list(Norm),
    "norm_position": list(NormPosition),
    "rope": [True, False],
    "qk_norm": [False, True],
    "tie_embeddings": [False, True],
    "learned_positions": [False, True],
    "dropout": [0.0, 0.5],
    "head_dim": [None, 6],
    "num_kv_heads": [None, 1, 3, 4],
    "d_ff": [None, 5],
}


def must_be_refused(options: dict[str, Any]) -> bool:
    other = options["mha_type"] in OTHERS
    return (other and (options["qk_norm"] or options["head_dim"] is not None)) or (
        options["mha_type"] is AttentionType.gqa and options["num_kv_heads"] == 3
    )


def test_every_combination_of_model_options_composes_or_is_refused_with_what_to_write(mha_type):
    small = small_config().model
    outcomes = set()
    for values in itertools.product(*CHOICES.values()):
        options = dict(zip(CHOICES, values, strict=True), mha_type=mha_type)
        try:
            dataclasses.replace(small, **options)
        except ConfigError as error:
            assert must_be_refused(options), error
            assert re.fullmatch(r"model\.\w+=\w+: .+; write .+", str(error))
            outcomes.add("refused")
        else:
            assert not must_be_refused(options), options
            outcomes.add("composed")
    assert "composed" in outcomes and (("refused" in outcomes) == (mha_type in [*OTHERS, AttentionType.gqa]))


@st.composite
def model_configs(draw) -> ModelConfig:
    options = {name: draw(st.sampled_from(values)) for name, values in CHOICES.items()}
    options["mha_type"] = draw(st.sampled_from(AttentionType))
    if options["mha_type"] in OTHERS:
        options |= {"qk_norm": False, "head_dim": None}
    if options["num_kv_heads"] == 3:
        options["num_kv_heads"] = 2
    options["zero_init"] = not options["tie_embeddings"] and draw(st.booleans())
    options["residual_scale"] = draw(st.sampled_from([1.0, 0.5]))
    options["logit_softcap"] = draw(st.sampled_from([None, 15.0]))
    options["mla"] = dataclasses.replace(small_config().model.mla, q_lora_rank=draw(st.sampled_from([None, 3])))
    return dataclasses.replace(small_config().model, **options)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(model_configs(), st.sampled_from(Precision))
def test_what_composes_is_a_model_in_either_precision(model_config, precision):
    def logits(key):
        model = GPT(model_config, 7, 5, key=key)
        return cast(model, compute_dtype(precision))(jnp.arange(5), key=key)

    shape = eqx.filter_eval_shape(logits, jax.random.key(0))
    assert (shape.shape, shape.dtype) == ((5, 7), compute_dtype(precision))


def test_schema_and_yaml_hold_the_same_options():
    yaml = flatten(OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "default.yaml")))
    ours = [name for name in yaml if name != "defaults" and not name.startswith("hydra.")]
    groups = {name.rpartition(".")[0] for name in ours} - {""}
    assert ours == [name for name in option_names() if name not in groups]
    assert set(option_names()) == {*ours, *groups}
    assert "???" not in yaml.values()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_with_every_attention_type(experiment, mha_type):
    overrides = [f"experiment={experiment}", f"model.mha_type={mha_type.name}"]
    if mha_type not in config.GROUPED and make_config(overrides[0]).model.qk_norm:
        with pytest.raises(ConfigError, match=r"write model\.qk_norm=false$"):
            make_config(*overrides)
        overrides.append("model.qk_norm=false")
    composed = make_config(*overrides)
    assert composed.model.mha_type is mha_type
    assert differences(composed)


@pytest.mark.parametrize(
    ("experiment", "model", "steps", "batch_size", "seq_len", "dropout"),
    [("nanogpt_cpu", (4, 4, 128), 2000, 12, 64, 0.0), ("nanogpt", (6, 6, 384), 5000, 64, 256, 0.2)],
)
def test_nanogpt_recipes_are_those_of_nanogpt(experiment, model, steps, batch_size, seq_len, dropout):
    composed = make_config(f"experiment={experiment}")
    assert (composed.model.num_layers, composed.model.num_heads, composed.model.d_model) == model
    assert (composed.trainer.num_steps, composed.trainer.batch_size, composed.dataset.seq_len) == (steps, batch_size, seq_len)
    assert composed.model.dropout == dropout and composed.trainer.grad_accum_steps == 1
    assert (composed.model.norm, composed.model.norm_position) == (Norm.layernorm, NormPosition.pre)
    assert composed.model.activation is Activation.gelu and composed.model.ff_width == 4 * composed.model.d_model
    assert composed.model.learned_positions and composed.model.tie_embeddings and not composed.model.rope
    assert composed.dataset.name is config.DatasetName.tinyshakespeare and composed.dataset.val_fraction == 0.1
    optimizer = composed.optimizer
    assert optimizer.schedule is config.Schedule.cosine and optimizer.warmup_steps == 100
    assert (optimizer.learning_rate, optimizer.beta1, optimizer.beta2, optimizer.eps) == (1e-3, 0.9, 0.99, 1e-8)
    assert optimizer.learning_rate * optimizer.final_lr_fraction == pytest.approx(1e-4, rel=1e-12)
    assert (optimizer.weight_decay, optimizer.grad_clip) == (0.1, 1.0)


def test_debug_is_twenty_steps():
    composed = make_config("experiment=debug")
    assert composed.trainer.num_steps == 20 and composed.trainer.eval_every <= 20


# --- saved configurations


def through_json(composed: Config) -> Config:
    return from_plain(json.loads(json.dumps(to_plain(composed))))


@pytest.mark.parametrize("experiment", [*(f"experiment={name}" for name in EXPERIMENTS), "seed=7"])
def test_a_configuration_comes_back_from_json_unchanged(experiment, mha_type):
    overrides = (f"model.mha_type={mha_type.name}", "wandb.tags=[a,'b c']", "optimizer.grad_clip=null", "wandb.group=g")
    composed = make_config(experiment, "model.qk_norm=false", *overrides)
    assert through_json(composed) == composed


PLAIN_TEXT = st.text().filter(lambda text: "${" not in text and text != "???")


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    model_configs(),
    st.floats(1e-30, 1e30),
    st.integers(0, 2**32 - 1),
    st.sampled_from(Precision),
    st.sampled_from(config.Schedule),
    PLAIN_TEXT,
    st.lists(PLAIN_TEXT, max_size=3),
)
def test_any_configuration_comes_back_from_json_unchanged(model, rate, seed, precision, schedule, name, tags):
    options = {"seed": seed, "optimizer.learning_rate": rate, "optimizer.schedule": schedule, "model": model}
    options |= {"trainer.precision": precision, "wandb.name": name, "wandb.tags": tags, "wandb.entity": name}
    composed = replace(DEFAULT, options)
    assert through_json(composed) == composed


@pytest.mark.parametrize("override", [r"wandb.name='\${x}'", r"wandb.tags=['\${oc.env:HOME}']", r"wandb.group='a\${'"])
def test_a_literal_interpolation_does_not_compose_since_it_could_not_be_read_back(override):
    with pytest.raises(ConfigError, match=r"^wandb\.") as error:
        make_config(override)
    refusal(error)


def changed(name: str, value: Any) -> dict[str, Any]:
    plain = copy.deepcopy(to_plain(DEFAULT))
    *groups, last = name.split(".")
    target = plain
    for group in groups:
        target = target[group]
    target[last] = value
    return plain


@pytest.mark.parametrize(
    "value",
    ["${oc.env:HOME}", "a ${seed} b", r"\${seed}", "${", ["${oc.env:HOME}"], [["${oc.env:HOME}"]], [{"a": "${oc.env:HOME}"}]],
)
@pytest.mark.parametrize("name", ["wandb.name", "wandb.tags", "dataset.filepath", "seed", "model.mha_type", "model"])
def test_interpolations_in_a_saved_configuration_are_refused(name, value):
    with pytest.raises((ConfigError, OmegaConfBaseException)) as error:
        from_plain(changed(name, value))
    assert str(Path.home()) not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("colour", "red"),
        ("model.d_modl", 8),
        ("model.mla.rank", 8),
        ("optimizer.", 1),
        ("model.model", {}),
        ("seed", 1.5),
        ("seed", "one"),
        ("seed", True),
        ("seed", None),
        ("seed", [1]),
        ("seed", {"a": 1}),
        ("model", 3),
        ("model", None),
        ("model", []),
        ("model.mha_type", "linear"),
        ("model.mha_type", 0),
        ("model.rope", "perhaps"),
        ("model.dropout", "much"),
        ("model.dropout", True),
        ("wandb.name", None),
        ("wandb.tags", "a"),
        ("wandb.tags", {"a": 1}),
        ("wandb.tags", [None]),
        ("wandb.tags", [["a"]]),
        ("wandb.tags", [{"a": "b"}]),
        ("wandb.name", "???"),
        ("model.d_model", "???"),
    ],
)
def test_unknown_options_and_wrong_types_in_a_saved_configuration_are_refused(name, value):
    with pytest.raises((ConfigError, OmegaConfBaseException)):
        from_plain(changed(name, value))


def test_a_saved_configuration_with_an_option_missing_is_refused():
    for name in option_names():
        plain = to_plain(DEFAULT)
        *groups, last = name.split(".")
        target = plain
        for group in groups:
            target = target[group]
        del target[last]
        with pytest.raises(OmegaConfBaseException, match=last):
            from_plain(plain)


@pytest.mark.parametrize(("name", "value"), [("model.d_model", 0), ("model.num_heads", 3), ("model.dropout", float("nan"))])
def test_a_saved_configuration_keeps_the_same_rules(name, value):
    with pytest.raises(ConfigError, match=re.escape(f"{name}={value}: ")):
        from_plain(changed(name, value))


# --- what differs from the defaults


def test_the_defaults_do_not_differ_from_themselves(mha_type):
    assert differences(make_config()) == {}
    expected = {} if mha_type is AttentionType.standard else {"model.mha_type": mha_type.name}
    assert differences(make_config(f"model.mha_type={mha_type.name}")) == expected


def test_differences_are_what_was_overridden_spelled_as_on_the_command_line():
    overrides = ("model.activation=swiglu", "optimizer.learning_rate=1e-2", "model.mla.q_lora_rank=8", "wandb.tags=[a]")
    changes = {"model.activation": "swiglu", "optimizer.learning_rate": 0.01, "model.mla.q_lora_rank": 8, "wandb.tags": ["a"]}
    assert differences(make_config(*overrides)) == changes
    assert differences(make_config("seed=0", "model.d_model=128", "optimizer.learning_rate=0.003")) == {}


def test_differences_of_an_experiment_are_its_file_less_what_repeats_the_defaults():
    file = flatten(OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "experiment" / "debug.yaml")))
    usual = flatten(to_plain(DEFAULT))
    assert differences(make_config("experiment=debug")) == {k: v for k, v in file.items() if v != usual[k]}


# --- names


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("model.mha_typ", "model.mha_type"),
        ("model.num_layer", "model.num_layers"),
        ("learning_rate", "optimizer.learning_rate"),
        ("model.seq_len", "dataset.seq_len"),
        ("trainer.seq_len", "dataset.seq_len"),
        ("kv_lora_rank", "model.mla.kv_lora_rank"),
        ("trainer.batchsize", "trainer.batch_size"),
        ("sed", "seed"),
    ],
)
def test_a_misspelt_or_misplaced_option_is_recognised(word, answer):
    assert did_you_mean(word, option_names()) == f"; did you mean {answer}?"


@pytest.mark.parametrize("word", ["", "qqqqqq", "xyz.abc", "0"])
def test_what_resembles_nothing_gets_no_guess(word):
    assert did_you_mean(word, option_names()) == ""


def test_a_misspelt_choice_is_recognised():
    assert did_you_mean("selectiv", [kind.name for kind in AttentionType]) == "; did you mean selective?"
    assert did_you_mean("anything", []) == ""


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
@given(st.text(st.characters(exclude_characters="\0\r\n")) | st.sampled_from(["null", "True", "1", "1e3", "a=b,c", "it's \\"]))
def test_a_quoted_text_is_read_as_it_was(text):
    (override,) = OverridesParser.create().parse_overrides([f"resume={quoted(text)}"])
    assert override.value() == text and not override.is_sweep_override()


def run_dir(*overrides: str) -> str:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("default", list(overrides), return_hydra_config=True).hydra.run.dir


@pytest.mark.parametrize(("name", "end"), [("'../../x'", "x"), ("'a/b'", "a-b"), ("123", "123"), ("''", "run")])
def test_a_run_directory_is_inside_outputs_whatever_the_name(name, end):
    assert re.fullmatch(rf"outputs/\d{{4}}-\d\d-\d\d/\d\d-\d\d-\d\d_{end}", run_dir(f"wandb.name={name}"))


def test_a_run_is_named_after_its_attention_type(mha_type):
    override = f"model.mha_type={mha_type.name}"
    assert make_config(override).wandb.name == mha_type.name
    assert run_dir(override).endswith(f"_{mha_type.name}")
