"""Beginning from another model: what `init_from` names, and whether a run can begin there."""

import dataclasses
from pathlib import Path

import equinox as eqx

from chargpt.attention import filled_in
from chargpt.checkpoint import Which, describe_leaves, open_run
from chargpt.config import Config, settings_of, spell
from chargpt.corpus import Corpus, load_corpus
from chargpt.errors import ConfigError, require
from chargpt.model import GPT
from chargpt.train import Stream, random_key
from chargpt.weights import read_export


@dataclasses.dataclass(frozen=True)
class Origin:
    """A model to begin from: its numbers, what they were trained as, and which characters it knows.

    Of a run, those of its best checkpoint, averaged if it averages.
    """

    name: str
    config: Config
    vocabulary: str
    model: GPT


def read_origin(path: str) -> Origin:
    """The model of a run directory, or of a file of `chargpt export`; ConfigError if it is none."""
    name = f"init_from={path}"
    if Path(path).is_file():
        header, model = read_export(name, Path(path))
        return Origin(name, header.config, header.vocabulary, model)
    require(Path(path).is_dir(), f"{name}: there is no such run directory or safetensors file")
    try:
        _, state, header = open_run(path, Which.best)
    except ConfigError as error:
        raise ConfigError(f"init_from: {error}") from None
    return Origin(name, header.config, header.vocabulary, state.averaged)


def load_text(config: Config, vocabulary: str | None = None) -> Corpus:
    """The corpus of a run: its characters are those of the model that it begins from, if any.

    `vocabulary` is that of a run which has begun. Otherwise ConfigError, naming options, unless the
    model of `init_from` is of the shape that the configuration asks for.
    """
    if config.init_from is None:
        return load_corpus(config.dataset)
    if vocabulary is None:
        vocabulary = check(config).vocabulary
    return load_corpus(config.dataset, vocabulary)


def check(config: Config) -> Origin:
    """The model that `init_from` names; ConfigError unless the configuration can begin from it."""
    assert config.init_from is not None
    origin = read_origin(config.init_from)
    adopted(origin, shapes_of(config, len(origin.vocabulary)), config)
    return origin


def shapes_of(config: Config, vocab_size: int) -> GPT:
    key = random_key(0, Stream.init)
    sizes = vocab_size, config.dataset.seq_len
    return eqx.filter_eval_shape(GPT, config.model, *sizes, key=key)


def adopted(origin: Origin, shapes: GPT, config: Config) -> GPT:
    """The numbers of `origin` in a model of `config`, which `shapes` has; ConfigError by name."""
    found, wanted = (describe_leaves(model) for model in (origin.model, shapes))
    if found != wanted:
        ours, theirs = settings_of(config), settings_of(origin.config)
        names = [name for name in ours if name.startswith("model.") or name == "dataset.seq_len"]
        other = [f"{name}={spell(theirs[name])}" for name in names if ours[name] != theirs[name]]
        odd = next(leaf for leaf in wanted + found if leaf not in found or leaf not in wanted)
        where = f"(at {odd[0]}); write those that make it so: {' '.join(other)}"
        raise ConfigError(f"{origin.name}: its model has another shape {where}")
    return filled_in(shapes, origin.model)
