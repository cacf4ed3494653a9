"""Runs from Python: what `chargpt.train` and `chargpt.load` return."""

from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL

import chargpt
from chargpt.errors import ConfigError
from chargpt.run.trained import TrainedRun

STEPS = ["trainer.num_steps=4", "trainer.eval_every=2", "trainer.eval_tokens=256"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    return chargpt.train("model.mha_type=mqa", *SMALL, *STEPS, run_dir=run_dir)


def test_training_returns_the_run_with_its_best_model(trained: TrainedRun) -> None:
    record = trained.record
    assert record.finished and record.config.model.mha_type.name == "mqa"
    assert [line["trainer/step"] for line in record.evaluations] == [2, 4]
    assert trained.header.step == record.summary["best/step"]


def test_text_continues_the_prompt_and_follows_from_the_seed(trained: TrainedRun) -> None:
    text = trained.sample("HAMLET:", num_chars=20, seed=1)
    assert text.startswith("HAMLET:") and len(text) == 27
    assert trained.sample("HAMLET:", num_chars=20, seed=1) == text
    assert trained.sample("HAMLET:", num_chars=20, seed=2) != text


def test_attention_weights_are_those_of_every_layer_and_head(trained: TrainedRun) -> None:
    weights = trained.attention_weights("To be")
    assert weights is not None and weights.shape == (2, 4, 5, 5)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    assert np.triu(weights, 1).max() == 0


def test_loading_takes_a_directory_or_the_newest_run(
    trained: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trained.record.path
    assert chargpt.load(path, "last").header.step == 4
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"there is none in outputs/ or multirun/"):
        chargpt.load()
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "run").symlink_to(path)
    for checkpoint in ("best", "last"):
        found = chargpt.load("outputs/run", checkpoint)
        assert found.record.summary == trained.record.summary


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: run.sample("#"), "not in the vocabulary: '#'"),
        (lambda run: run.attention_weights("x" * 17), "write a shorter one"),
        (lambda run: chargpt.load(run.record.path, "newest"), "write one of best, last"),
        (lambda run: chargpt.train("model.mha_typ=mla"), "did you mean model.mha_type"),
        (lambda run: chargpt.train(*SMALL, run_dir=run.record.path), "already holds a run"),
    ],
)
def test_bad_input_is_one_clear_line(trained: TrainedRun, call, message: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]+$") as error:
        call(trained)
    assert message in str(error.value)


def test_the_module_of_the_training_step_and_the_function_share_a_name() -> None:
    from chargpt.train import train_step

    assert callable(chargpt.train) and callable(train_step)
