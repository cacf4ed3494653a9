"""The loop without a recorder: what it reports and when; it leaves nothing behind."""

from pathlib import Path

import numpy as np
import pytest
from conftest import small_config

from chargpt.corpus import Corpus, load_corpus
from chargpt.run.directory import read_run
from chargpt.run.loop import Loop, Report, Run, alone
from chargpt.run.program import Program
from chargpt.run.start import resume, train

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


def test_a_run_without_a_new_best_ends_early_as_at_its_end_and_can_be_taken_up_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = ["optimizer.learning_rate=1e-30", "trainer.eval_every=2", "trainer.patience=2"]
    trainer = [f"trainer.{name}={value}" for name, value in TRAINER.items()]
    config = small_config("model.num_layers=1", "mode=disabled", *trainer, *lost)
    loss = train(config, tmp_path)
    out = capsys.readouterr().out
    assert "at step 6: no new best in 2 evaluations" in out and "trainer.patience=null" in out
    run = read_run(tmp_path)
    assert run.finished and run.best_loss == loss
    assert (run.summary["best/step"], run.summary["final/step"]) == (2, 6)
    assert run.summary["decode_tokens_per_second"] > 0
    assert resume(tmp_path, []) == loss
    said = capsys.readouterr().out
    assert "already complete at step 6; write trainer.patience=null to continue" in said
    resume(tmp_path, ["trainer.patience=null"])
    assert read_run(tmp_path).summary["final/step"] == 8 and read_run(tmp_path).finished


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
