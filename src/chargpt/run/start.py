"""Start a run or continue one: from a configuration to the best validation loss."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from chargpt.checkpoint import file_of
from chargpt.compose import read_overrides
from chargpt.config import Config, DistributedConfig
from chargpt.errors import RunFailed, note, require
from chargpt.origin import load_text
from chargpt.parallel import offer_cpu_devices
from chargpt.run import cache, peers
from chargpt.run.console import RunConsole
from chargpt.run.directory import cut_records, read_config
from chargpt.run.loop import Loop, NotFinite, Report, Run, alone
from chargpt.run.process import StopSignal, lock
from chargpt.run.program import Program
from chargpt.run.recorder import Follower, Recorder
from chargpt.run.resume import check_corpus, is_complete, restore

# (step, validation loss) at every evaluation: whether to give the run up there.
Watch = Callable[[int, float], bool]
ADVICE = "try a smaller optimizer.learning_rate"


@dataclasses.dataclass
class Process:
    """This process, one of those that train in `run_dir`."""

    run_dir: Path
    console: RunConsole
    stop: StopSignal
    watch: Watch | None


def train(config: Config, run_dir: Path, watch: Watch | None = None) -> float:
    """Train the model of `config`, leaving everything in `run_dir`; the best validation loss.

    If a signal stops it, it saves and raises SystemExit with the usual code (128 + signal). Several
    processes train in the directory of the first. What started them may start them again with the
    same command: they then continue the run that is there.
    """
    with _process(run_dir, config.distributed, watch) as process:
        config, run_dir = config.alone(), process.run_dir
        if peers.count() > 1 and peers.shared((run_dir / "config.yaml").exists())[0]:
            return _continue(process, [], config)
        with peers.together():
            choice = f"write resume={run_dir} or hydra.run.dir=DIR"
            new = not (run_dir / "metrics.jsonl").exists()
            require(new, f"{run_dir}: already holds a run; {choice}")
            corpus = load_text(config)
        peers.check_same(config, corpus.sha256, step=0)
        return _drive(process, *alone(Program(config, corpus), config))


def resume(run_dir: Path, overrides: Sequence[str], watch: Watch | None = None) -> float:
    """Continue the run in `run_dir`, changed only by `overrides`; otherwise like `train`."""
    options = DistributedConfig.of(read_overrides(overrides))
    with _process(run_dir, options, watch) as process:
        return _continue(process, overrides)


def train_or_resume(config: Config, run_dir: Path, watch: Watch | None = None) -> float:
    """Train in `run_dir`, or continue the run that is already there."""
    if (run_dir / "config.yaml").exists():
        return resume(run_dir, [], watch)
    return train(config, run_dir, watch)


def _continue(process: Process, overrides: Sequence[str], expected: Config | None = None) -> float:
    """Continue the run in the directory, which must be of the configuration `expected`, if any."""
    run_dir, console = process.run_dir, process.console
    with peers.together():
        if expected is not None:
            old = dataclasses.replace(read_config(run_dir / "config.yaml"), mode=expected.mode)
            problem = "holds a run of another configuration; write hydra.run.dir=DIR"
            require(old == expected, f"{run_dir}: {problem}")
        config, restored = restore(run_dir, overrides, console.say)
        header = restored[1] if restored else None
        corpus = load_text(config, header.vocabulary if header else None)
        if header is not None:
            check_corpus(header, corpus)
    peers.check_same(config, corpus.sha256, header.step if header else 0)
    if peers.shared(is_complete(run_dir, config, header))[0]:
        assert header is not None and header.best_val_loss is not None
        choice = "write a larger trainer.num_steps to continue"
        if header.step < config.trainer.num_steps:
            choice = "write trainer.patience=null to continue"
        console.say(f"already complete at step {header.step}; {choice}")
        return header.best_val_loss
    if peers.is_first():
        cut_records(run_dir, header.record_sizes if header else {})
    return _drive(process, *alone(Program(config, corpus), config, restored))


@contextlib.contextmanager
def _process(run_dir: Path, options: DistributedConfig, watch: Watch | None) -> Iterator[Process]:
    """This process once it has met the others, if any; the first one alone holds `run_dir`."""
    offer_cpu_devices()
    peers.join(options, note)
    console, own = RunConsole(quiet=not peers.is_first()), run_dir
    run_dir = Path(peers.shared(str(run_dir))[0])
    if run_dir != own:
        with contextlib.suppress(OSError):
            own.rmdir()  # made by Hydra, and empty
    with contextlib.ExitStack() as held:
        with peers.together():
            if peers.is_first():
                held.enter_context(lock(run_dir))
        held.enter_context(cache.kept_executables(console.say))
        yield Process(run_dir, console, held.enter_context(StopSignal()), watch)


def _drive(process: Process, loop: Loop, run: Run) -> float:
    """Run to the end, to a signal, or until `watch` gives up; the best validation loss."""
    console, stop = process.console, process.stop
    recorder = Recorder(run, process.run_dir, console) if peers.is_first() else Follower(run)
    stopped = None
    try:
        loop.compile()
        recorder.say_compiled()
        with console.progress(run.config.trainer.num_steps, run.step):
            for _, report in loop.reports(lambda: peers.asked_to_stop(stop)):
                if isinstance(report, NotFinite):
                    raise report
                with loop.stalls.watch("report"):
                    recorder.take(report)
                if gives_up(process.watch, run, report):
                    stopped = GAVE_UP.format(run.step)
                    break
        exit_code = 0
        if stop.number is not None:
            exit_code, stopped = 128 + stop.number, BY_SIGNAL.format(run.step)
        recorder.finish(exit_code, stopped)
    except NotFinite as error:
        raise not_finite(recorder, process.run_dir, error) from None
    except BaseException as error:
        recorder.fail(error)
        peers.leave_if_alone(error, run.step)
        raise
    return result(recorder, exit_code)


GAVE_UP = "at step {}: others were better there"
BY_SIGNAL = "by a signal at step {}"


def gives_up(watch: Watch | None, run: Run, report: Report) -> bool:
    """Whether `watch` says so, of a run that is not at its end."""
    loss = report.line.get("val/loss")
    return bool(watch and loss is not None and not report.is_last and watch(run.step, loss))


def not_finite(recorder: Follower, run_dir: Path, error: NotFinite) -> RunFailed:
    """End the records of a run that diverged; what to raise."""
    recorder.fail(error)
    last = file_of(run_dir, "last")
    kept = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint"
    return RunFailed(f"{error}; {kept}; {ADVICE}")


def result(recorder: Follower, exit_code: int = 0) -> float:
    """The best validation loss of a run whose records are complete; RunFailed if they are not.

    SystemExit if a signal has stopped it, which `exit_code` then says.
    """
    if recorder.unsaved is not None:
        problem = f"the last checkpoint could not be written ({recorder.unsaved})"
        raise RunFailed(f"{problem}; free the disk and resume")
    if exit_code:
        raise SystemExit(exit_code)
    loss = recorder.run.best_val_loss
    if loss is None:
        raise RunFailed(f"the validation loss was never a finite number; {ADVICE}")
    return loss
