"""`chargpt evaluate`: score a text with a saved model."""

import dataclasses

import numpy as np

from chargpt.checkpoint import Which, open_run
from chargpt.config import DatasetConfig, DatasetName
from chargpt.corpus import CharTokenizer, load_corpus, make_windows
from chargpt.errors import note, require
from chargpt.run.cache import kept_executables
from chargpt.texts import read_text
from chargpt.train import eval_batch_size, evaluate


@dataclasses.dataclass
class EvaluateOptions:
    """Loss, bits per character and accuracy of a trained model: on its own validation split, or on any whole text."""

    run: str | None = None  # run directory; the newest one when left out
    checkpoint: Which = Which.best  # best | last
    dataset_name: DatasetName | None = None  # null = the run's own validation split
    dataset_filepath: str | None = None  # with dataset.name=file


@kept_executables(note)
def evaluate_run(options: EvaluateOptions) -> None:
    """Print the scores of a saved model, one per line."""
    run_dir, state, header = open_run(options.run, options.checkpoint)
    config = header.config
    note(f"{run_dir}, {options.checkpoint.name} checkpoint, step {header.step}")
    if options.dataset_name is None:
        require(
            options.dataset_filepath is None, "dataset.filepath: write dataset.name=file beside it"
        )
        tokens = load_corpus(config.dataset).val
        note(f"{config.dataset.name.name}, validation split: {len(tokens):,} characters")
    else:
        dataset = dataclasses.replace(
            config.dataset, name=options.dataset_name, filepath=options.dataset_filepath
        )
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
        listed = ", ".join(
            f"{character!r} x {count}" for character, count in list(unknown.items())[:20]
        )
        note(
            f"left out, not in the model's vocabulary: {len(text) - len(kept):,} characters ({listed})"
        )
    require(
        len(kept) > 1,
        f"dataset {dataset.name.name}: holds no text that the model's vocabulary could spell",
    )
    return tokenizer.encode(kept)
