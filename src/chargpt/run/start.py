"""Start a run or continue one: from a configuration to the best validation loss."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from chargpt.compose import read_overrides
from chargpt.config import Config, DistributedConfig
from chargpt.corpus import load_corpus
from chargpt.errors import RunFailed, note, require
from chargpt.parallel import offer_cpu_devices
from chargpt.run import cache, peers
from chargpt.run.console import RunConsole
from chargpt.run.directory import cut_records, read_config
from chargpt.run.loop import Loop, NotFinite
from chargpt.run.process import StopSignal, lock
from chargpt.run.recorder import Follower, Recorder
from chargpt.run.resume import check_corpus, restore

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
            corpus = load_corpus(config.dataset)
        peers.check_same(config, corpus.sha256, step=0)
        return _drive(process, Loop(config, corpus))


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
        corpus, sizes, header = load_corpus(config.dataset), {}, None
        if restored is not None:
            header = restored[1]
            check_corpus(header, corpus)
            sizes = header.record_sizes
    peers.check_same(config, corpus.sha256, header.step if header else 0)
    if header and header.step >= config.trainer.num_steps and header.best_val_loss is not None:
        choice = "write a larger trainer.num_steps to continue"
        console.say(f"already complete at step {header.step}; {choice}")
        return header.best_val_loss
    if peers.is_first():
        cut_records(run_dir, sizes)
    return _drive(process, Loop(config, corpus, restored))


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


def _drive(process: Process, loop: Loop) -> float:
    """Run to the end, to a signal, or until `watch` gives up; the best validation loss."""
    run_dir, console, stop, watch = process.run_dir, process.console, process.stop, process.watch
    recorder = Recorder(loop, run_dir, console) if peers.is_first() else Follower(loop)
    num_steps, stopped = loop.config.trainer.num_steps, None
    try:
        loop.compile()
        recorder.say_compiled()
        with console.progress(num_steps, loop.step):
            for report in loop.reports(lambda: peers.asked_to_stop(stop)):
                with loop.stalls.watch("report"):
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
        recorder.fail(error)
        last = run_dir / "checkpoints" / "last.eqx"
        kept = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint"
        raise RunFailed(f"{error}; {kept}; {ADVICE}") from None
    except BaseException as error:
        recorder.fail(error)
        peers.leave_if_alone(error, loop.step)
        raise
    if recorder.unsaved is not None:
        problem = f"the last checkpoint could not be written ({recorder.unsaved})"
        raise RunFailed(f"{problem}; free the disk and resume")
    if exit_code:
        raise SystemExit(exit_code)
    if loop.best_val_loss is None:
        raise RunFailed(f"the validation loss was never a finite number; {ADVICE}")
    return loop.best_val_loss
