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
from chargpt.errors import ConfigError, require
from chargpt.generate import generate
from chargpt.model import GPT
from chargpt.run import start
from chargpt.run.directory import Record, read_run
from chargpt.train import Stream, cast, compute_dtype, random_key


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
        try:
            return self.tokenizer.encode(text)
        except ValueError as error:
            known = self.header.vocabulary
            message = f"prompt: {error}; {self.record.path} knows {known!r}"
            raise ConfigError(message) from None

    def sample(
        self, prompt: str = "\n", num_chars: int = 500, temperature: float = 0.8, seed: int = 0
    ) -> str:
        """`prompt` continued by `num_chars` characters; temperature 0: always the most likely one."""
        pieces = generate(
            cast(self.model, compute_dtype(self.header.config.trainer.precision)),
            self.encode(prompt),
            num_chars,
            max_seq_len=self.header.config.dataset.seq_len,
            keys=jax.random.split(random_key(seed, Stream.sample), 1),
            temperature=temperature,
        )
        return prompt + "".join(self.tokenizer.decode(piece[0]) for piece in pieces)

    def attention_weights(self, text: str) -> np.ndarray | None:
        """[layers, heads, t, s]: how much every head reads of each character of `text`; None if it has no weights."""
        tokens, context = self.encode(text), self.header.config.dataset.seq_len
        require(
            len(tokens) <= context,
            f"prompt: has {len(tokens)} characters, {self.record.path} reads {context}; "
            "write a shorter one",
        )
        weights = eqx.filter_jit(GPT.attention_weights)(self.model, jnp.asarray(tokens))
        return None if weights is None else np.asarray(jax.device_get(weights), np.float64)


def train(overrides: Sequence[str], run_dir: str | Path | None) -> TrainedRun:
    """`chargpt.train`."""
    config = compose(tuple(overrides))
    now = datetime.datetime.now()
    default = f"outputs/{now:%Y-%m-%d}/{now:%H-%M-%S}_{slug(config.wandb.name)}"
    path = Path(default if run_dir is None else run_dir)
    path.mkdir(parents=True, exist_ok=True)
    start.train(config, path)
    return load(path, "best")


def load(run: str | Path | None, checkpoint: str) -> TrainedRun:
    """`chargpt.load`."""
    names = list(Which.__members__)
    require(checkpoint in names, f"checkpoint={checkpoint}: write one of {', '.join(names)}")
    path, state, header = open_run(None if run is None else str(run), Which[checkpoint])
    return TrainedRun(read_run(path), header, state.averaged)
