"""Start a run, or continue one: the loop and its recorder, from a configuration to the best validation loss."""

from collections.abc import Callable, Sequence
from pathlib import Path

from chargpt.checkpoint import Header
from chargpt.config import Config
from chargpt.corpus import Corpus, load_corpus
from chargpt.errors import ConfigError, RunFailed
from chargpt.parallel import offer_cpu_devices
from chargpt.run import cache
from chargpt.run.console import RunConsole
from chargpt.run.directory import cut_records
from chargpt.run.loop import Loop, NotFinite
from chargpt.run.process import StopSignal, lock
from chargpt.run.recorder import Recorder
from chargpt.run.resume import check_corpus, restore
from chargpt.train import TrainState

# (step, validation loss) at every evaluation: whether to give the run up there
Watch = Callable[[int, float], bool]


def train(config: Config, run_dir: Path, watch: Watch | None = None) -> float:
    """Train the model that `config` describes, leaving everything in `run_dir`; the best validation loss.

    SystemExit with the conventional code (128 + signal) if a signal stopped it; it has saved by then.
    """
    console = RunConsole()
    offer_cpu_devices()
    with lock(run_dir), cache.kept_executables(console.say), StopSignal() as stop:
        if (run_dir / "metrics.jsonl").exists():
            raise ConfigError(
                f"{run_dir}: already holds a run; write resume={run_dir}, or another hydra.run.dir=DIR"
            )
        return drive(config, run_dir, load_corpus(config.dataset), console, stop, watch)


def resume(run_dir: Path, overrides: Sequence[str], watch: Watch | None = None) -> float:
    """Continue the run in `run_dir`, its configuration changed only by `overrides`; otherwise as `train`."""
    console = RunConsole()
    offer_cpu_devices()
    with lock(run_dir), cache.kept_executables(console.say), StopSignal() as stop:
        config, restored = restore(run_dir, overrides, console.say)
        corpus, sizes = load_corpus(config.dataset), {}
        if restored is not None:
            header = restored[1]
            check_corpus(header, corpus)
            if header.step >= config.trainer.num_steps and header.best_val_loss is not None:
                console.say(
                    f"already complete at step {header.step}: write a larger trainer.num_steps to continue"
                )
                return header.best_val_loss
            sizes = header.record_sizes
        cut_records(run_dir, sizes)
        return drive(config, run_dir, corpus, console, stop, watch, restored)


def train_or_resume(config: Config, run_dir: Path, watch: Watch | None = None) -> float:
    """Train in `run_dir`, or continue the run that is there already."""
    begun = (run_dir / "config.yaml").exists()
    return resume(run_dir, [], watch) if begun else train(config, run_dir, watch)


def drive(
    config: Config,
    run_dir: Path,
    corpus: Corpus,
    console: RunConsole,
    stop: StopSignal,
    watch: Watch | None = None,
    restored: tuple[TrainState, Header] | None = None,
) -> float:
    """Run to the end, to a signal, or until `watch` gives up; the best validation loss."""
    loop = Loop(config, corpus, restored)
    recorder = Recorder(loop, run_dir, console)
    pruned = False
    try:
        loop.compile()
        recorder.say_compiled()
        with console.progress(config.trainer.num_steps, loop.step):
            for report in loop.reports(stop.requested):
                recorder.take(report)
                may_stop = report.evaluated and loop.step < config.trainer.num_steps
                if watch is not None and may_stop and watch(loop.step, report.line["val/loss"]):
                    pruned = True
                    break
        exit_code = 0 if stop.number is None else 128 + stop.number
        recorder.finish(exit_code, pruned)
    except NotFinite as error:
        recorder.write_summary()
        recorder.fail()
        last = recorder.checkpoint_path("last")
        kept = (
            f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was written"
        )
        raise RunFailed(f"{error}; {kept}; try a smaller optimizer.learning_rate") from None
    except BaseException:
        recorder.fail()
        raise
    if recorder.unsaved is not None:
        raise RunFailed(
            f"the last checkpoint could not be written ({recorder.unsaved}); free the disk and resume"
        )
    if exit_code:
        raise SystemExit(exit_code)
    if loop.best_val_loss is None:
        raise RunFailed(
            "the validation loss was never a finite number; try a smaller optimizer.learning_rate"
        )
    return loop.best_val_loss
