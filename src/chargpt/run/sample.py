"""`chargpt sample`: write text with a saved model."""

import dataclasses
import sys

import jax
import numpy as np

from chargpt.checkpoint import Which, open_run
from chargpt.config import require_at_least, require_between
from chargpt.corpus import CharTokenizer
from chargpt.costs import kv_cache_bytes_per_token
from chargpt.errors import ConfigError, note, require
from chargpt.generate import generate
from chargpt.run.cache import kept_executables
from chargpt.train import Stream, cast, compute_dtype, random_key


@dataclasses.dataclass
class SampleOptions:
    """Text from a trained model, to standard output."""

    run: str | None = None  # run directory; the newest one when left out
    checkpoint: Which = Which.best  # best | last
    prompt: str = "\n"  # what the text continues
    num_chars: int = 500  # new characters per sample
    num_samples: int = 1
    temperature: float = 0.8  # 0 = always the likeliest character
    top_k: int | None = None  # draw from the k likeliest alone
    top_p: float | None = None  # draw from the fewest that reach this probability
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least("", self, 1, ["num_chars", "num_samples", "top_k"])
        require_at_least("", self, 0, ["seed"])
        require_between("", self, 0.0, float("inf"), ["temperature"], closed="low")
        require_between("", self, 0.0, 1.0, ["top_p"], closed="high")
        require(
            self.prompt != "",
            "prompt=: is empty; write at least one character for the text to continue",
        )


@kept_executables(note)
def sample(options: SampleOptions) -> None:
    """Stream samples to standard output; everything else goes to standard error."""
    run_dir, state, header = open_run(options.run, options.checkpoint)
    config, tokenizer = header.config, CharTokenizer(header.vocabulary)
    try:
        prompt = tokenizer.encode(options.prompt)
    except ValueError as error:
        raise ConfigError(f"prompt: {error}; the model knows {header.vocabulary!r}") from None
    dtype = compute_dtype(config.trainer.precision)
    context = config.dataset.seq_len
    cache_bytes = kv_cache_bytes_per_token(state.model, dtype) * context
    note(
        f"{run_dir}, {options.checkpoint.name} checkpoint, step {header.step}; KV cache {cache_bytes:,} bytes per sample"
    )
    pieces = generate(
        cast(state.averaged, dtype),
        prompt,
        options.num_chars,
        max_seq_len=context,
        keys=jax.random.split(random_key(options.seed, Stream.sample), options.num_samples),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    )
    if options.num_samples == 1:  # as it is made
        sys.stdout.write(options.prompt.lstrip("\n"))
        for piece in pieces:
            sys.stdout.write(tokenizer.decode(piece[0]))
            sys.stdout.flush()
        sys.stdout.write("\n")
        return
    texts = np.concatenate(list(pieces), axis=1)
    for number, text in enumerate(texts, 1):
        note(f"--- sample {number}")
        sys.stdout.write((options.prompt + tokenizer.decode(text)).lstrip("\n") + "\n\n")
