"""chargpt: character-level GPTs with interchangeable attention types, in JAX and Equinox.

    run = chargpt.train("model.mha_type=mla", "trainer.num_steps=200")
    run = chargpt.load("outputs/2026-01-01/12-00-00_mla")
    print(run.sample("HAMLET:"))

Importing the package switches on the runtime shape checker for the modules that handle arrays:
beartype verifies their jaxtyping annotations when a function is traced, so a compiled training step
pays nothing for it. The other modules do without it, and without JAX, so that a mistyped option is
answered at once.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from jaxtyping import install_import_hook

if TYPE_CHECKING:
    from chargpt.run.trained import TrainedRun

CHECKED = (
    "attention",
    "checkpoint",
    "corpus",
    "experts",
    "feed_forward",
    "generate",
    "model",
    "optimizer",
    "play.look",
    "positions",
    "train",
    "run.evaluate",
    "run.program",
)

install_import_hook([f"chargpt.{name}" for name in CHECKED], "beartype.beartype")


def train(*overrides: str, run_dir: str | Path | None = None) -> "TrainedRun":
    """Train as `chargpt train OVERRIDES` does; the run, with the model of its best checkpoint.

    `run_dir` is a new directory, by default one in outputs/, as for runs of the command line.
    """
    from chargpt.run import trained  # with JAX

    return trained.train(overrides, run_dir)


def load(run: str | Path | None = None, checkpoint: str = "best") -> "TrainedRun":
    """A run directory, by default the newest, with its model of the `best` or `last` checkpoint."""
    from chargpt.run import trained

    return trained.load(run, checkpoint)


class _Package(ModuleType):
    """`chargpt.train` stays the function above when the module chargpt/train.py is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "train" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
