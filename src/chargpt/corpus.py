"""Text sources, the character tokenizer, the train/validation split, and batches drawn from it."""

import contextlib
import dataclasses
import functools
import hashlib
import http.client
import math
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from chargpt.config import ConfigError, DatasetConfig, DatasetName, require

BUNDLED = Path(__file__).parents[2] / "data" / "shakespeare.txt"
TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
MAX_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
    """One token per character; `vocabulary` is the sorted string of all of them, its index the token."""

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
    """A text as tokens, cut once in time order: what is validated on comes after everything that is trained on."""

    name: str
    tokenizer: CharTokenizer
    train: Int[np.ndarray, " train"]
    val: Int[np.ndarray, " val"]
    sha256: str

    @functools.cached_property
    def baselines(self) -> dict[str, float]:
        """Validation losses (nats per character) of models that need no training, counted on the train split.

        uniform: ln V. unigram, bigram: add-one smoothed character and character-pair frequencies.
        """
        size = len(self.tokenizer)
        unigram = np.bincount(self.train, minlength=size) + 1.0
        firsts = np.bincount(self.train[:-1], minlength=size) + float(size)
        # Pairs as numbers, only those that occur: a table of all pairs of a large alphabet would take gigabytes.
        pairs = lambda tokens: tokens[:-1].astype(np.int64) * size + tokens[1:]  # noqa: E731
        seen, counts = np.unique(pairs(self.train), return_counts=True)
        wanted = pairs(self.val)
        place = np.searchsorted(seen, wanted).clip(max=len(seen) - 1)
        bigram = (np.where(seen[place] == wanted, counts[place], 0) + 1) / firsts[self.val[:-1]]
        unigram = unigram / unigram.sum()
        return {
            "uniform": math.log(size),
            "unigram": float(-np.log(unigram[self.val[1:]]).mean()),
            "bigram": float(-np.log(bigram).mean()),
        }


def load_corpus(config: DatasetConfig) -> Corpus:
    """The text that `config` names; ConfigError if it is missing, not text, or too short for `seq_len`."""
    text = read_text(config)
    tokenizer = CharTokenizer.from_text(text)
    source = f"dataset.filepath={config.filepath}" if config.filepath else f"dataset.name={config.name.name}"
    require(len(tokenizer) > 1, f"{source}: holds fewer than two different characters; write a longer text")
    tokens = tokenizer.encode(text)
    cut = len(tokens) - int(len(tokens) * config.val_fraction)
    corpus = Corpus(config.name.name, tokenizer, tokens[:cut], tokens[cut:], hashlib.sha256(text.encode()).hexdigest())
    for split, length in (("training", len(corpus.train)), ("validation", len(corpus.val))):
        require(
            length > config.seq_len,
            f"dataset.seq_len={config.seq_len}: the {split} split has only {length} characters; "
            f"write a seq_len below that, another val_fraction, or a longer text",
        )
    return corpus


def read_text(config: DatasetConfig) -> str:
    """The text that `config` names, a byte-order mark at its beginning left out."""
    try:
        return read_source(config).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"dataset.filepath={config.filepath}: is not UTF-8 text (byte {error.start}); convert it, say with iconv"
        ) from error


def read_source(config: DatasetConfig) -> bytes:
    match config.name:
        case DatasetName.shakespeare:
            require(BUNDLED.is_file(), f"the bundled text is missing: {BUNDLED}; run from a clone of the repository")
            return BUNDLED.read_bytes()
        case DatasetName.tinyshakespeare:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chargpt"
            return download(TINYSHAKESPEARE_URL, TINYSHAKESPEARE_SHA256, cache / "tinyshakespeare.txt")
        case DatasetName.file:
            assert config.filepath is not None
            return read_file(config.filepath)


def read_file(filepath: str) -> bytes:
    name = f"dataset.filepath={filepath}"
    try:
        path = Path(filepath).expanduser()
        require(path.exists(), f"{name}: there is no such file")
        require(path.is_file(), f"{name}: is not a regular file")
        size = path.stat().st_size
        require(size > 0, f"{name}: is empty")
        require(size <= MAX_BYTES, f"{name}: has {size:,} bytes; texts of up to {MAX_BYTES:,} fit here")
        return path.read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: a home folder of nobody
        raise ConfigError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def download(url: str, sha256: str, path: Path) -> bytes:
    """The file at `url`, fetched once into `path`; verified, and written under a temporary name first."""
    if path.is_file():
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
        print(f"{path}: is damaged (wrong sha256), fetching it again", file=sys.stderr)
    data = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            total = f" of {response.length:,}" if response.length else ""
            while block := response.read(1 << 16):
                data += block
                print(f"\rdownloading {path.name}: {len(data):,}{total} bytes", end="", file=sys.stderr)
                require(len(data) <= MAX_BYTES, f"{url}: more than {MAX_BYTES:,} bytes; that is not the text")
        print(file=sys.stderr)
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise ConfigError(
            f"dataset.name=tinyshakespeare: could not be downloaded ({reason}); "
            "write dataset.name=shakespeare (bundled), or dataset.name=file dataset.filepath=PATH"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    require(found == sha256, f"dataset.name=tinyshakespeare: {url} sent another file (sha256 {found}, expected {sha256})")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder that can") from error
    return bytes(data)


def sample_batch(
    tokens: Int[Array, " corpus"], key: PRNGKeyArray, batch_size: int, seq_len: int
) -> tuple[Int[Array, "batch t"], Int[Array, "batch t"]]:
    """(inputs, targets): windows at random places, the targets one character further. One gather on the device."""
    starts = jax.random.randint(key, (batch_size,), 0, tokens.shape[0] - seq_len)
    return read_windows(tokens, starts, seq_len)


def epoch_batch(
    tokens: Int[Array, " corpus"], key: PRNGKeyArray, step: Int[Array, ""], batch_size: int, seq_len: int
) -> tuple[Int[Array, "batch t"], Int[Array, "batch t"]]:
    """As `sample_batch`, without replacement: batch number `step` of a text read epoch after epoch.

    In each epoch the text is cut into windows from another offset on, and every window comes once, in another order. The
    order is a function of (key, epoch), evaluated where it is asked for: a run that goes on needs no list and no cursor.
    """
    num_windows = max(1, tokens.shape[0] // seq_len - 1)
    num_windows -= num_windows % math.isqrt(num_windows)
    spare = tokens.shape[0] - seq_len * num_windows  # left out of an epoch, at either end, another part each time
    number = step * batch_size + jnp.arange(batch_size)

    def start(number: Int[Array, ""]) -> Int[Array, ""]:
        epoch_key = jax.random.fold_in(key, number // num_windows)
        offset = jax.random.randint(jax.random.fold_in(epoch_key, 0), (), 0, spare)
        return offset + seq_len * shuffled(number % num_windows, num_windows, epoch_key)

    return read_windows(tokens, jax.vmap(start)(number), seq_len)


def shuffled(index: Int[Array, ""], size: int, key: PRNGKeyArray) -> Int[Array, ""]:
    """Where a random permutation of `size` things puts thing `index`, without the list of all: a Feistel network.

    `size` must be isqrt(size) times a whole number: two digits, each in turn moved by a random function of the other
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    rows = math.isqrt(size)
    digits, bases = [index % rows, index // rows], [rows, size // rows]
    for round_number in range(6):
        moved, other = round_number % 2, 1 - round_number % 2
        round_key = jax.random.fold_in(jax.random.fold_in(key, 1 + round_number), digits[other])
        digits[moved] = (digits[moved] + jax.random.randint(round_key, (), 0, bases[moved])) % bases[moved]
    return digits[1] * rows + digits[0]


def read_windows(
    tokens: Int[Array, " corpus"], starts: Int[Array, " batch"], seq_len: int
) -> tuple[Int[Array, "batch t"], Int[Array, "batch t"]]:
    windows = tokens[starts[:, None] + jnp.arange(seq_len + 1)]
    return windows[:, :-1], windows[:, 1:]


@dataclasses.dataclass(frozen=True)
class Windows:
    """A whole split as non-overlapping windows: every character but the first is predicted exactly once."""

    inputs: Int[np.ndarray, "windows t"]
    targets: Int[np.ndarray, "windows t"]
    weights: Float[np.ndarray, "windows t"]  # 0 where the last window is padded

    @property
    def num_targets(self) -> int:
        return int(self.weights.sum(dtype=np.float64))


def make_windows(tokens: Int[np.ndarray, " split"], seq_len: int, max_tokens: int | None = None) -> Windows:
    """Cut `tokens` into windows of `seq_len`; with `max_tokens`, keep about that many characters, evenly spaced."""
    num_targets = len(tokens) - 1
    num_windows = math.ceil(num_targets / seq_len)
    padded = np.zeros(num_windows * seq_len + 1, np.int32)
    padded[: len(tokens)] = tokens
    weights = (np.arange(num_windows * seq_len) < num_targets).astype(np.float32)
    shape = (num_windows, seq_len)
    kept = np.arange(num_windows)
    if max_tokens is not None and max_tokens < num_targets:
        kept = np.linspace(0, num_windows - 1, max(1, max_tokens // seq_len)).round().astype(int)
    return Windows(padded[:-1].reshape(shape)[kept], padded[1:].reshape(shape)[kept], weights.reshape(shape)[kept])
