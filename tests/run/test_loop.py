"""The loop without a recorder: what it reports and when; it leaves nothing behind."""

from pathlib import Path

import numpy as np
import pytest
from conftest import small_config

from chargpt.corpus import Corpus, load_corpus
from chargpt.run.loop import Loop, Report, Run, alone
from chargpt.run.program import Program

TRAINER = {
    "num_steps": 8,
    "log_every": 1,  # every chunk has one step: one compilation
    "eval_every": 4,
    "checkpoint_every": 3,
    "eval_tokens": 64,
    "sample_chars": 5,
}
CONFIG = small_config(
    "model.num_layers=1", *(f"trainer.{name}={value}" for name, value in TRAINER.items())
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(CONFIG.dataset)


def one_run(corpus: Corpus) -> tuple[Loop, Run]:
    loop, run = alone(Program(CONFIG, corpus), CONFIG)
    loop.compile()
    return loop, run


def test_a_loop_needs_no_recorder_and_writes_and_shows_nothing(
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    loop, run = one_run(corpus)
    losses = []
    for _, report in loop.reports():
        assert isinstance(report, Report)
        losses.append(report.line["train/loss"])
        assert report.line["trainer/step"] == len(losses)
        assert report.evaluated == (len(losses) in (4, 8))
        assert len(report.sample) == (5 if report.evaluated else 0)
    assert len(losses) == 8 and np.isfinite(losses).all()
    assert run.best_val_loss is not None and run.best_step in (4, 8)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_report_asks_for_checkpoints_while_the_state_is_that_of_its_step(corpus: Corpus) -> None:
    loop, run = one_run(corpus)
    saves = {}
    for _, report in loop.reports():
        assert isinstance(report, Report)
        if report.saves:
            assert run.state is not None
            assert report.line["trainer/step"] == int(run.state.step) == run.step
            saves[run.step] = report.saves
            assert report.is_best == ("best" in report.saves) == (run.best_step == run.step)
    assert list(saves) == [3, 4, 6, 8]
    assert saves[3] == saves[6] == ("last",) and saves[4] == ("last", "best")


def test_a_loop_that_is_stopped_reports_the_current_step_and_asks_to_save_it(
    corpus: Corpus,
) -> None:
    loop, run = one_run(corpus)
    seen: list[int | float] = []
    for _, report in loop.reports(stop=lambda: bool(seen)):
        assert isinstance(report, Report)
        seen.append(report.line["trainer/step"])
    assert seen == [1, 2]
    assert (
        report.saves == ("last",)
        and loop.states is not None
        and run.step == int(loop.states.step) == 2
    )
    assert list(loop.reports(stop=lambda: True)) == []
