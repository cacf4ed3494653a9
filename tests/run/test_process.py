"""A run and its process: one process per directory, and what a signal asks for."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_checkpoint import assert_same_bits, make_recorder, save_next

from chargpt import checkpoint
from chargpt.errors import ConfigError
from chargpt.run.process import StopSignal, lock
from chargpt.run.resume import load_newest

# ---- one process at a time


def hold_lock(run_dir: Path) -> "subprocess.Popen[str]":
    """Another process that holds the lock until it is killed."""
    imports = "from pathlib import Path\nfrom chargpt.run.process import lock"
    body = f"with lock(Path({str(run_dir)!r})): print('held', flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{imports}\n{body}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


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


# ---- signals


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_number_and_nothing_else(number: signal.Signals):
    before = [signal.getsignal(n) for n in SIGNALS]
    with StopSignal() as stop:
        assert stop.number is None and not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.number == number and stop.requested()
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
def test_the_callers_handler_is_restored_and_a_schedulers_is_called_when_all_is_saved(
    number: signal.Signals,
):
    came = []
    before = signal.signal(number, lambda *_: came.append("caller"))
    called_after = ["caller"] if number != signal.SIGTERM else []
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), number)
            assert (stop.number, came) == (number, [])
        assert came == called_after
        os.kill(os.getpid(), number)
        assert came == [*called_after, "caller"]
        with StopSignal():
            os.kill(os.getpid(), signal.SIGINT)
        assert came == [*called_after, "caller"]  # SIGINT is not a scheduler's signal
    finally:
        signal.signal(number, before)


def test_a_signal_in_the_middle_of_a_save_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The handler only sets a flag: the save is completed."""
    recorder, fsync = make_recorder(tmp_path, []), os.fsync
    save_next(recorder, "last")

    def signal_and_fsync(file: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        fsync(file)

    monkeypatch.setattr(os, "fsync", signal_and_fsync)
    with StopSignal() as stop:
        save_next(recorder, "last")
    assert stop.number == signal.SIGTERM
    assert load_newest(tmp_path, print)[1].step == 2
    state, _ = checkpoint.load(tmp_path / "checkpoints" / "last.eqx")
    assert_same_bits(state, recorder.run.state)
