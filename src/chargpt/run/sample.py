"""Text from a model, and `chargpt sample`."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from chargpt.checkpoint import Header, Which, open_run
from chargpt.config import require_at_least, require_between
from chargpt.corpus import CharTokenizer
from chargpt.costs import kv_cache_bytes
from chargpt.errors import ConfigError, note, require
from chargpt.generate import generate
from chargpt.model import GPT
from chargpt.run.cache import kept_executables
from chargpt.train import Stream, cast, compute_dtype, random_key


@dataclasses.dataclass
class SampleOptions:
    """Text from a trained model, to standard output."""

    run: str | None = None  # run directory; by default the newest one
    checkpoint: Which = Which.best  # best | last
    prompt: str = "\n"  # what the text continues
    num_chars: int = 500  # new characters per sample
    num_samples: int = 1
    temperature: float = 0.8  # 0 = always the most likely character
    top_k: int | None = None  # draw only from the k most likely
    top_p: float | None = None  # draw only from the fewest that reach this probability
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least("", self, 1, ["num_chars", "num_samples", "top_k"])
        require_at_least("", self, 0, ["seed"])
        require_between("", self, 0.0, float("inf"), ["temperature"], closed="low")
        require_between("", self, 0.0, 1.0, ["top_p"], closed="high")
        problem = "is empty; write at least one character for the text to continue"
        require(self.prompt != "", f"prompt=: {problem}")


def continue_text(model: GPT, header: Header, options: SampleOptions) -> Iterator[list[str]]:
    """`options.prompt` continued: the text of every sample, in pieces as they are made."""
    config, tokenizer = header.config, CharTokenizer(header.vocabulary)
    pieces = generate(
        cast(model, compute_dtype(config.trainer.precision)),
        encode_prompt(header, options.prompt),
        options.num_chars,
        max_seq_len=config.dataset.seq_len,
        keys=jax.random.split(random_key(options.seed, Stream.sample), options.num_samples),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    )
    return ([tokenizer.decode(tokens) for tokens in piece] for piece in pieces)


def encode_prompt(header: Header, prompt: str) -> np.ndarray:
    """Tokens of a text; ConfigError naming the characters that the model does not know."""
    try:
        return CharTokenizer(header.vocabulary).encode(prompt)
    except ValueError as error:
        known = repr(header.vocabulary)
        raise ConfigError(f"prompt: {error}; the model knows {known}") from None


@kept_executables(note)
def sample(options: SampleOptions) -> None:
    """Write samples to standard output as they are made; everything else to standard error."""
    run_dir, state, header = open_run(options.run, options.checkpoint)
    pieces = continue_text(state.averaged, header, options)
    dtype = compute_dtype(header.config.trainer.precision)
    cache_bytes = kv_cache_bytes(state.model, dtype, header.config.dataset.seq_len)
    where = f"{run_dir}, {options.checkpoint.name} checkpoint, step {header.step}"
    note(f"{where}; KV cache {cache_bytes:,} bytes per sample")
    if options.num_samples == 1:
        print(options.prompt.lstrip("\n"), end="")
        for (text,) in pieces:
            print(text, end="", flush=True)
        print()
        return
    for number, texts in enumerate(zip(*pieces, strict=True), 1):
        note(f"--- sample {number}")
        print((options.prompt + "".join(texts)).lstrip("\n") + "\n")
