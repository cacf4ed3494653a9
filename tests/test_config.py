"""Every rule of the schema and its message; saved configurations of this and older versions."""

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, make_config, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from chargpt import config
from chargpt.compose import change
from chargpt.config import (
    REQUIRED,
    Activation,
    AttentionType,
    Norm,
    Precision,
    Sampling,
    did_you_mean,
    differences,
    flatten,
    from_plain,
    options,
    settings_of,
    spell,
    to_plain,
    to_yaml,
)
from chargpt.errors import ConfigError

DEFAULT = make_config()


def replace(group: Any, options: dict[str, Any]) -> Any:
    """A copy of `group` with dotted options set; the rules of every group involved are checked."""
    changes: dict[str, Any] = {}
    for name, value in options.items():
        head, _, rest = name.partition(".")
        inner = changes.get(head, getattr(group, head))
        changes[head] = replace(inner, {rest: value}) if rest else value
    return dataclasses.replace(group, **changes)


def refusal(error: pytest.ExceptionInfo[ConfigError]) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 300
    return text


# --- rules that hold for every attention type

AT_LEAST_1 = ["model.d_model", "model.num_layers", "model.num_heads", "model.num_kv_heads"]
AT_LEAST_1 += ["model.head_dim", "model.d_ff", "dataset.seq_len", "optimizer.newton_schulz_steps"]
AT_LEAST_1 += [
    f"model.mla.{field.name}"
    for field in dataclasses.fields(config.MLAConfig)
    if field.metadata["option"].least
]
AT_LEAST_1 += ["trainer.num_steps", "trainer.batch_size", "trainer.grad_accum_steps"]
AT_LEAST_1 += ["trainer.num_devices", "trainer.log_every", "trainer.eval_every"]
AT_LEAST_1 += ["trainer.eval_tokens", "trainer.checkpoint_every", "trainer.max_skipped_steps"]
AT_LEAST_1 += ["model.num_experts", "model.experts_per_token", "model.expert_d_ff"]
INTERVALS = {  # option: (the values refused, the interval that the message names)
    "model.rope_theta": ((0.0, -1.0, "nan", "inf"), "(0, inf)"),
    "model.residual_scale": ((0.0, -1.0, "nan", "inf"), "(0, inf)"),
    "model.logit_softcap": ((0.0, -15.0, "nan", "inf"), "(0, inf)"),
    "model.router_aux_loss": ((-0.1, "nan", "inf"), "[0, inf)"),
    "model.router_z_loss": ((-0.1, "nan", "inf"), "[0, inf)"),
    "model.router_bias_rate": ((-0.1, "nan", "inf"), "[0, inf)"),
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
    ("model.shared_experts", -1, "must be at least 0"),
    ("optimizer.warmup_steps", -1, "must be at least 0"),
    (
        "optimizer.warmup_steps",
        1601,
        "is longer than the run; write null, or at most trainer.num_steps=1600",
    ),
    (
        "optimizer.adam_learning_rate",
        0.01,
        "is read only with optimizer.name=muon; write optimizer.learning_rate",
    ),
    (
        "trainer.grad_accum_steps",
        3,
        "does not divide trainer.batch_size=16; write one of 1, 2, 4, 8, 16",
    ),
    (
        "trainer.num_devices",
        3,
        "does not divide trainer.batch_size / trainer.grad_accum_steps=16; "
        "write one of 1, 2, 4, 8, 16",
    ),
    ("dataset.seq_len", 2**20 + 1, "must be at most 1,048,576"),
    ("model.ngram", 65, "must be at most dataset.seq_len=64"),
    ("seed", -1, "must be in [0, 2^32)"),
    ("seed", 2**32, "must be in [0, 2^32)"),
    ("dataset.name", "file", "needs a text; write dataset.filepath=PATH"),
    ("dataset.filepath", "my.txt", "is read only with dataset.name=file, not shakespeare"),
]


@pytest.mark.parametrize(("name", "value", "advice"), RULES)
def test_a_broken_rule_is_one_line_with_option_value_and_advice(name, value, advice):
    with pytest.raises(ConfigError) as error:
        change(DEFAULT, {name: value})
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
        ("optimizer.warmup_steps", None),
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
        ("trainer.num_devices", None),
        ("trainer.num_devices", 16),
        ("trainer.log_every", 10**9),
    ],
)
def test_the_edge_of_a_rule_is_allowed(name, value):
    assert settings_of(replace(DEFAULT, {name: value}))[name] == value


# --- rules about two options


def test_zeros_for_a_head_are_refused_if_the_head_is_the_embedding(mha_type):
    zeros = {"model.mha_type": mha_type, "model.zero_init": True}
    with pytest.raises(ConfigError) as error:
        change(DEFAULT, zeros | {"model.tie_embeddings": True})
    advice = "an output head of zeros cannot be the embedding; write model.tie_embeddings=false"
    assert refusal(error) == f"model.zero_init=true: {advice}"
    assert change(DEFAULT, zeros).model.zero_init


def test_epochs_count_sequences_below_2_to_the_31():
    """They are counted in 32 bits on the device."""
    steps = {"trainer.num_steps": 2**26, "trainer.batch_size": 32, "trainer.grad_accum_steps": 32}
    with pytest.raises(ConfigError) as error:
        replace(DEFAULT, steps | {"dataset.sampling": Sampling.epochs})
    text = refusal(error)
    assert text.startswith("dataset.sampling=epochs: ") and "2^31" in text
    assert "write dataset.sampling=random" in text
    assert replace(DEFAULT, steps).dataset.sampling is Sampling.random
    most = steps | {"trainer.num_steps": 2**26 - 1, "dataset.sampling": Sampling.epochs}
    assert replace(DEFAULT, most).dataset.sampling is Sampling.epochs


@pytest.mark.parametrize(
    ("num_steps", "expected"), [(1, 0), (9, 0), (10, 1), (800, 80), (1000, 100), (10**6, 100)]
)
def test_warm_up_is_a_tenth_of_the_run_at_most_100_steps_unless_it_is_set(num_steps, expected):
    run = {"trainer.num_steps": num_steps}
    assert replace(DEFAULT, run).optimizer.warmup_steps is None
    assert replace(DEFAULT, run).warmup_steps == expected
    for given_steps in (0, 1):
        given_run = replace(DEFAULT, run | {"optimizer.warmup_steps": given_steps})
        assert given_run.warmup_steps == given_steps


# --- the table of options


def test_schema_and_yaml_hold_the_same_options_in_the_same_order():
    file = flatten(OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "default.yaml")))
    ours = [name for name in file if name != "defaults" and not name.startswith("hydra.")]
    assert ours == list(options()) == list(settings_of(DEFAULT))
    assert "???" not in file.values()


def test_what_is_incidental_is_neither_fixed_nor_traced():
    for name, (_, facts) in options().items():
        assert not (facts.incidental and (facts.fixed or facts.traced)), name


# --- saved configurations

CHOICES = {
    "model.mha_type": AttentionType,
    "model.match": config.Match,
    "model.activation": Activation,
    "model.norm": Norm,
    "model.qk_norm": (False, True),
    "model.head_dim": (None, 6),
    "model.logit_softcap": (None, 15.0),
    "model.mla.q_lora_rank": (None, 3),
    "dataset.sampling": Sampling,
    "optimizer.name": config.OptimizerName,
    "optimizer.schedule": config.Schedule,
    "optimizer.warmup_steps": (None, 0, 7),
    "trainer.precision": (None, *Precision),
    "trainer.eval_tokens": (None, 100),
    "mode": config.Mode,
}
PLAIN_TEXT = st.text().filter(lambda text: "${" not in text and text != "???")


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in CHOICES.items()}),
    st.floats(1e-30, 1e30),
    st.integers(0, 2**32 - 1),
    PLAIN_TEXT,
    st.lists(PLAIN_TEXT, max_size=3),
)
def test_any_configuration_comes_back_unchanged(choices, rate, seed, name, tags):
    values = choices | {"seed": seed, "optimizer.learning_rate": rate}
    values |= {"wandb.name": name, "wandb.tags": tags, "wandb.entity": name}
    config = replace(DEFAULT, values)
    assert from_plain(json.loads(json.dumps(to_plain(config)))) == config
    assert from_plain(yaml.safe_load(to_yaml(config))) == config


def changed(name: str, value: Any) -> dict[str, Any]:
    """The defaults as in a file, with one value replaced by any other."""
    plain = copy.deepcopy(to_plain(DEFAULT))
    *groups, last = name.split(".")
    target = plain
    for group in groups:
        target = target[group]
    target[last] = value
    return plain


def without(*names: str) -> dict[str, Any]:
    """The defaults as in a file, without some options."""
    plain = to_plain(DEFAULT)
    for name in names:
        *groups, last = name.split(".")
        target = plain
        for group in groups:
            target = target[group]
        del target[last]
    return plain


NEUTRAL = {
    name: facts.neutral for name, (_, facts) in options().items() if facts.neutral is not REQUIRED
}
ALWAYS = [name for name in options() if name not in NEUTRAL]
GROUPS = sorted({name.rpartition(".")[0] for name in ALWAYS} - {""})


@pytest.mark.parametrize("name", [*ALWAYS, *GROUPS])
def test_a_saved_configuration_without_an_option_that_always_existed_is_refused(name):
    with pytest.raises(OmegaConfBaseException, match=name.rpartition(".")[2]):
        from_plain(without(name))


@pytest.mark.parametrize("name", NEUTRAL)
def test_an_option_that_an_older_file_lacks_has_its_neutral_value(name):
    """The neutral value is of the option's own type."""
    old = from_plain(without(name))
    assert old == from_plain(changed(name, NEUTRAL[name]))
    value = settings_of(old)[name]
    assert value == NEUTRAL[name] and type(value) is type(NEUTRAL[name])
    assert from_plain(to_plain(old)) == old


def test_a_file_that_lacks_every_later_option_is_read_too():
    old = from_plain(without(*NEUTRAL))
    assert settings_of(old) == settings_of(DEFAULT) | NEUTRAL


HOME = "${oc.env:HOME}"


@pytest.mark.parametrize(
    "value", [HOME, "a ${seed} b", r"\${seed}", "${", [HOME], [[HOME]], [{"a": HOME}]]
)
@pytest.mark.parametrize(
    "name", ["wandb.name", "wandb.tags", "dataset.filepath", "seed", "model.mha_type", "model"]
)
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
        ("model.match", None),
        ("model.match", "all"),
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


@pytest.mark.parametrize(
    ("name", "value"),
    [("model.d_model", 0), ("trainer.grad_accum_steps", 3), ("model.dropout", float("nan"))],
)
def test_a_saved_configuration_is_checked_by_the_same_rules(name, value):
    with pytest.raises(ConfigError, match=re.escape(f"{name}={value}: ")) as error:
        from_plain(changed(name, value))
    refusal(error)


# --- what differs from the defaults


def test_the_defaults_do_not_differ_from_themselves(mha_type):
    assert differences(DEFAULT) == {}
    expected = {} if mha_type is DEFAULT.model.mha_type else {"model.mha_type": mha_type.name}
    assert differences(make_config(f"model.mha_type={mha_type.name}")) == expected


def test_differences_are_what_was_overridden_spelled_as_on_the_command_line():
    overrides = ["model.activation=swiglu", "optimizer.learning_rate=1e-2"]
    overrides += ["model.mla.q_lora_rank=8", "wandb.tags=[a]"]
    changes = {
        "model.activation": "swiglu",
        "optimizer.learning_rate": 0.01,
        "model.mla.q_lora_rank": 8,
        "wandb.tags": ["a"],
    }
    assert differences(make_config(*overrides)) == changes
    usual = ["seed=0", "model.d_model=128", "optimizer.learning_rate=0.003"]
    assert differences(make_config(*usual)) == {}


def test_differences_of_an_experiment_are_its_file_without_what_repeats_the_defaults():
    path = ROOT / "configs" / "experiment" / "debug.yaml"
    file, usual = flatten(yaml.safe_load(path.read_text())), settings_of(DEFAULT)
    expected = {name: value for name, value in file.items() if value != usual[name]}
    assert differences(make_config("experiment=debug")) == expected


def test_a_value_is_spelled_as_the_command_line_reads_it():
    spelled = [spell(value) for value in (None, True, False, AttentionType.mla, 0.003, 7, "a b")]
    assert spelled == ["null", "true", "false", "mla", "0.003", "7", "a b"]
    plain = {n: v for n, v in settings_of(small_config()).items() if not isinstance(v, list | str)}
    overrides = [f"{name}={spell(value)}" for name, value in plain.items()]
    again = settings_of(small_config(*overrides))
    assert {name: again[name] for name in plain} == plain


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
    assert did_you_mean(word, options()) == f"; did you mean {answer}?"


@pytest.mark.parametrize("word", ["", "qqqqqq", "xyz.abc", "0"])
def test_a_word_that_resembles_nothing_gets_no_guess(word):
    assert did_you_mean(word, options()) == ""


def test_a_misspelt_choice_is_recognised():
    assert did_you_mean("selectiv", AttentionType.__members__) == "; did you mean selective?"
    assert did_you_mean("anything", []) == ""
