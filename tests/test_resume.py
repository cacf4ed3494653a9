"""Going on with a run: which checkpoint, which configuration, which text, which records; one process at a time; signals."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import small_config
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from test_checkpoint import VOCABULARY, at_step, make_header, make_run, random_state, tiny_config

from chargpt import checkpoint, cli
from chargpt.checkpoint import keep_as
from chargpt.config import AttentionType, Config, ConfigError, Mode, flatten, to_plain
from chargpt.corpus import load_corpus
from chargpt.machine import package_versions
from chargpt.process import StopSignal, lock
from chargpt.records import read_config
from chargpt.resume import check_corpus, cut_records, load_newest, record_sizes, restore, with_overrides
from chargpt.run import resume, train

TEXT = "the quick brown fox jumps over the lazy dog\n" * 20


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with three whole checkpoints: last at step 30, previous at 20, best at 10."""
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    config = tiny_config()
    write_config(run_dir, config)
    for name, step in (("last", 30), ("previous", 20), ("best", 10)):
        write_checkpoint(run_dir, name, config, step)
    return run_dir


def write_config(run_dir: Path, config: Config) -> None:
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(to_plain(config))))


def write_checkpoint(run_dir: Path, name: str, config: Config, step: int, **changes: Any) -> None:
    """A checkpoint of that step, for the vocabulary of `changes` or that of the other tests."""
    header = make_header(config, step=step, **changes)
    state = random_state(config, vocabulary=header.vocabulary)
    checkpoint.save(file_of(run_dir, name), at_step(state, step), header)


def file_of(run_dir: Path, name: str) -> Path:
    return run_dir / "checkpoints" / f"{name}.eqx"


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(data)


def no_checkpoint(path: Path) -> None:
    path.write_bytes(b"\x80\x04cos\nsystem")


# ---- the newest whole checkpoint


def test_the_newest_is_taken_and_nothing_said(run_dir: Path):
    said: list[str] = []
    state, header = load_newest(run_dir, said.append)
    assert (header.step, int(state.step), said) == (30, 30, [])


@pytest.mark.parametrize("damage", [cut_in_half, flip_a_bit, no_checkpoint, lambda path: path.write_bytes(b"")])
def test_damage_is_said_in_a_line_and_the_one_before_is_taken(damage: Callable[[Path], None], run_dir: Path):
    said: list[str] = []
    last, previous, best = (file_of(run_dir, name) for name in ("last", "previous", "best"))
    damage(last)
    assert load_newest(run_dir, said.append)[1].step == 20
    assert len(said) == 1 and said[0].startswith(f"{last}: ") and said[0].isprintable()
    assert "is damaged" in said[0]
    said.clear()
    if not last.exists():  # it may have been set aside
        no_checkpoint(last)
    damage(previous)
    assert load_newest(run_dir, said.append)[1].step == 10
    assert [line.split(": ")[0] for line in said] == [str(last), str(previous)]
    assert all(line.isprintable() for line in said)
    assert best.exists()


def test_checkpoints_that_are_missing_are_passed_over(run_dir: Path):
    said: list[str] = []
    file_of(run_dir, "last").unlink()
    assert load_newest(run_dir, said.append)[1].step == 20
    file_of(run_dir, "previous").unlink()
    assert load_newest(run_dir, said.append)[1].step == 10
    file_of(run_dir, "best").unlink()
    assert load_newest(run_dir, said.append) is None
    assert said == []


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(run_dir: Path):
    said: list[str] = []
    for name in ("last", "previous", "best"):
        cut_in_half(file_of(run_dir, name))
    with pytest.raises(ConfigError, match="no checkpoint there is whole") as caught:
        load_newest(run_dir, said.append)
    assert str(run_dir) in str(caught.value) and "\n" not in str(caught.value)
    assert len(said) == 3


def test_a_forged_checkpoint_is_passed_over_like_a_damaged_one(run_dir: Path):
    said: list[str] = []
    write_checkpoint(run_dir, "last", tiny_config(), 30, vocabulary=VOCABULARY + "x")
    data = file_of(run_dir, "last").read_bytes()[:-32].replace(rb"\ud83d\ude00x", rb"\ud83d\ude00")
    file_of(run_dir, "last").write_bytes(data + checkpoint.hashlib.sha256(data).digest())
    assert load_newest(run_dir, said.append)[1].step == 20
    assert len(said) == 1 and "model.embedding" in said[0]


def test_a_damaged_last_never_takes_the_place_of_the_whole_one_before_it(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed in its next save, a run that fell back must find again what it fell back to."""
    cut_in_half(file_of(run_dir, "last"))
    file_of(run_dir, "best").unlink()
    assert restore(run_dir, [], print)[1][1].step == 20
    run = make_run(run_dir, [])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run._save("last")
    assert load_newest(run_dir, lambda _: None)[1].step == 20


# ---- keep_as


def test_a_file_kept_under_another_name_outlives_the_next_save(tmp_path: Path):
    last, previous = tmp_path / "last.eqx", tmp_path / "previous.eqx"
    checkpoint.write_durably(last, b"one")
    keep_as(last, previous)
    assert (last.read_bytes(), previous.read_bytes()) == (b"one", b"one")
    checkpoint.write_durably(last, b"two")
    assert (last.read_bytes(), previous.read_bytes()) == (b"two", b"one")
    keep_as(last, previous)
    assert (last.read_bytes(), previous.read_bytes()) == (b"two", b"two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.eqx", "previous.eqx"]


def test_keeping_twice_without_a_save_between_leaves_no_temporary_file(tmp_path: Path):
    """rename() between two names of one file does nothing, and says nothing."""
    last, previous = tmp_path / "last.eqx", tmp_path / "previous.eqx"
    checkpoint.write_durably(last, b"one")
    keep_as(last, previous)
    keep_as(last, previous)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.eqx", "previous.eqx"]


def test_keeping_works_where_a_kill_left_a_temporary_file(tmp_path: Path):
    last, previous = tmp_path / "last.eqx", tmp_path / "previous.eqx"
    checkpoint.write_durably(last, b"one")
    (tmp_path / "previous.tmp").write_bytes(b"left behind")
    keep_as(last, previous)
    assert previous.read_bytes() == b"one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.eqx", "previous.eqx"]


def test_a_filesystem_without_hard_links_gets_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    last, previous = tmp_path / "last.eqx", tmp_path / "previous.eqx"
    for content in (b"one", b"two"):
        checkpoint.write_durably(last, content)
        keep_as(last, previous)
        assert (last.read_bytes(), previous.read_bytes()) == (content, content)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.eqx", "previous.eqx"]


# ---- the configuration: with overrides


def test_what_an_override_changes_is_reported_as_old_and_new():
    old = tiny_config()
    new, changed = with_overrides(
        old,
        [
            "trainer.num_steps=200",
            "optimizer.learning_rate=0.5",
            "optimizer.grad_clip=null",
            "optimizer.schedule=wsd",
            "trainer.precision=bfloat16",
            "mode=offline",
            "wandb.tags=[a,b]",
            "wandb.name='a b'",
            "trainer.batch_size=4",  # as it was
            "seed=0",  # as it was
            "resume=somewhere",
            "hydra.run.dir=elsewhere",
        ],
    )
    assert changed == {
        "trainer.num_steps": (100, 200),
        "optimizer.learning_rate": (old.optimizer.learning_rate, 0.5),
        "optimizer.grad_clip": (1.0, None),
        "optimizer.schedule": ("cosine", "wsd"),
        "trainer.precision": ("float32", "bfloat16"),
        "mode": ("disabled", "offline"),
        "wandb.tags": ([], ["a", "b"]),
        "wandb.name": (old.wandb.name, "a b"),
    }
    before, after = flatten(to_plain(old)), flatten(to_plain(new))
    assert {name for name in before if before[name] != after[name]} == set(changed)
    assert new.mode is Mode.offline and new.trainer.num_steps == 200
    assert old == tiny_config()


def test_no_override_changes_nothing(mha_type: AttentionType):
    old = small_config(f"model.mha_type={mha_type.name}")
    assert with_overrides(old, []) == (old, {})
    assert with_overrides(old, ["resume=somewhere"]) == (old, {})


@pytest.mark.parametrize(
    "override, was",
    [
        ("seed=1", 0),
        ("model.mha_type=selective", "standard"),
        ("model.d_model=8", 4),
        ("model.num_layers=2", 1),
        ("model.num_heads=1", 2),
        ("model.d_ff=8", 4),
        ("model.head_dim=8", None),
        ("model.rope=false", True),
        ("model.rope_theta=1.0", 10000.0),
        ("model.dropout=0.5", 0.0),
        ("model.activation=relu", "gelu"),
        ("model.tie_embeddings=true", False),
        ("model.mla.kv_lora_rank=4", 8),
        ("dataset.seq_len=8", 4),
        ("dataset.val_fraction=0.5", 0.1),
    ],
)
def test_a_change_that_makes_it_another_run_is_refused_naming_field_old_and_new(override: str, was: Any):
    name, value = override.split("=")
    wanted = {"true": "True", "false": "False"}.get(value, value)
    with pytest.raises(ConfigError) as caught:
        with_overrides(tiny_config(), ["trainer.num_steps=200", override])
    message = str(caught.value)
    assert message.startswith(f"{name}: is {was} in that run and cannot become {wanted};"), message
    assert "\n" not in message


@pytest.mark.parametrize(
    "override",
    ["experiment=debug", "+experiment=debug", "experiment=null", "+seed=1", "~seed", "~model.dropout", "+new=1"],
)
def test_what_is_no_single_option_is_refused_beside_resume(override: str):
    with pytest.raises(ConfigError, match="cannot be combined with resume=") as caught:
        with_overrides(tiny_config(), [override])
    assert str(caught.value).startswith(override) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override, words",
    [
        ("trainer.num_stepz=1", "did you mean trainer.num_steps?"),
        ("num_steps=1", "did you mean trainer.num_steps?"),
        ("trainer.num_steps=many", "'many'"),
        ("trainer.num_steps=0", "trainer.num_steps=0: must be at least 1"),
        ("trainer.num_steps=null", "trainer.num_steps"),
        ("trainer.grad_accum_steps=3", "does not divide trainer.batch_size=4"),
        ("mode=onlin", "online"),
        ("trainer=5", "trainer"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate"),
    ],
)
def test_a_wrong_override_is_answered_in_one_line(override: str, words: str):
    with pytest.raises((ConfigError, OmegaConfBaseException)) as caught:
        with_overrides(tiny_config(), [override])
    line = cli.explain(caught.value)
    assert words in line and "\n" not in line


# ---- the configuration: config.yaml is a stranger's data


@pytest.mark.parametrize(
    "changes",
    [[], ["wandb.name='yes: no # é'", "wandb.tags=['1e3','null','on']", "optimizer.grad_clip=null"]],
    ids=["", "hard"],
)
def test_a_saved_configuration_comes_back(changes: list[str], mha_type: AttentionType, tmp_path: Path):
    config = small_config(f"model.mha_type={mha_type.name}", *changes)
    write_config(tmp_path, config)
    assert read_config(tmp_path / "config.yaml") == config


def alias_bomb(width: int, depth: int) -> str:
    """width^depth strings in a few hundred bytes."""
    lines = ["a0: &a0 [x]"]
    for level in range(1, depth):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]")
    return "\n".join(lines) + "\n"


YAML_CASES = {
    "an alias bomb": lambda good: alias_bomb(9, 12),
    "an alias bomb behind a configuration": lambda good: good + alias_bomb(9, 12),
    "an alias bomb in a configuration": lambda good: alias_bomb(9, 12) + good,
    "an alias that is its own list": lambda good: good + "x: &x [*x]\n",
    "a merge of a mapping": lambda good: "x: &x {seed: 1}\n<<: *x\n" + good,
    "an object": lambda good: good + "x: !!python/object/apply:os.mkdir [canary]\n",
    "an object for a setting": lambda good: good.replace("seed: 0", "seed: !!python/object/apply:os.mkdir [canary]"),
    "a Python name": lambda good: good.replace("seed: 0", "seed: !!python/name:os.mkdir"),
    "a target": lambda good: good + "_target_: os.mkdir\npath: canary\n",
    "a target inside": lambda good: good.replace("model:\n", "model:\n  _target_: os.mkdir\n  path: canary\n"),
    "an interpolation": lambda good: good.replace("seed: 0", "seed: ${oc.env:CHARGPT_SECRET}"),
    "an interpolation in a list": lambda good: good.replace("tags: []", "tags: ['${oc.env:CHARGPT_SECRET}']"),
    "an interpolation in a list in a list": lambda good: good.replace("tags: []", "tags: [['${oc.env:CHARGPT_SECRET}']]"),
    "an interpolation in a mapping in a list": lambda good: good.replace("tags: []", "tags: [{a: '${oc.env:CHARGPT_SECRET}'}]"),
    "an interpolation for a name": lambda good: good + "${oc.env:CHARGPT_SECRET}: 1\n",
    "nothing": lambda good: "",
    "an empty mapping": lambda good: "{}",
    "a number": lambda good: "5",
    "a list": lambda good: "- seed: 0",
    "a missing setting": lambda good: good.replace("seed: 0\n", ""),
    "an unknown setting": lambda good: good + "extra: 1\n",
    "a number for a name": lambda good: good + "1: 2\n",
    "null for a name": lambda good: good + "null: 2\n",
    "a list for a name": lambda good: good + "? [a]\n: b\n",
    "an empty whole number": lambda good: good.replace("seed: 0", "seed: !!int ''"),
    "a truth value that is none": lambda good: good.replace("seed: 0", "seed: !!bool perhaps"),
    "a date that is none": lambda good: good.replace("seed: 0", "seed: !!timestamp never"),
    "a date": lambda good: good.replace("seed: 0", "seed: 2020-01-01"),
    "a set": lambda good: good.replace("tags: []", "tags: !!set {a}"),
    "bytes": lambda good: good.replace("tags: []", "tags: [!!binary aGk=]"),
    "two documents": lambda good: good + "---\n" + good,
    "half a mapping": lambda good: good[:40] + "{",
    "a NUL": lambda good: good + "\0",
    "not UTF-8": lambda good: good.encode() + b"\xff\xfe",
    "10,000 brackets": lambda good: "[" * 10_000,
    "10,000 dashes": lambda good: "- " * 10_000,
    "500 brackets": lambda good: good + "x: " + "[" * 500 + "]" * 500 + "\n",
    "500 nested settings": lambda good: good + "\n".join(" " * n + "x:" for n in range(500)) + "\n",
    "5,000 digits": lambda good: good.replace("seed: 0", "seed: " + "9" * 5000),
    "half a million numbers": lambda good: good + "x: [" + "1," * 500_000 + "1]\n",
    "two megabytes": lambda good: good + "#" * (2 << 20) + "\n",
}


@pytest.mark.parametrize("name", YAML_CASES)
def test_a_hostile_configuration_is_refused_in_one_line_and_soon(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CHARGPT_SECRET", "hunter2")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    write_config(tmp_path, tiny_config())
    good = path.read_text()
    bad = YAML_CASES[name](good)
    assert bad != good
    path.write_bytes(bad if isinstance(bad, bytes) else bad.encode())
    kind, message = None, ""
    with time_limit(3.0):
        try:
            read_config(path)
        except Exception as error:  # not left to pytest, which a traceback of a thousand frames can stop
            kind, message = type(error), str(error)[:5000]
    assert kind is ConfigError, message
    assert "\n" not in message and "hunter2" not in message and len(message) < 2000
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


@contextlib.contextmanager
def time_limit(seconds: float):
    """Ends what takes longer, with an exception that nobody catches by accident."""

    class TooLong(BaseException):
        pass

    def too_long(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except TooLong:
        raise AssertionError(f"took more than {seconds} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_folder_without_a_configuration_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="is no run directory") as caught:
        read_config(tmp_path / "config.yaml")
    assert str(tmp_path) in str(caught.value)
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path / "config.yaml")


# ---- restore


def test_restore_says_where_it_goes_on_what_changed_and_what_is_not_bit_exact(run_dir: Path):
    said, versions = [], package_versions()
    write_checkpoint(run_dir, "last", tiny_config(), 30, versions=versions | {"jaxlib": "0.0.1", "left-pad": "1"})
    config, restored = restore(run_dir, ["trainer.num_steps=200"], said.append)
    assert config.trainer.num_steps == 200 and restored[1].step == 30
    assert said == [
        f"resuming {run_dir} at step 30",
        "  trainer.num_steps: 100 -> 200",
        "  the learning-rate schedule is the one of the new length from here on",
        f"  not bit-exact: jaxlib 0.0.1 -> {versions['jaxlib']}",
        "  not bit-exact: left-pad 1 -> None",
    ]


def test_restore_takes_the_configuration_of_the_checkpoint_it_loads(run_dir: Path):
    """Where a last checkpoint is damaged, the one before it may be of another configuration: shapes follow the file."""
    write_checkpoint(run_dir, "previous", tiny_config("optimizer.learning_rate=0.25"), 20, versions={})
    cut_in_half(file_of(run_dir, "last"))
    said: list[str] = []
    config, restored = restore(run_dir, [], said.append)
    assert config.optimizer.learning_rate == 0.25 and restored[1].step == 20
    assert len(said) == 2 and "is damaged" in said[0] and said[1].endswith("at step 20")


def test_restore_of_a_run_without_a_checkpoint_begins_at_its_configuration(tmp_path: Path):
    config, said = tiny_config("optimizer.learning_rate=0.25"), []
    write_config(tmp_path, config)
    found, restored = restore(tmp_path, ["trainer.num_steps=50"], said.append)
    assert restored is None
    assert found == dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, num_steps=50))
    assert said[0] == f"resuming {tmp_path} at step 0 (it had no checkpoint yet)"


def test_restore_refuses_another_shape_before_anything_is_written(run_dir: Path):
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"model\.d_model: is 4 in that run and cannot become 8"):
        restore(run_dir, ["model.d_model=8"], print)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


# ---- the text


@pytest.fixture
def text_run(tmp_path: Path) -> tuple[Path, Path]:
    """(run directory, text) of a run that is complete at step 100, with records."""
    text, run_dir = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(TEXT)
    (run_dir / "checkpoints").mkdir(parents=True)
    config = tiny_config("dataset.name=file", f"dataset.filepath={text}", "trainer.num_steps=100")
    corpus = load_corpus(config.dataset)
    write_config(run_dir, config)
    for n in range(1, 13):
        with open(run_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"trainer/step": 10 * n}) + "\n")
    (run_dir / "samples.txt").write_text("=== step 100\nabc\n\n")
    identity = dict(vocabulary=corpus.tokenizer.vocabulary, corpus_sha256=corpus.sha256, record_sizes=record_sizes(run_dir))
    write_checkpoint(run_dir, "last", config, 100, best_val_loss=1.25, best_step=90, versions=package_versions(), **identity)
    return run_dir, text


def contents(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_complete_run_resumed_says_so_and_changes_nothing(text_run: tuple[Path, Path], capsys: pytest.CaptureFixture):
    run_dir, _ = text_run
    before = contents(run_dir)
    assert resume(run_dir, []) == 1.25
    assert "already complete at step 100" in capsys.readouterr().out
    assert resume(run_dir, ["trainer.num_steps=80"]) == 1.25
    assert contents(run_dir) == before


def test_a_changed_text_is_refused_with_both_hashes_and_changes_nothing(text_run: tuple[Path, Path]):
    run_dir, text = text_run
    old = load_corpus(tiny_config("dataset.name=file", f"dataset.filepath={text}").dataset)
    text.write_text(TEXT.replace("quick", "swift"))
    new = load_corpus(tiny_config("dataset.name=file", f"dataset.filepath={text}").dataset)
    before = contents(run_dir)
    with pytest.raises(ConfigError, match="the text has changed") as caught:
        resume(run_dir, ["trainer.num_steps=200"])
    assert old.sha256[:16] in str(caught.value) and new.sha256[:16] in str(caught.value)
    assert contents(run_dir) == before


def test_the_text_is_known_by_its_content_not_by_its_place(text_run: tuple[Path, Path], tmp_path: Path):
    run_dir, text = text_run
    moved = text.rename(tmp_path / "moved.txt")
    assert resume(run_dir, [f"dataset.filepath={moved}"]) == 1.25


def test_another_vocabulary_is_refused_with_both(text_run: tuple[Path, Path]):
    run_dir, text = text_run
    corpus = load_corpus(tiny_config("dataset.name=file", f"dataset.filepath={text}").dataset)
    header = checkpoint.load(file_of(run_dir, "last"))[1]
    check_corpus(header, corpus)
    with pytest.raises(ConfigError, match="the vocabulary was") as caught:
        check_corpus(dataclasses.replace(header, vocabulary="\nabc"), corpus)
    assert repr("\nabc") in str(caught.value) and repr(corpus.tokenizer.vocabulary) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_training_anew_in_a_directory_that_holds_a_run_is_refused(text_run: tuple[Path, Path]):
    run_dir, _ = text_run
    before = contents(run_dir)
    with pytest.raises(ConfigError, match="already holds a run") as caught:
        train(tiny_config(), run_dir)
    assert f"resume={run_dir}" in str(caught.value)
    assert contents(run_dir) == before


# ---- the records


METRICS = [json.dumps({"trainer/step": n, "train/loss": 4.0 / n, "val/loss": None}) + "\n" for n in range(1, 11)]
HARD_SAMPLES = [
    "=== step 2\n\n\nblank lines\n\n\n\n\n",
    "=== step 4\nin it: === step 9\n\n",
    "=== step 6\nin it\n=== step by step\n=== step 9\n\n=== step 3\n\n\n",
    "=== step 8\n\r\ncarriage\rreturns\r\n\x0c\x1c\u2028\x85é😀\n\n",
    "=== step 10\n\n\n",
]


@pytest.mark.parametrize("kept", range(len(METRICS) + 1))
def test_what_metrics_say_of_later_steps_is_dropped_and_the_rest_kept_byte_for_byte(kept: int, tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(METRICS[:kept]))
    sizes = record_sizes(tmp_path)
    with open(path, "a") as file:
        file.write("".join(METRICS[kept:]) + METRICS[-1][: 10 + kept])  # the last line was cut short by a kill
    cut_records(tmp_path, sizes)
    assert path.read_bytes() == "".join(METRICS[:kept]).encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("kept", range(len(HARD_SAMPLES) + 1))
def test_samples_of_later_steps_are_dropped_and_the_rest_kept_byte_for_byte(kept: int, tmp_path: Path):
    path = tmp_path / "samples.txt"
    path.write_bytes("".join(HARD_SAMPLES[:kept]).encode())
    sizes = record_sizes(tmp_path)
    with open(path, "ab") as file:
        file.write("".join(HARD_SAMPLES[kept:]).encode() + "=== step 12\né😀".encode()[:-2])
    cut_records(tmp_path, sizes)
    assert path.read_bytes() == "".join(HARD_SAMPLES[:kept]).encode()


def test_records_are_cut_back_to_a_checkpoint_that_travels_in_its_header(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text("".join(METRICS[:4]))
    (tmp_path / "samples.txt").write_bytes("".join(HARD_SAMPLES[:2]).encode())
    before = contents(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    write_checkpoint(tmp_path, "last", tiny_config(), 4, record_sizes=record_sizes(tmp_path))
    with open(tmp_path / "metrics.jsonl", "a") as metrics, open(tmp_path / "samples.txt", "a") as samples:
        metrics.write(METRICS[4])
        samples.write(HARD_SAMPLES[2])
    cut_records(tmp_path, load_newest(tmp_path, print)[1].record_sizes)
    assert {name: data for name, data in contents(tmp_path).items() if name != "last.eqx"} == before


def test_records_of_a_run_that_never_saved_are_emptied(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text("".join(METRICS))
    (tmp_path / "samples.txt").write_text("".join(HARD_SAMPLES))
    cut_records(tmp_path, {})
    assert contents(tmp_path) == {"metrics.jsonl": b"", "samples.txt": b""}


def test_records_that_are_not_there_are_not_made(tmp_path: Path):
    assert record_sizes(tmp_path) == {}
    cut_records(tmp_path, {"metrics.jsonl": 100, "samples.txt": 100, "../outside": 0})
    assert list(tmp_path.iterdir()) == []


def test_only_the_records_are_cut_whatever_a_header_names(tmp_path: Path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (tmp_path / "outside").write_text("x")
    (run_dir / "config.yaml").write_text("x")
    cut_records(run_dir, {"../outside": 0, str(tmp_path / "outside"): 0, "config.yaml": 0})
    assert (tmp_path / "outside").read_text() == (run_dir / "config.yaml").read_text() == "x"


def test_metrics_that_lost_their_end_with_the_power_are_left_with_whole_lines(tmp_path: Path):
    """A file shorter than the checkpoint remembers, as an unflushed one can be: what is appended must not join half a line."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(METRICS))
    sizes = record_sizes(tmp_path)
    os.truncate(path, len("".join(METRICS[:7])) + 9)
    cut_records(tmp_path, sizes)
    assert path.read_bytes() == "".join(METRICS[:7]).encode()


# ---- C9: one process at a time


def hold_lock(run_dir: Path) -> "subprocess.Popen[str]":
    """Another process that holds the lock until it is killed."""
    body = f"with lock(Path({str(run_dir)!r})): print('held', flush=True); input()"
    code = f"from pathlib import Path\nfrom chargpt.process import lock\n{body}"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_until_the_first_is_gone_even_by_sigkill(text_run: tuple[Path, Path]):
    run_dir, _ = text_run
    before = contents(run_dir)
    with hold_lock(run_dir) as process:
        for attempt in (lambda: lock(run_dir).__enter__(), lambda: resume(run_dir, []), lambda: train(tiny_config(), run_dir)):
            with pytest.raises(ConfigError, match="another process is training in it") as caught:
                attempt()
            assert str(caught.value).startswith(f"{run_dir}: ") and "\n" not in str(caught.value)
        assert contents(run_dir) == before
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    with lock(run_dir):
        pass
    assert resume(run_dir, []) == 1.25


def test_the_lock_is_free_after_the_block_however_it_ends(tmp_path: Path):
    with contextlib.suppress(ZeroDivisionError), lock(tmp_path):
        raise ZeroDivisionError
    with lock(tmp_path), pytest.raises(ConfigError, match="another process"), lock(tmp_path):
        pass
    with lock(tmp_path):
        pass


def test_a_lock_file_left_behind_holds_nothing(tmp_path: Path):
    (tmp_path / ".lock").write_text("some.host:4711")
    with lock(tmp_path):
        pass


def test_two_directories_do_not_lock_each_other(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with lock(tmp_path / "a"), lock(tmp_path / "b"):
        pass


# ---- P1: signals


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_number_and_nothing_else(number: signal.Signals):
    before = [signal.getsignal(n) for n in SIGNALS]
    with StopSignal() as stop:
        assert stop.number is None
        os.kill(os.getpid(), number)
        assert stop.number == number
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_a_second_sigint_stops_at_once():
    before = [signal.getsignal(n) for n in SIGNALS]
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        pytest.fail("the second SIGINT was swallowed")
    assert [signal.getsignal(n) for n in SIGNALS] == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_may_repeat_its_signal(number: signal.Signals):
    with StopSignal() as stop:
        for _ in range(5):
            os.kill(os.getpid(), number)
        assert stop.number == number


def test_the_first_sigint_after_a_schedulers_signal_still_waits_for_the_save():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT


def test_an_exception_restores_the_handlers_too():
    before = [signal.getsignal(n) for n in SIGNALS]
    with contextlib.suppress(ZeroDivisionError), StopSignal():
        assert [signal.getsignal(n) for n in SIGNALS] != before
        raise ZeroDivisionError
    assert [signal.getsignal(n) for n in SIGNALS] == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_handler_of_the_caller_comes_back_and_a_schedulers_has_its_turn_once_all_is_saved(number: signal.Signals):
    came = []
    before = signal.signal(number, lambda *_: came.append("caller"))
    turn = ["caller"] if number != signal.SIGTERM else []
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), number)
            assert (stop.number, came) == (number, [])
        assert came == turn
        os.kill(os.getpid(), number)
        assert came == [*turn, "caller"]
        with StopSignal():
            os.kill(os.getpid(), signal.SIGINT)
        assert came == [*turn, "caller"]  # it was not its signal
    finally:
        signal.signal(number, before)


def test_a_signal_in_the_middle_of_a_save_waits_for_it(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """The handler sets a flag only: the save goes on, whole, and the old state of the folder is gone."""
    run, fsync = make_run(run_dir, []), os.fsync

    def signal_and_fsync(file: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        fsync(file)

    monkeypatch.setattr(os, "fsync", signal_and_fsync)
    with StopSignal() as stop:
        run.step = 31
        run.state = at_step(run.state, 31)
        run._save("last")
    assert stop.number == signal.SIGTERM
    state, header = load_newest(run_dir, print)
    assert header.step == 31
    found, expected = ([np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(s)] for s in (state, run.state))
    assert found == expected
