"""Training and its results from Python, for notebooks: `chargpt.train(…)` and `chargpt.load(…)`."""

import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from chargpt.checkpoint import Header, Which, open_run
from chargpt.compose import compose, slug
from chargpt.corpus import CharTokenizer
from chargpt.errors import require
from chargpt.model import GPT
from chargpt.run import start
from chargpt.run.directory import Record, read_run
from chargpt.run.sample import SampleOptions, continue_text, encode_prompt


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run directory with the model of one of its checkpoints."""

    record: Record  # path, config, summary, metrics
    header: Header
    model: GPT

    @property
    def tokenizer(self) -> CharTokenizer:
        return CharTokenizer(self.header.vocabulary)

    def encode(self, text: str) -> np.ndarray:
        """Tokens of a text; ConfigError naming the characters that the model does not know."""
        return encode_prompt(self.header, text)

    def sample(
        self, prompt: str = "\n", num_chars: int = 500, temperature: float = 0.8, seed: int = 0
    ) -> str:
        """`prompt` and `num_chars` more characters; temperature 0: always the most likely one."""
        options = SampleOptions(
            prompt=prompt, num_chars=num_chars, temperature=temperature, seed=seed
        )
        pieces = continue_text(self.model, self.header, options)
        return prompt + "".join(text for (text,) in pieces)

    def attention_weights(self, text: str) -> np.ndarray | None:
        """[layers, heads, t, s]: how much every head reads of each character of `text`.

        None if the attention type has no weights.
        """
        tokens, context = self.encode(text), self.header.config.dataset.seq_len
        problem = f"has {len(tokens)} characters, {self.record.path} reads {context}"
        require(len(tokens) <= context, f"prompt: {problem}; write a shorter one")
        weights = eqx.filter_jit(GPT.attention_weights)(self.model, jnp.asarray(tokens))
        return None if weights is None else np.asarray(jax.device_get(weights), np.float64)


def train(overrides: Sequence[str], run_dir: str | Path | None) -> TrainedRun:
    """`chargpt.train`."""
    config = compose(tuple(overrides))
    if run_dir is None:
        started = f"{datetime.datetime.now():%Y-%m-%d/%H-%M-%S}"
        run_dir = f"outputs/{started}_{slug(config.wandb.name)}"
    path = Path(run_dir)
    path.mkdir(parents=True, exist_ok=True)
    start.train(config, path)
    return load(path, "best")


def load(run: str | Path | None, checkpoint: str) -> TrainedRun:
    """`chargpt.load`."""
    names = list(Which.__members__)
    require(checkpoint in names, f"checkpoint={checkpoint}: write one of {', '.join(names)}")
    path, state, header = open_run(None if run is None else str(run), Which[checkpoint])
    return TrainedRun(read_run(path), header, state.averaged)
