"""Going on with a run: its directory, its configuration, its newest whole checkpoint, its records cut back to that step."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from chargpt import checkpoint
from chargpt.config import Config, ConfigError, Schedule, flatten, parse, to_plain
from chargpt.corpus import Corpus
from chargpt.machine import package_versions
from chargpt.parallel import choose_devices
from chargpt.records import read_config
from chargpt.train import TrainState

RECORDS = ("metrics.jsonl", "samples.txt")
CHECKPOINTS = ("last", "previous", "best")  # in this order: the newest whole one is taken
# What would make it another run: the model, the text, the randomness, the state of the optimizer.
FIXED = (
    "model.",
    "dataset.seq_len",
    "dataset.sampling",
    "dataset.val_fraction",
    "optimizer.name",
    "optimizer.ema_decay",
    "seed",
)


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
        say("  the learning-rate schedule is the one of the new length from here on")
    if restored is not None:
        versions = package_versions() | {"devices": str(choose_devices(config.trainer))}
        for name, was in restored[1].versions.items():
            if versions.get(name) != was:
                say(f"  not bit-exact: {name} {was} -> {versions.get(name)}")
    return config, restored


def load_newest(run_dir: Path, say: Callable[[str], None]) -> tuple[TrainState, checkpoint.Header] | None:
    """The newest whole checkpoint of a run, None where none was ever written; ConfigError where all are damaged."""
    paths = [path for name in CHECKPOINTS if (path := run_dir / "checkpoints" / f"{name}.eqx").exists()]
    for number, path in enumerate(paths):
        try:
            newest = checkpoint.load(path)
        except checkpoint.CheckpointError as error:
            say(f"{error}; trying the one before it")
            continue
        for damaged in paths[:number]:  # out of the way: the next save must not keep it as the previous one
            damaged.replace(damaged.with_suffix(".damaged"))
        return newest
    if paths:
        raise ConfigError(f"resume={run_dir}: no checkpoint there is whole; train anew with another hydra.run.dir=DIR")
    return None


def with_overrides(old: Config, overrides: Sequence[str]) -> tuple[Config, dict[str, tuple[Any, Any]]]:
    """A run's configuration with the overrides given beside resume=, and what they change: {name: (old, new)}."""
    composed = OmegaConf.structured(old)
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        name = override.key_or_group
        if name == "resume" or name.startswith("hydra."):
            continue
        if name == "experiment" or override.is_delete() or override.is_add():
            raise ConfigError(f"{override.input_line}: cannot be combined with resume=; give single options")
        OmegaConf.update(composed, name, override.value(), merge=True)
    new = parse(composed)
    before, after = flatten(to_plain(old)), flatten(to_plain(new))
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    changed.pop("resume", None)
    for name, (was, wanted) in changed.items():
        if name.startswith(FIXED):
            raise ConfigError(
                f"{name}: is {was} in that run and cannot become {wanted}; start another run, or leave {name}={was}"
            )
    return new, changed


def check_corpus(header: checkpoint.Header, corpus: Corpus) -> None:
    """Refuse to go on with another text: it is known by its content, never by its name."""
    if header.corpus_sha256 != corpus.sha256:
        raise ConfigError(
            f"dataset: the text has changed since the run began (sha256 was {header.corpus_sha256[:16]}…, "
            f"is {corpus.sha256[:16]}…); restore it, or start another run"
        )
    if header.vocabulary != corpus.tokenizer.vocabulary:
        raise ConfigError(f"dataset: the vocabulary was {header.vocabulary!r}, is {corpus.tokenizer.vocabulary!r}")


def cut_records(run_dir: Path, sizes: dict[str, int]) -> None:
    """Cut metrics.jsonl and samples.txt back to what they were at a checkpoint: what came after is trained again."""
    for name in RECORDS:
        path = run_dir / name
        if path.exists():
            size = sizes.get(name, 0)
            if path.stat().st_size < size:  # its end went with the power: no half line for the next one to join
                size = path.read_bytes().rfind(b"\n") + 1
            os.truncate(path, size)


def record_sizes(run_dir: Path) -> dict[str, int]:
    """Bytes of every record of a run, as a checkpoint keeps them."""
    return {name: (run_dir / name).stat().st_size for name in RECORDS if (run_dir / name).exists()}
