"""What one does with a saved model: write text with it, score a text with it."""

import contextlib
import dataclasses
import sys
from enum import Enum
from pathlib import Path

import jax
import numpy as np

from chargpt import checkpoint
from chargpt.compilation import kept_executables
from chargpt.config import ConfigError, DatasetConfig, DatasetName, require, require_at_least, require_between
from chargpt.corpus import CharTokenizer, load_corpus, make_windows, read_text
from chargpt.flops import kv_cache_bytes_per_token
from chargpt.generate import generate
from chargpt.train import Stream, TrainState, cast, compute_dtype, eval_batch_size, evaluate, random_key


class Which(Enum):
    best = "best"
    last = "last"


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
        require(self.prompt != "", "prompt=: is empty; write at least one character for the text to continue")


@dataclasses.dataclass
class EvaluateOptions:
    """Loss, bits per character and accuracy of a trained model: on its own validation split, or on any whole text."""

    run: str | None = None  # run directory; the newest one when left out
    checkpoint: Which = Which.best  # best | last
    dataset_name: DatasetName | None = None  # null = the run's own validation split
    dataset_filepath: str | None = None  # with dataset.name=file


def note(message: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(message, file=sys.stderr)


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
    note(f"{run_dir}, {options.checkpoint.name} checkpoint, step {header.step}; KV cache {cache_bytes:,} bytes per sample")
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


@kept_executables(note)
def evaluate_run(options: EvaluateOptions) -> None:
    """Print the scores of a saved model, one per line."""
    run_dir, state, header = open_run(options.run, options.checkpoint)
    config = header.config
    note(f"{run_dir}, {options.checkpoint.name} checkpoint, step {header.step}")
    if options.dataset_name is None:
        require(options.dataset_filepath is None, "dataset.filepath: write dataset.name=file beside it")
        tokens = load_corpus(config.dataset).val
        note(f"{config.dataset.name.name}, validation split: {len(tokens):,} characters")
    else:
        dataset = dataclasses.replace(config.dataset, name=options.dataset_name, filepath=options.dataset_filepath)
        tokens = known_tokens(dataset, CharTokenizer(header.vocabulary))
    windows = make_windows(tokens, config.dataset.seq_len)
    scores = evaluate(state.averaged, windows, eval_batch_size(windows), config.trainer.precision)
    print(f"loss      {scores['val/loss']:.4f} nats per character")
    print(f"bits      {scores['val/bpc']:.4f} per character")
    print(f"accuracy  {scores['val/accuracy']:.2%}")


def known_tokens(dataset: DatasetConfig, tokenizer: CharTokenizer) -> np.ndarray:
    """The whole text that `dataset` names, without the characters that the vocabulary lacks, which are reported."""
    text = read_text(dataset)
    known = set(tokenizer.vocabulary)
    kept = "".join(character for character in text if character in known)
    unknown = {character: text.count(character) for character in sorted(set(text) - known)}
    note(f"{dataset.name.name}: {len(text):,} characters")
    if unknown:
        listed = ", ".join(f"{character!r} x {count}" for character, count in list(unknown.items())[:20])
        note(f"left out, not in the model's vocabulary: {len(text) - len(kept):,} characters ({listed})")
    require(len(kept) > 1, f"dataset {dataset.name.name}: holds no text that the model's vocabulary could spell")
    return tokenizer.encode(kept)


def open_run(run: str | None, which: Which) -> tuple[Path, TrainState, checkpoint.Header]:
    """(directory, state, header) of a checkpoint of the named run, or of the newest; ConfigError where there is none."""
    if run is None:
        found = [path for root in ("outputs", "multirun") for path in Path(root).glob(f"**/checkpoints/{which.name}.eqx")]
        require(bool(found), "run: there is none in outputs/ or multirun/; train one with main.py, or write run=DIR")
        path = max(found, key=lambda path: path.stat().st_mtime)
    else:
        path = Path(run) / "checkpoints" / f"{which.name}.eqx"
        require(Path(run).is_dir(), f"run={run}: there is no such directory")
        require(path.is_file(), f"run={run}: has no checkpoint {path.relative_to(run)}")
    try:
        state, header = checkpoint.load(path)
    except checkpoint.CheckpointError as error:
        raise ConfigError(str(error)) from None
    return path.parents[1], state, header
