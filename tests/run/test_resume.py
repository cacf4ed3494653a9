"""Resuming a run: which checkpoint, which configuration, which text, which records."""

import dataclasses
import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import small_config
from test_checkpoint import (
    VOCABULARY,
    at_step,
    make_header,
    make_recorder,
    random_state,
    tiny_config,
)
from test_process import hold_lock

from chargpt import checkpoint
from chargpt.checkpoint import file_of
from chargpt.config import AttentionType, Config, Mode, settings_of
from chargpt.corpus import load_corpus
from chargpt.errors import ConfigError
from chargpt.run.directory import cut_records, record_sizes, write_config
from chargpt.run.machine import package_versions, processor
from chargpt.run.process import lock
from chargpt.run.resume import check_corpus, load_newest, restore, with_overrides
from chargpt.run.start import resume, train, train_or_resume

TEXT = "the quick brown fox jumps over the lazy dog\n" * 20


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with three intact checkpoints: last at step 30, previous at 20, best at 10."""
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    config = tiny_config()
    write_config(run_dir, config)
    for name, step in (("last", 30), ("previous", 20), ("best", 10)):
        write_checkpoint(run_dir, name, config, step)
    return run_dir


def write_checkpoint(run_dir: Path, name: str, config: Config, step: int, **changes: Any) -> None:
    """A checkpoint of that step, its vocabulary that in `changes` or that of the other tests."""
    header = make_header(config, step=step, **changes)
    state = random_state(config, vocabulary=header.vocabulary)
    checkpoint.save(file_of(run_dir, name), at_step(state, step), header)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file except the lock, by its path in the folder."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(data)


def not_a_checkpoint(path: Path) -> None:
    path.write_bytes(b"\x80\x04cos\nsystem")


# ---- the newest intact checkpoint


def test_the_newest_is_taken_silently(run_dir: Path):
    said: list[str] = []
    state, header = load_newest(run_dir, said.append)
    assert (header.step, int(state.step), said) == (30, 30, [])


@pytest.mark.parametrize(
    "damage", [cut_in_half, flip_a_bit, not_a_checkpoint, lambda path: path.write_bytes(b"")]
)
def test_damage_is_reported_in_one_line_and_the_checkpoint_before_is_taken(
    damage: Callable[[Path], None], run_dir: Path
):
    said: list[str] = []
    last, previous, best = (file_of(run_dir, name) for name in ("last", "previous", "best"))
    damage(last)
    assert load_newest(run_dir, said.append)[1].step == 20
    assert len(said) == 1 and said[0].startswith(f"{last}: ") and said[0].isprintable()
    assert "is damaged" in said[0]
    said.clear()
    if not last.exists():  # it has been set aside
        not_a_checkpoint(last)
    damage(previous)
    assert load_newest(run_dir, said.append)[1].step == 10
    assert [line.split(": ")[0] for line in said] == [str(last), str(previous)]
    assert all(line.isprintable() for line in said)
    assert best.exists()


def test_missing_checkpoints_are_skipped(run_dir: Path):
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
    with pytest.raises(ConfigError, match="none of its checkpoints is intact") as caught:
        load_newest(run_dir, said.append)
    assert str(run_dir) in str(caught.value) and "\n" not in str(caught.value)
    assert len(said) == 3


def test_a_forged_checkpoint_is_skipped_like_a_damaged_one(run_dir: Path):
    said: list[str] = []
    write_checkpoint(run_dir, "last", tiny_config(), 30, vocabulary=VOCABULARY + "x")
    data = file_of(run_dir, "last").read_bytes()[:-32].replace(rb"\ud83d\ude00x", rb"\ud83d\ude00")
    file_of(run_dir, "last").write_bytes(data + hashlib.sha256(data).digest())
    assert load_newest(run_dir, said.append)[1].step == 20
    assert len(said) == 1 and "model.embedding" in said[0]


def test_a_damaged_last_checkpoint_never_replaces_the_intact_one_before_it(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    """A run that fell back to an older checkpoint still has it if its next save is killed."""
    cut_in_half(file_of(run_dir, "last"))
    file_of(run_dir, "best").unlink()
    assert restore(run_dir, [], print)[1][1].step == 20
    recorder = make_recorder(run_dir, [])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        recorder._save("last")
    assert load_newest(run_dir, lambda _: None)[1].step == 20


# ---- the configuration


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
        "trainer.precision": (None, "bfloat16"),
        "mode": ("disabled", "offline"),
        "wandb.tags": ([], ["a", "b"]),
        "wandb.name": (old.wandb.name, "a b"),
    }
    before, after = settings_of(old), settings_of(new)
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
def test_a_change_that_makes_it_another_run_is_refused_with_field_old_and_new(
    override: str, was: Any
):
    name, value = override.split("=")
    wanted = {"true": "True", "false": "False"}.get(value, value)
    with pytest.raises(ConfigError) as caught:
        with_overrides(tiny_config(), ["trainer.num_steps=200", override])
    message = str(caught.value)
    assert message.startswith(f"{name}: is {was} in that run and cannot become {wanted};"), message
    assert "\n" not in message


@pytest.mark.parametrize(
    "override",
    [
        "experiment=debug",
        "+experiment=debug",
        "experiment=null",
        "+seed=1",
        "~seed",
        "~model.dropout",
        "+new=1",
    ],
)
def test_only_single_options_can_be_combined_with_resume(override: str):
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
def test_an_invalid_override_is_refused_in_one_line(override: str, words: str):
    with pytest.raises(ConfigError) as caught:
        with_overrides(tiny_config(), [override])
    assert words in str(caught.value) and "\n" not in str(caught.value)


# ---- restore


def test_restore_reports_the_step_what_changed_and_what_is_not_bit_exact(run_dir: Path):
    said, versions = [], package_versions()
    old = versions | {"jaxlib": "0.0.1", "processor": "8086", "left-pad": "1"}
    write_checkpoint(run_dir, "last", tiny_config(), 30, versions=old)
    config, restored = restore(run_dir, ["trainer.num_steps=200"], said.append)
    assert config.trainer.num_steps == 200 and restored[1].step == 30
    assert said == [
        f"resuming {run_dir} at step 30",
        "  trainer.num_steps: 100 -> 200",
        "  from here on, the learning-rate schedule is that of the new length",
        f"  not bit-exact: jaxlib 0.0.1 -> {versions['jaxlib']}",
        f"  not bit-exact: processor 8086 -> {processor()}",
        "  not bit-exact: left-pad 1 -> None",
    ]


def test_restore_takes_the_configuration_of_the_checkpoint_it_loads(run_dir: Path):
    """Not that of a damaged last checkpoint, if the one before it has another configuration."""
    other = tiny_config("optimizer.learning_rate=0.25")
    write_checkpoint(run_dir, "previous", other, 20, versions={})
    cut_in_half(file_of(run_dir, "last"))
    said: list[str] = []
    config, restored = restore(run_dir, [], said.append)
    assert config.optimizer.learning_rate == 0.25 and restored[1].step == 20
    assert len(said) == 2 and "is damaged" in said[0] and said[1].endswith("at step 20")


def test_restore_of_a_run_without_a_checkpoint_takes_its_saved_configuration(tmp_path: Path):
    config, said = tiny_config("optimizer.learning_rate=0.25"), []
    write_config(tmp_path, config)
    found, restored = restore(tmp_path, ["trainer.num_steps=50"], said.append)
    assert restored is None
    expected = dataclasses.replace(config.trainer, num_steps=50)
    assert found == dataclasses.replace(config, trainer=expected)
    assert said[0] == f"resuming {tmp_path} at step 0 (it had no checkpoint yet)"


def test_restore_refuses_another_model_before_anything_is_written(run_dir: Path):
    before = contents(run_dir)
    with pytest.raises(ConfigError, match=r"model\.d_model: is 4 in that run and cannot become 8"):
        restore(run_dir, ["model.d_model=8"], print)
    assert contents(run_dir) == before


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
    lines = [json.dumps({"trainer/step": 10 * n}) + "\n" for n in range(1, 13)]
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    (run_dir / "samples.txt").write_text("=== step 100\nabc\n\n")
    write_checkpoint(
        run_dir,
        "last",
        config,
        100,
        best_val_loss=1.25,
        best_step=90,
        versions=package_versions(),
        vocabulary=corpus.tokenizer.vocabulary,
        corpus_sha256=corpus.sha256,
        record_sizes=record_sizes(run_dir),
    )
    return run_dir, text


def test_resuming_a_complete_run_says_so_and_changes_nothing(
    text_run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
):
    run_dir, _ = text_run
    assert resume(run_dir, []) == 1.25  # it was killed before it had written its summary
    assert "already complete" not in capsys.readouterr().out
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["final/step"], summary["best/val_loss"]) == (100, 1.25)
    before = contents(run_dir)
    assert resume(run_dir, []) == 1.25
    assert "already complete at step 100" in capsys.readouterr().out
    assert resume(run_dir, ["trainer.num_steps=80"]) == 1.25
    assert train_or_resume(tiny_config(), run_dir) == 1.25
    assert contents(run_dir) == before


def test_a_changed_text_is_refused_with_both_hashes_and_changes_nothing(
    text_run: tuple[Path, Path],
):
    run_dir, text = text_run
    old = load_corpus(tiny_config("dataset.name=file", f"dataset.filepath={text}").dataset)
    text.write_text(TEXT.replace("quick", "swift"))
    new = load_corpus(tiny_config("dataset.name=file", f"dataset.filepath={text}").dataset)
    before = contents(run_dir)
    with pytest.raises(ConfigError, match="the text has changed") as caught:
        resume(run_dir, ["trainer.num_steps=200"])
    assert old.sha256[:16] in str(caught.value) and new.sha256[:16] in str(caught.value)
    assert contents(run_dir) == before


def test_the_text_is_known_by_its_content_not_by_its_path(
    text_run: tuple[Path, Path], tmp_path: Path
):
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
    message = str(caught.value)
    assert repr("\nabc") in message and repr(corpus.tokenizer.vocabulary) in message
    assert "\n" not in message


def test_training_in_a_directory_that_already_holds_a_run_is_refused(text_run: tuple[Path, Path]):
    run_dir, _ = text_run
    before = contents(run_dir)
    with pytest.raises(ConfigError, match="already holds a run") as caught:
        train(tiny_config(), run_dir)
    assert f"resume={run_dir}" in str(caught.value)
    assert contents(run_dir) == before


# ---- the records


def test_records_are_cut_back_to_the_sizes_in_the_header_of_a_checkpoint(tmp_path: Path):
    metrics, samples = tmp_path / "metrics.jsonl", tmp_path / "samples.txt"
    metrics.write_text('{"trainer/step": 2}\n{"trainer/step": 4}\n')
    samples.write_text("=== step 4\nabc\n\n")
    before = contents(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    write_checkpoint(tmp_path, "last", tiny_config(), 4, record_sizes=record_sizes(tmp_path))
    for path in (metrics, samples):
        with open(path, "a") as file:
            file.write('{"trainer/step": 6}\n')
    cut_records(tmp_path, load_newest(tmp_path, print)[1].record_sizes)
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before


# ---- one process at a time


def test_a_second_process_is_refused_until_the_first_is_gone_even_by_sigkill(
    text_run: tuple[Path, Path],
):
    run_dir, _ = text_run
    before = contents(run_dir)
    with hold_lock(run_dir) as process:
        for attempt in (
            lambda: lock(run_dir).__enter__(),
            lambda: resume(run_dir, []),
            lambda: train(tiny_config(), run_dir),
        ):
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
