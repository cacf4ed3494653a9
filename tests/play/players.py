"""Models with random weights, ready to write."""

import functools
import tempfile
from pathlib import Path

from fake_runs import make_checkpoint

import chargpt
from chargpt.play.engine import Player
from chargpt.run.sample import SampleOptions, continue_text

ALPHABET = "\n !,.ABCDEFGabcdefghijklmnopqrstuvwxyz"
CONTEXT = 16
PROMPT = "GABE bad"  # half a context, as is read again: less to compile


@functools.cache
def make_player(mha_type: str, *overrides: str, alphabet: str = ALPHABET) -> Player:
    """Weights so large that what comes next depends on the whole context, and no two logits tie."""
    kind = f"model.mha_type={mha_type}", "model.num_layers=1"
    with tempfile.TemporaryDirectory() as folder:
        run = make_checkpoint(Path(folder) / "run", *kind, *overrides, alphabet=alphabet, scale=0.5)
        return Player(mha_type, chargpt.load(run))


def alone(player: Player, options: SampleOptions) -> str:
    """What `chargpt sample` writes."""
    return "".join(text for (text,) in continue_text(player.run.model, player.run.header, options))
