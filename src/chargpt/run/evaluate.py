"""The loss of a model on a text, and `chargpt evaluate`."""

import collections
import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from chargpt.checkpoint import Which, open_run
from chargpt.config import MAX_SEQ_LEN, Config, DatasetConfig, DatasetName, Precision
from chargpt.corpus import CharTokenizer, Windows, make_windows, sliding_windows
from chargpt.errors import note, require
from chargpt.model import GPT
from chargpt.origin import load_text
from chargpt.parallel import Devices
from chargpt.run.cache import kept_executables
from chargpt.texts import read_text
from chargpt.train import cast, compute_dtype, cross_entropy

TOKENS_PER_BATCH = 16_384
MAX_LISTED = 20  # characters that a message names


@eqx.filter_jit
def score(
    model: GPT, batch: Any, dtype: Any, devices: Devices | None = None
) -> tuple[Array, Array]:
    """Summed nats and number of correct predictions, [windows], of (inputs, targets, weights).

    Of a population, [members, windows].
    """
    inputs, targets, weights = batch
    arrays, static = eqx.partition(cast(model, dtype), eqx.is_array)

    def sums(arrays: Any) -> tuple[Array, Array]:
        model = eqx.combine(arrays, static)
        logits = (model if devices is None else devices.gather(model)).batch(inputs)
        losses = cross_entropy(logits, targets) * weights
        correct = (jnp.argmax(logits, axis=-1) == targets) * weights
        return losses.sum(axis=-1), correct.sum(axis=-1)

    if devices is None:
        return sums(arrays)
    return devices.replicate(devices.vmap(sums)(arrays) if devices.members else sums(arrays))


def eval_batch_size(windows: Windows) -> int:
    """Windows to score at once: about TOKENS_PER_BATCH tokens of them."""
    count, seq_len = windows.inputs.shape
    return min(max(1, TOKENS_PER_BATCH // seq_len), count)


def evaluate(
    model: GPT,
    windows: Windows,
    batch_size: int,
    precision: Precision | None,
    devices: Devices | None = None,
) -> dict[str, Any]:
    """Loss (nats per character), bits per character and accuracy over all windows, exactly.

    Numbers, or of a population arrays [members].
    """
    count = len(windows.inputs)
    members = devices.members if devices is not None else None
    batch_size = max(1, batch_size // (members or 1))
    batch_size += 0 if devices is None else -batch_size % devices.shares
    padding = ((0, -count % batch_size), (0, 0))
    split = [np.pad(rows, padding) for rows in (windows.inputs, windows.targets, windows.weights)]
    losses, correct = np.zeros(members or ()), np.zeros(members or ())
    for start in range(0, len(split[0]), batch_size):
        batch = tuple(rows[start : start + batch_size] for rows in split)
        if devices is not None:
            batch = devices.split(batch)
        sums = score(model, batch, compute_dtype(precision), devices)
        losses += np.asarray(sums[0], np.float64).sum(axis=-1)
        correct += np.asarray(sums[1], np.float64).sum(axis=-1)
    loss, accuracy = losses / windows.num_targets, correct / windows.num_targets
    return {"val/loss": loss, "val/accuracy": accuracy, "val/bpc": loss / np.log(2)}


def attention_entropy(
    model: GPT, inputs: Int[Array, "windows t"]
) -> Float[Array, "layers n"] | None:
    """Entropy in nats of what each head reads, mean over positions: ln k for k tokens evenly.

    None if the attention type has no weights. What a sink takes is left out.
    """
    weights = jax.vmap(model.attention_weights)(inputs)
    if weights is None:
        return None
    return jax.scipy.special.entr(weights.astype(jnp.float32)).sum(axis=-1).mean(axis=(0, 3))


@dataclasses.dataclass
class EvaluateOptions:
    """Scores of a trained model on its validation split, or on any text: loss, bits, accuracy."""

    run: str | None = None  # run directory; by default the newest one
    checkpoint: Which = Which.best  # best | last
    dataset_name: DatasetName | None = None  # null = the run's own validation split
    dataset_filepath: str | None = None  # with dataset.name=file
    dataset_seq_len: int | None = None  # another context; null = that of training
    stride: int | None = None  # also from longer contexts: windows that begin so far apart


@kept_executables(note)
def evaluate_run(options: EvaluateOptions) -> None:
    """Print the scores of a saved model, one per line."""
    run_dir, state, header = open_run(options.run, options.checkpoint)
    config, name, filepath = header.config, options.dataset_name, options.dataset_filepath
    seq_len, stride, precision = (
        context_of(options, config),
        options.stride,
        config.trainer.precision,
    )
    inside = f"stride={stride}: must be between 1 and {seq_len}, the context"
    require(stride is None or 1 <= stride <= seq_len, inside)
    note(f"{run_dir}, {options.checkpoint.name} checkpoint, step {header.step}")
    if name is None:
        require(filepath is None, "dataset.filepath: write dataset.name=file as well")
        tokens = load_text(config, header.vocabulary).val
        note(f"{config.dataset.name.name}, validation split: {len(tokens):,} characters")
    else:
        dataset = dataclasses.replace(config.dataset, name=name, filepath=filepath)
        tokens = known_tokens(dataset, CharTokenizer(header.vocabulary))
    windows = make_windows(tokens, seq_len)
    scores = evaluate(state.averaged, windows, eval_batch_size(windows), precision)
    if stride is not None or seq_len != config.dataset.seq_len:
        print(f"windows of {seq_len} that do not overlap:")
    show(scores)
    if stride is not None:
        windows = sliding_windows(tokens, seq_len, stride)
        scores = evaluate(state.averaged, windows, eval_batch_size(windows), precision)
        context = f"{seq_len - stride + 1} or more (but for the beginning)"
        print(f"windows that begin {stride} apart, each character predicted from {context}:")
        show(scores)


def context_of(options: EvaluateOptions, config: Config) -> int:
    """How many characters the model reads at a time; ConfigError if it cannot read so many."""
    trained = config.dataset.seq_len
    seq_len = options.dataset_seq_len
    if seq_len is None:
        return trained
    name = f"dataset.seq_len={seq_len}"
    require(1 <= seq_len <= MAX_SEQ_LEN, f"{name}: must be between 1 and {MAX_SEQ_LEN:,}")
    table = f"{name}: that run has learned {trained} positions; write {trained} or fewer"
    require(seq_len <= trained or not config.model.has_learned_positions, table)
    return seq_len


def show(scores: dict[str, float]) -> None:
    print(f"loss      {scores['val/loss']:.4f} nats per character")
    print(f"bits      {scores['val/bpc']:.4f} per character")
    print(f"accuracy  {scores['val/accuracy']:.2%}")


def known_tokens(dataset: DatasetConfig, tokenizer: CharTokenizer) -> np.ndarray:
    """The text of `dataset`, except characters that the vocabulary lacks, which are reported."""
    text, name = read_text(dataset), dataset.name.name
    counts, known = collections.Counter(text), set(tokenizer.vocabulary)
    kept = "".join(character for character in text if character in known)
    note(f"{name}: {len(text):,} characters")
    if unknown := sorted(counts.keys() - known):
        listed = ", ".join(f"{symbol!r} x {counts[symbol]}" for symbol in unknown[:MAX_LISTED])
        left_out = f"{len(text) - len(kept):,} characters ({listed})"
        note(f"left out, not in the model's vocabulary: {left_out}")
    require(len(kept) > 1, f"dataset {name}: holds no text in the model's vocabulary")
    return tokenizer.encode(kept)
