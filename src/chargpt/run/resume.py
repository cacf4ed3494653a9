"""Continuing a run: its configuration and its newest whole checkpoint, and what may not change."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chargpt import checkpoint
from chargpt.compose import change, read_overrides
from chargpt.config import Config, Schedule, options, settings_of
from chargpt.corpus import Corpus
from chargpt.errors import ConfigError, require
from chargpt.parallel import choose_devices
from chargpt.run.directory import read_config
from chargpt.run.machine import package_versions
from chargpt.train import TrainState

CHECKPOINTS = ("last", "previous", "best")  # in this order: the newest whole one is taken


def restore(
    run_dir: Path, overrides: Sequence[str], say: Callable[[str], None]
) -> tuple[Config, tuple[TrainState, checkpoint.Header] | None]:
    """The configuration and the newest whole checkpoint (None: not one yet) of the run in `run_dir`."""
    restored = load_newest(run_dir, say)
    old = read_config(run_dir / "config.yaml") if restored is None else restored[1].config
    config, changed = with_overrides(old, overrides)
    step = 0 if restored is None else restored[1].step
    say(f"resuming {run_dir} at step {step}" + ("" if restored else " (it had no checkpoint yet)"))
    for name, (was, now) in changed.items():
        say(f"  {name}: {was} -> {now}")
    if "trainer.num_steps" in changed and config.optimizer.schedule is not Schedule.constant:
        say("  from here on, the learning-rate schedule is that of the new length")
    if restored is not None:
        versions = package_versions() | {"devices": str(choose_devices(config.trainer))}
        for name, was in restored[1].versions.items():
            if versions.get(name) != was:
                say(f"  not bit-exact: {name} {was} -> {versions.get(name)}")
    return config, restored


def load_newest(
    run_dir: Path, say: Callable[[str], None]
) -> tuple[TrainState, checkpoint.Header] | None:
    """The newest whole checkpoint of a run, None if none was ever written; ConfigError if all are damaged."""
    paths = [
        path for name in CHECKPOINTS if (path := run_dir / "checkpoints" / f"{name}.eqx").exists()
    ]
    for number, path in enumerate(paths):
        try:
            newest = checkpoint.load(path)
        except checkpoint.CheckpointError as error:
            say(f"{error}; trying the one before it")
            continue
        for damaged in paths[
            :number
        ]:  # out of the way: the next save must not keep it as the previous one
            damaged.replace(damaged.with_suffix(".damaged"))
        return newest
    if paths:
        raise ConfigError(
            f"resume={run_dir}: none of its checkpoints is intact; train again with another hydra.run.dir=DIR"
        )
    return None


def with_overrides(
    old: Config, overrides: Sequence[str]
) -> tuple[Config, dict[str, tuple[Any, Any]]]:
    """A run's configuration with the overrides given beside resume=, and what they change: {name: (old, new)}."""
    values = read_overrides(overrides)
    values.pop("resume", None)
    new = change(old, values)
    before, after = settings_of(old), settings_of(new)
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    for name, (was, wanted) in changed.items():
        require(
            not options()[name][1].fixed,
            f"{name}: is {was} in that run and cannot become {wanted}; "
            f"start another run, or leave {name}={was}",
        )
    return new, changed


def check_corpus(header: checkpoint.Header, corpus: Corpus) -> None:
    """Refuse to continue with another text, known by its content, not by its name."""
    if header.corpus_sha256 != corpus.sha256:
        raise ConfigError(
            f"dataset: the text has changed since the run began (sha256 was {header.corpus_sha256[:16]}…, "
            f"is {corpus.sha256[:16]}…); restore it, or start another run"
        )
    if header.vocabulary != corpus.tokenizer.vocabulary:
        raise ConfigError(
            f"dataset: the vocabulary was {header.vocabulary!r}, is {corpus.tokenizer.vocabulary!r}"
        )
