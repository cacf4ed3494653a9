"""Continuing a run: its configuration, its newest intact checkpoint, and what may not change."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chargpt.checkpoint import CheckpointError, Header, file_of, load
from chargpt.compose import change, read_overrides
from chargpt.config import Config, Schedule, changes, options
from chargpt.corpus import Corpus
from chargpt.errors import require
from chargpt.parallel import Devices, choose_devices
from chargpt.run import peers
from chargpt.run.directory import read_config, read_summary
from chargpt.run.machine import numerics
from chargpt.train import TrainState, compute_dtype

CHECKPOINTS = ("last", "previous", "best")  # in this order: the newest intact one is taken


def restore(
    run_dir: Path,
    overrides: Sequence[str],
    say: Callable[[str], None],
    devices: Devices | None = None,
) -> tuple[Config, tuple[TrainState, Header] | None]:
    """The configuration and the newest checkpoint of the run in `run_dir`, None if it has none.

    It is going to train on `devices`, by default those that the configuration asks for.
    """
    restored = load_newest(run_dir, say)
    header = restored[1] if restored else None
    old = header.config if header else read_config(run_dir / "config.yaml")
    config, changed = with_overrides(old, overrides)
    place = f"step {header.step}" if header else "step 0 (it had no checkpoint yet)"
    say(f"resuming {run_dir} at {place}")
    for name, (was, now) in changed.items():
        say(f"  {name}: {was} -> {now}")
    if "trainer.num_steps" in changed and config.optimizer.schedule is not Schedule.constant:
        say("  from here on, the learning-rate schedule is that of the new length")
    devices = choose_devices(config) if devices is None else devices
    versions = numerics(devices, compute_dtype(config.trainer.precision))
    for name, version in (header.versions if header else {}).items():
        if versions.get(name) != version:
            say(f"  not bit-exact: {name} {version} -> {versions.get(name)}")
    return config, restored


def load_newest(run_dir: Path, say: Callable[[str], None]) -> tuple[TrainState, Header] | None:
    """The newest intact checkpoint of a run; None if it has no checkpoint.

    ConfigError if all are damaged.
    """
    paths = [file_of(run_dir, name) for name in CHECKPOINTS]
    damaged = []
    for path in filter(Path.exists, paths):
        try:
            newest = load(path, on_host=True)
        except CheckpointError as error:
            say(f"{error}; trying the one before it")
            damaged.append(path)
            continue
        if peers.is_first():
            for other in damaged:  # so that the next save does not keep it as the previous one
                other.replace(other.with_suffix(".damaged"))
        return newest
    choice = "train again with another hydra.run.dir=DIR"
    require(not damaged, f"resume={run_dir}: none of its checkpoints is intact; {choice}")
    return None


def with_overrides(
    old: Config, overrides: Sequence[str]
) -> tuple[Config, dict[str, tuple[Any, Any]]]:
    """A run's configuration with overrides, and what they change: {name: (old, new)}."""
    values = read_overrides(overrides)
    values.pop("resume", None)
    new = change(old, values).alone()
    changed = changes(old, new)
    for name, (was, wanted) in changed.items():
        problem = f"{name}: is {was} in that run and cannot become {wanted}"
        choice = f"start another run, or leave {name}={was}"
        require(not options()[name][1].fixed, f"{problem}; {choice}")
    return new, changed


def is_complete(run_dir: Path, config: Config, header: Header | None) -> bool:
    """Whether a run has come to its end, and not been killed before it wrote its summary."""
    if header is None or header.best_val_loss is None:
        return False
    if not config.ends_at(header.step, header.best_step):
        return False
    summary = read_summary(run_dir)
    return isinstance(summary, dict) and summary.get("final/step") == header.step


def check_corpus(header: Header, corpus: Corpus) -> None:
    """Refuse to continue with another text, which is known by its content, not by its name."""
    was, now = header.corpus_sha256, corpus.sha256
    problem = f"the text has changed since the run began (sha256 was {was[:16]}…, is {now[:16]}…)"
    require(was == now, f"dataset: {problem}; restore it, or start another run")
    known, found = header.vocabulary, corpus.tokenizer.vocabulary
    require(known == found, f"dataset: the vocabulary was {known!r}, is {found!r}")
