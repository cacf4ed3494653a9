"""Beginning from another model: what `init_from` names, and whether a run can begin there."""

import dataclasses
from pathlib import Path
from typing import Any

from chargpt.attention import abstract, filled_in
from chargpt.checkpoint import (
    CheckpointError,
    Which,
    describe_leaves,
    file_of,
    open_run,
    read_header,
)
from chargpt.config import Config, ModelConfig, changes, spelled
from chargpt.corpus import Corpus, load_corpus
from chargpt.errors import ConfigError, note, require
from chargpt.model import GPT
from chargpt.weights import read_export, read_own_header


@dataclasses.dataclass(frozen=True)
class Origin:
    """A model to begin from, by its header: what it was trained as, which characters it knows.

    Of a run, that of its best checkpoint.
    """

    name: str
    path: Path
    config: Config
    vocabulary: str

    def model(self) -> GPT:
        """Its numbers; averaged if the run averages."""
        if self.path.is_file():
            return read_export(self.name, self.path)[1]
        return open_run(str(self.path), Which.best)[1].averaged


def read_origin(path: str) -> Origin:
    """The model of a run directory, or of a file of `chargpt export`; ConfigError if it is none.

    No device holds anything of it yet.
    """
    name, file = f"init_from={path}", Path(path)
    if not file.is_file():
        file = file_of(file, Which.best)
        require(file.is_file(), f"{name}: is neither a run directory nor a safetensors file")
        try:
            header = read_header(file)[0]
        except CheckpointError as error:
            raise ConfigError(f"init_from: {error}") from None
    else:
        header = read_own_header(name, file)
    return Origin(name, Path(path), header.config, header.vocabulary)


def load_text(config: Config, vocabulary: str | None = None) -> Corpus:
    """The corpus of a run: its characters are those of the model that it begins from, if any.

    `vocabulary` is that of a run which has begun. Otherwise ConfigError, naming options, unless the
    model of `init_from` is of the shape that the configuration asks for.
    """
    if vocabulary is None and config.init_from is not None:
        origin = check(config)
        vocabulary = origin.vocabulary
        if changed := spelled_otherwise(origin.config, config):
            note(f"{origin.name}: that model was trained with {' '.join(changed)}")
    return load_corpus(config.dataset, vocabulary)


def check(config: Config) -> Origin:
    """The model that `init_from` names; ConfigError unless the configuration can begin from it."""
    assert config.init_from is not None
    origin = read_origin(config.init_from)
    size = len(origin.vocabulary)
    check_shapes(origin, shapes_of(origin.config, size), shapes_of(config, size), config)
    return origin


def check_shapes(origin: Origin, found: GPT, wanted: GPT, config: Config) -> None:
    """ConfigError, naming options, unless the numbers of `found` are those that `wanted` has."""
    ours, theirs = describe_leaves(wanted), describe_leaves(found)
    heads = config.model.num_heads == origin.config.model.num_heads
    if ours == theirs and heads:
        return
    odd = [leaf for leaf in ours + theirs if leaf not in theirs or leaf not in ours]
    where = f" (at {odd[0][0]})" if odd else ""
    other = " ".join(spelled_otherwise(origin.config, config))
    problem = f"{origin.name}: its model has another shape{where}"
    raise ConfigError(f"{problem}; it was trained with {other}: write those that matter for it")


def spelled_otherwise(config: Config, other: Config) -> list[str]:
    """The options of the model of `config` that have another value in `other`."""
    changed = changes(config, other).items()
    return spelled({name: own for name, (own, _) in changed if of_model(name)})


def of_model(name: str) -> bool:
    """Whether an option is one of the model."""
    return name.startswith("model.") or name == "dataset.seq_len"


def shapes_of(config: Config, vocab_size: int) -> GPT:
    """The model of `config`, with shapes in place of arrays."""

    def make(model: ModelConfig, *, key: Any) -> GPT:
        return GPT(model, vocab_size, config.dataset.seq_len, key=key)

    return abstract(make, config.model)


def adopt(config: Config) -> GPT:
    """The model that `init_from` names, as one of `config`."""
    origin = check(config)
    return filled_in(shapes_of(config, len(origin.vocabulary)), origin.model())
