"""Start a run or continue one: from a configuration to the best validation loss."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from chargpt.config import Config
from chargpt.corpus import load_corpus
from chargpt.errors import RunFailed, require
from chargpt.parallel import offer_cpu_devices
from chargpt.run import cache
from chargpt.run.console import RunConsole
from chargpt.run.directory import cut_records
from chargpt.run.loop import Loop, NotFinite
from chargpt.run.process import StopSignal, lock
from chargpt.run.recorder import Recorder
from chargpt.run.resume import check_corpus, restore

# (step, validation loss) at every evaluation: whether to give the run up there.
Watch = Callable[[int, float], bool]
ADVICE = "try a smaller optimizer.learning_rate"


def train(config: Config, run_dir: Path, watch: Watch | None = None) -> float:
    """Train the model of `config`, leaving everything in `run_dir`; the best validation loss.

    If a signal stops it, it saves and raises SystemExit with the usual code (128 + signal).
    """
    with _process(run_dir) as (console, stop):
        new = not (run_dir / "metrics.jsonl").exists()
        require(new, f"{run_dir}: already holds a run; write resume={run_dir} or hydra.run.dir=DIR")
        loop = Loop(config, load_corpus(config.dataset))
        return _drive(loop, run_dir, console, stop, watch)


def resume(run_dir: Path, overrides: Sequence[str], watch: Watch | None = None) -> float:
    """Continue the run in `run_dir`, changed only by `overrides`; otherwise like `train`."""
    with _process(run_dir) as (console, stop):
        config, restored = restore(run_dir, overrides, console.say)
        corpus, sizes = load_corpus(config.dataset), {}
        if restored is not None:
            header = restored[1]
            check_corpus(header, corpus)
            if header.step >= config.trainer.num_steps and header.best_val_loss is not None:
                choice = "write a larger trainer.num_steps to continue"
                console.say(f"already complete at step {header.step}; {choice}")
                return header.best_val_loss
            sizes = header.record_sizes
        cut_records(run_dir, sizes)
        return _drive(Loop(config, corpus, restored), run_dir, console, stop, watch)


def train_or_resume(config: Config, run_dir: Path, watch: Watch | None = None) -> float:
    """Train in `run_dir`, or continue the run that is already there."""
    if (run_dir / "config.yaml").exists():
        return resume(run_dir, [], watch)
    return train(config, run_dir, watch)


@contextlib.contextmanager
def _process(run_dir: Path) -> Iterator[tuple[RunConsole, StopSignal]]:
    """Console and stop signal of the only process that trains in `run_dir`."""
    console = RunConsole()
    offer_cpu_devices()
    with lock(run_dir), cache.kept_executables(console.say), StopSignal() as stop:
        yield console, stop


def _drive(
    loop: Loop, run_dir: Path, console: RunConsole, stop: StopSignal, watch: Watch | None
) -> float:
    """Run to the end, to a signal, or until `watch` gives up; the best validation loss."""
    recorder = Recorder(loop, run_dir, console)
    num_steps, stopped = loop.config.trainer.num_steps, None
    try:
        loop.compile()
        recorder.say_compiled()
        with console.progress(num_steps, loop.step):
            for report in loop.reports(stop.requested):
                recorder.take(report)
                loss = report.line.get("val/loss")
                if watch and loss is not None and loop.step < num_steps and watch(loop.step, loss):
                    stopped = f"at step {loop.step}: others were better there"
                    break
        exit_code = 0
        if stop.number is not None:
            exit_code, stopped = 128 + stop.number, f"by a signal at step {loop.step}"
        recorder.finish(exit_code, stopped)
    except NotFinite as error:
        recorder.write_summary()
        recorder.fail()
        last = recorder.checkpoint_path("last")
        kept = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint"
        raise RunFailed(f"{error}; {kept}; {ADVICE}") from None
    except BaseException:
        recorder.fail()
        raise
    if recorder.unsaved is not None:
        problem = f"the last checkpoint could not be written ({recorder.unsaved})"
        raise RunFailed(f"{problem}; free the disk and resume")
    if exit_code:
        raise SystemExit(exit_code)
    if loop.best_val_loss is None:
        raise RunFailed(f"the validation loss was never a finite number; {ADVICE}")
    return loop.best_val_loss
