"""The character tokenizer, the train/validation split, and the batches drawn from it."""

import dataclasses
import functools
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from chargpt.config import DatasetConfig
from chargpt.errors import ConfigError, require
from chargpt.texts import read_text

Tokens = Int[Array, " corpus"]
Batches = tuple[Int[Array, "batch t"], Int[Array, "batch t"]]  # inputs, targets


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
    """One token per character: its index in `vocabulary`, the sorted string of all of them."""

    vocabulary: str

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> np.ndarray:
        """Tokens [len(text)] int32; ValueError naming the characters that the vocabulary lacks."""
        missing = sorted(set(text) - set(self.vocabulary))
        if missing:
            raise ValueError(f"not in the vocabulary: {' '.join(map(repr, missing))}")
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        known = np.frombuffer(self.vocabulary.encode("utf-32-le"), dtype=np.uint32)
        return np.searchsorted(known, codes).astype(np.int32)

    def decode(self, tokens: np.ndarray | Array) -> str:
        return "".join(self.vocabulary[token] for token in np.asarray(tokens))

    def __len__(self) -> int:
        return len(self.vocabulary)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text as tokens, cut once: the validation split is its end, never trained on."""

    name: str
    tokenizer: CharTokenizer
    train: Int[np.ndarray, " train"]
    val: Int[np.ndarray, " val"]
    sha256: str

    @functools.cached_property
    def baselines(self) -> dict[str, float]:
        """Validation losses, in nats per character, of counts on the training split.

        uniform: ln V. unigram, bigram: add-one smoothed character and character-pair frequencies.
        """
        size = len(self.tokenizer)
        unigram = np.bincount(self.train, minlength=size) + 1.0
        firsts = np.bincount(self.train[:-1], minlength=size) + float(size)
        # Only pairs that occur: a table of all pairs of a large alphabet would take gigabytes.
        pairs, wanted = (t[:-1].astype(np.int64) * size + t[1:] for t in (self.train, self.val))
        seen, counts = np.unique(pairs, return_counts=True)
        place = np.searchsorted(seen, wanted).clip(max=len(seen) - 1)
        bigram = (np.where(seen[place] == wanted, counts[place], 0) + 1) / firsts[self.val[:-1]]
        unigram = unigram / unigram.sum()
        return {
            "uniform": math.log(size),
            "unigram": float(-np.log(unigram[self.val[1:]]).mean()),
            "bigram": float(-np.log(bigram).mean()),
        }


def load_corpus(config: DatasetConfig, vocabulary: str | None = None) -> Corpus:
    """The text that `config` names; ConfigError if there is none, or it is too short.

    Its characters are its vocabulary, unless another one is given, which must have them all.
    """
    text = read_text(config)
    tokenizer = CharTokenizer(vocabulary) if vocabulary else CharTokenizer.from_text(text)
    source = f"filepath={config.filepath}" if config.filepath else f"name={config.name.name}"
    require(
        len(tokenizer) > 1,
        f"dataset.{source}: holds fewer than two different characters; write a longer text",
    )
    try:
        tokens = tokenizer.encode(text)
    except ValueError as error:
        advice = "that of the model; write a text of characters that it knows"
        raise ConfigError(f"dataset.{source}: has characters {error}, {advice}") from None
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    train, val = np.split(tokens, [len(tokens) - int(len(tokens) * config.val_fraction)])
    for name, split in (("training", train), ("validation", val)):
        require(
            len(split) > config.seq_len,
            f"dataset.seq_len={config.seq_len}: the {name} split has only {len(split)} characters; "
            "write a seq_len below that, another val_fraction, or a longer text",
        )
    return Corpus(config.name.name, tokenizer, train, val, sha256)


def sample_batch(tokens: Tokens, key: PRNGKeyArray, batch_size: int, seq_len: int) -> Batches:
    """Windows at random places, the targets one character further: one gather on the device."""
    starts = jax.random.randint(key, (batch_size,), 0, tokens.shape[0] - seq_len)
    return read_windows(tokens, starts, seq_len)


def epoch_batch(
    tokens: Tokens, key: PRNGKeyArray, step: Int[Array, ""], batch_size: int, seq_len: int
) -> Batches:
    """As `sample_batch`, without replacement: batch number `step` of a text read epoch after epoch.

    Each epoch cuts the text into windows from another offset and takes every window once, in
    another order. The order is a function of (key, epoch): a resumed run needs no list, no cursor.
    """
    num_windows = max(1, tokens.shape[0] // seq_len - 1)
    num_windows -= num_windows % math.isqrt(num_windows)
    # Left out of an epoch at either end, another part each time
    spare = tokens.shape[0] - seq_len * num_windows
    number = step * batch_size + jnp.arange(batch_size)

    def start(number: Int[Array, ""]) -> Int[Array, ""]:
        epoch_key = jax.random.fold_in(key, number // num_windows)
        offset = jax.random.randint(jax.random.fold_in(epoch_key, 0), (), 0, spare)
        return offset + seq_len * shuffled(number % num_windows, num_windows, epoch_key)

    return read_windows(tokens, jax.vmap(start)(number), seq_len)


def shuffled(index: Int[Array, ""], size: int, key: PRNGKeyArray) -> Int[Array, ""]:
    """Where a random permutation of `size` things puts thing `index`: a Feistel network, no list.

    `size` must be a multiple of isqrt(size): two digits, each in turn shifted by a random function
    of the other (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    rows = math.isqrt(size)
    digits, bases = [index % rows, index // rows], [rows, size // rows]
    for round_number in range(6):
        moved, other = round_number % 2, 1 - round_number % 2
        round_key = jax.random.fold_in(jax.random.fold_in(key, 1 + round_number), digits[other])
        shift = jax.random.randint(round_key, (), 0, bases[moved])
        digits[moved] = (digits[moved] + shift) % bases[moved]
    return digits[1] * rows + digits[0]


def read_windows(tokens: Tokens, starts: Int[Array, " batch"], seq_len: int) -> Batches:
    windows = tokens[starts[:, None] + jnp.arange(seq_len + 1)]
    return windows[:, :-1], windows[:, 1:]


@dataclasses.dataclass(frozen=True)
class Windows:
    """A split as windows that do not overlap: every character but the first is predicted once."""

    inputs: Int[np.ndarray, "windows t"]
    targets: Int[np.ndarray, "windows t"]
    weights: Float[np.ndarray, "windows t"]  # 0 where the last window is padded

    @property
    def num_targets(self) -> int:
        return int(self.weights.sum(dtype=np.float64))


def make_windows(
    tokens: Int[np.ndarray, " split"], seq_len: int, max_tokens: int | None = None
) -> Windows:
    """Windows of `seq_len`; with `max_tokens`, about that many characters, evenly spaced."""
    num_targets = len(tokens) - 1
    num_windows = math.ceil(num_targets / seq_len)
    padding = num_windows * seq_len - num_targets
    weights = np.pad(np.ones(num_targets, np.float32), (0, padding))
    rows = [np.pad(part, (0, padding)) for part in (tokens[:-1], tokens[1:])]
    kept = np.arange(num_windows)
    if max_tokens is not None and max_tokens < num_targets:
        kept = np.linspace(0, num_windows - 1, max(1, max_tokens // seq_len)).round().astype(int)
    return Windows(*(part.reshape(num_windows, seq_len)[kept] for part in (*rows, weights)))


def sliding_windows(tokens: Int[np.ndarray, " split"], seq_len: int, stride: int) -> Windows:
    """Windows that begin `stride` after one another; each adds the last characters of its own.

    So every character is predicted once, and from seq_len - stride + 1 characters or more, where
    the text before it has so many.
    """
    num_targets = len(tokens) - 1
    number = 1 + max(0, math.ceil((num_targets - seq_len) / stride))
    place = np.arange(seq_len) + stride * np.arange(number)[:, None]
    padded = np.pad(tokens, (0, place[-1, -1] + 2 - len(tokens)))
    new = np.arange(seq_len) >= seq_len - stride
    weights = (place < num_targets) & (new | (np.arange(number)[:, None] == 0))
    return Windows(padded[place], padded[place + 1], weights.astype(np.float32))
