"""Runs that were never trained, as directories and as records, made in moments."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from conftest import filled, small_config

from chargpt.checkpoint import Header, save
from chargpt.compose import change, compose, read_overrides
from chargpt.config import Config
from chargpt.run.directory import Record, write_config
from chargpt.train import init_state

CORPUS = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def named_config(*overrides: str) -> Config:
    """configs/default.yaml with overrides; without a name among them, named after its type."""
    values = read_overrides(overrides)
    name = values.get("wandb.name", values.get("model.mha_type", "standard"))
    return change(compose(), {"wandb.name": name, "wandb.group": name} | values)


def make_run(path: Path, *overrides: str, **record_options: Any) -> Path:
    """A directory with the files of `make_record`."""
    record = make_record(*overrides, path=path, **record_options)
    path.mkdir(parents=True)
    write_config(path, record.config)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in record.metrics))
    (path / "summary.json").write_text(json.dumps(record.summary, indent=2) + "\n")
    steps = record.config.trainer.num_steps
    samples = f"=== step 1\nan old text\n\n=== step {steps}\n{record.sample}\n\n"
    (path / "samples.txt").write_text(samples, encoding="utf-8")
    return path


def make_checkpoint(path: Path, *overrides: str, alphabet: str, scale: float = 0.2) -> Path:
    """A run directory with a small model of random weights, as its best checkpoint."""
    config = small_config(*overrides)
    init = functools.partial(init_state, config, len(alphabet), 0)
    state = filled(eqx.filter_eval_shape(init), scale)
    state = eqx.tree_at(lambda state: state.step, state, jnp.asarray(3, jnp.int32))
    (path / "checkpoints").mkdir(parents=True)
    write_config(path, config)
    (path / "metrics.jsonl").write_text("")
    header = Header(config, alphabet, "0" * 64, 3, 1.0, 2.0, 3, {}, {})
    save(path / "checkpoints" / "best.eqx", state, header)
    return path


def make_record(
    *overrides: str,
    path: Path = Path("run"),
    val_losses: Sequence[float] = (3.0, 2.5, 2.0),
    summary: dict[str, Any] | None = None,
    sample: str = "ROMEO:\nWhat say you?",
) -> Record:
    """A run that reached its end with these validation losses, as `read_run` reads it.

    `summary` changes what is in its summary.
    """
    config = named_config(*overrides)
    changed = summary_of(config, val_losses) | (summary or {})
    return Record(path, config, changed, metrics_of(config, val_losses), sample)


def metrics_of(config: Config, val_losses: Sequence[float]) -> list[dict[str, Any]]:
    """Two lines for each validation loss, evenly over the steps; the second one evaluates."""
    lines: list[dict[str, Any]] = []
    for number, loss in enumerate(val_losses, 1):
        end = config.trainer.num_steps * number // len(val_losses)
        for step in (end - 1, end):
            tokens = step * config.trainer.batch_size * config.dataset.seq_len
            place = {"trainer/step": step, "trainer/tokens": tokens, "trainer/seconds": step / 50}
            lines.append(place | {"train/loss": loss - 0.1, "train/grad_norm": 0.5})
        lines[-1] |= {"val/loss": loss, "val/accuracy": 0.4, "val/bpc": loss / 0.6931}
    return lines


def summary_of(config: Config, val_losses: Sequence[float]) -> dict[str, Any]:
    best = min(range(len(val_losses)), key=val_losses.__getitem__)
    return {
        "best/val_loss": val_losses[best],
        "best/step": config.trainer.num_steps * (best + 1) // len(val_losses),
        "final/val_loss": val_losses[-1],
        "final/step": config.trainer.num_steps,
        "tokens_per_second": 7045.25,
        "decode_tokens_per_second": 3097.5,
        "peak_memory_bytes": 69707352,
        "compile_seconds": 7.5,
        "train_seconds": 39.75,
        "mha_type": config.model.mha_type.name,
        "num_params": 808576,
        "kv_cache_bytes_per_token": 1024,
        "flops_per_token": 5194752.0,
        "device": "cpu (2 cores)",
        "num_devices": 1,
        "dataset": config.dataset.name.name,
        "corpus_sha256": CORPUS,
        "versions": {"python": "3.11.7", "chargpt": "0.1.0", "jax": "0.10.2"},
    }
