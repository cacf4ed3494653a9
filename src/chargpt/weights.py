"""Weights leave and enter as safetensors files, under the names that are usual in the field.

Hugging Face's Llama names for everything that has one, Qwen3's for QK-norm, DeepSeek-V2's for MLA,
OLMoE's and DeepSeek-V3's for experts. Our leaves are stacked over the layers, and over the experts;
the file has one tensor per layer and expert. The rotary halves of MLA are laid out as in Llama;
DeepSeek's own files interleave them. Reading is safe: safetensors holds only numbers, the library
checks every offset against the file's size, and every shape is checked against the model's before a
number is read.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from chargpt import checkpoint
from chargpt.checkpoint import Which, open_run
from chargpt.config import Config, DatasetName, from_plain, to_plain, to_yaml
from chargpt.corpus import load_corpus
from chargpt.errors import ConfigError, note, one_line, require
from chargpt.experts import MixtureOfExperts
from chargpt.files import write_durably
from chargpt.llama import from_llama
from chargpt.model import GPT
from chargpt.train import Stream, TrainState, init_state, random_key

FORMAT = "2"
Source = tuple[Config, str, str]  # configuration, vocabulary, SHA-256 of the text
FLOATS = ("F32", "F16", "BF16")  # numpy knows the last one once JAX is imported

NAMES = {
    "embedding": "model.embed_tokens.weight",
    "position_embedding": "model.embed_positions.weight",
    "ngram_embedding": "model.embed_ngrams.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
STACKED = "blocks."  # begins the path of every leaf with a leading layer axis
EXPERTS = "blocks.feed_forward.experts."  # and with an expert axis after it
BLOCK_NAMES = {  # how names within a block begin; the first match counts
    "attention.": "self_attn.",
    "modifiers.sink": "self_attn.sinks",
    "modifiers.": "self_attn.",
    "feed_forward.router.proj.": "mlp.gate.",
    "feed_forward.router.bias": "mlp.gate.e_score_correction_bias",
    "feed_forward.": "mlp.",
    "attention_norm.": "input_layernorm.",
    "feed_forward_norm.": "post_attention_layernorm.",
}


@dataclasses.dataclass
class ExportOptions:
    """The weights of a trained model as a safetensors file, under Hugging Face's names."""

    run: str | None = None  # run directory; by default the newest one
    checkpoint: Which = Which.best  # best | last
    file: str = ""  # the file to write

    def __post_init__(self) -> None:
        require(self.file != "", "file: is missing; write file=OUT.safetensors")


@dataclasses.dataclass
class ImportOptions:
    """A run directory, at step 0, from weights of `chargpt export` or of a Llama model."""

    file: str = ""  # the file to read
    run: str = ""  # the directory to create
    config: str | None = None  # Hugging Face's configuration; null = config.json beside the file
    # Of a Llama file: the text whose characters, sorted, are its vocabulary
    dataset_name: DatasetName | None = None
    dataset_filepath: str | None = None  # with dataset.name=file
    dataset_seq_len: int | None = None  # a context shorter than the file's max_position_embeddings

    def __post_init__(self) -> None:
        require(self.file != "", "file: is missing; write file=MODEL.safetensors")
        require(self.run != "", "run: is missing; write run=NEWDIR")


# ---- out


def export_weights(options: ExportOptions) -> None:
    """Write the model of a run; a file that exists is not overwritten."""
    run_dir, state, header = open_run(options.run, options.checkpoint)
    tensors = to_tensors(state.averaged)
    metadata = {
        "format": "pt",  # what the transformers library asks for
        "chargpt_format": FORMAT,
        "config": json.dumps(to_plain(header.config)),
        "vocabulary": json.dumps(header.vocabulary),
        "corpus_sha256": header.corpus_sha256,
    }
    data = save(tensors, metadata)
    try:
        with open(options.file, "xb") as file:
            file.write(data)
    except FileExistsError:
        raise ConfigError(f"file={options.file}: exists already; write another name") from None
    except OSError as error:
        raise ConfigError(f"file={options.file}: cannot be written ({error.strerror})") from None
    source = f"{run_dir}, {options.checkpoint.name} checkpoint, step {header.step}"
    note(f"{source}: {len(tensors)} tensors, {len(data):,} bytes")


def to_tensors(model: GPT) -> dict[str, np.ndarray]:
    """Every array of the model by its name in a file, one per layer and expert."""
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in array_leaves(model).items():
        array = np.ascontiguousarray(leaf)
        parts = array.reshape(-1, *array.shape[stack_axes(path) :])
        tensors |= zip(tensor_names(path, model), parts, strict=True)
    return tensors


def array_leaves(model: GPT) -> dict[str, Any]:
    """Every array, or shape of one, by its dotted path."""
    leaves = jax.tree_util.tree_leaves_with_path(model)
    return {dotted(path): leaf for path, leaf in leaves if hasattr(leaf, "dtype")}


def dotted(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def stack_axes(path: str) -> int:
    """How many axes of the leaf at `path` are no axes of a tensor in a file."""
    return path.startswith(STACKED) + path.startswith(EXPERTS)


def tensor_names(path: str, model: GPT) -> list[str]:
    """The names in a file of the leaf at `path`: one per layer, or expert, if it is stacked."""
    if not path.startswith(STACKED):
        return [NAMES[path]]
    exported = model.stacked.attention.exported
    own = {f"attention.{ours}": f"self_attn.{theirs}" for ours, theirs in exported.items()}
    inside = path.removeprefix(STACKED)
    ours, theirs = next(pair for pair in (own | BLOCK_NAMES).items() if inside.startswith(pair[0]))
    name = theirs + inside.removeprefix(ours)
    names = [f"model.layers.{layer}.{name}" for layer in range(model.num_layers)]
    feed_forward = model.stacked.feed_forward
    if not (path.startswith(EXPERTS) and isinstance(feed_forward, MixtureOfExperts)):
        return names
    numbered = [f"mlp.experts.{i}." for i in range(feed_forward.router.num_experts)]
    return [name.replace("mlp.experts.", expert) for name in names for expert in numbered]


# ---- in


def import_weights(options: ImportOptions) -> None:
    """Create a run directory: checkpoints with the weights of the file and a fresh optimizer."""
    run_dir, name = new_directory("run", options.run), f"file={options.file}"
    require(Path(options.file).is_file(), f"{name}: there is no such file")
    with opened(name, Path(options.file)) as file:
        metadata = file.metadata() or {}
        ours = "chargpt_format" in metadata
        if ours:
            check_own(options, name)
        source = own_source(name, metadata) if ours else foreign_source(options, file)
        header = at_step_0(*source)
        model = read_model(name, file, header, FLOATS[:1] if ours else FLOATS)
    write_run(run_dir, header, model)


def read_export(name: str, path: Path) -> tuple[checkpoint.Header, GPT]:
    """What `chargpt export` wrote; ConfigError, which begins with `name`, if it did not."""
    header = read_own_header(name, path)
    with opened(name, path) as file:
        return header, read_model(name, file, header, FLOATS[:1])


def read_own_header(name: str, path: Path) -> checkpoint.Header:
    """Only what such a file says about itself."""
    with opened(name, path) as file:
        metadata = file.metadata() or {}
    first = f"chargpt import file={path} run=NEW, then init_from=NEW"
    exported = "chargpt_format" in metadata
    require(exported, f"{name}: was not written by chargpt export; write {first}")
    return at_step_0(*own_source(name, metadata))


@contextlib.contextmanager
def opened(name: str, path: Path) -> Iterator[Any]:
    """A safetensors file; ConfigError if it cannot be read."""
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{name}: cannot be read as safetensors ({one_line(error)})") from None


def at_step_0(config: Config, vocabulary: str, sha256: str) -> checkpoint.Header:
    return checkpoint.Header(config, vocabulary, sha256, 0, 0.0, None, None, {}, {})


def new_directory(option: str, path: str) -> Path:
    taken = f"{option}={path}: exists already; write the name of a new one"
    require(not Path(path).exists(), taken)
    return Path(path)


def write_run(run_dir: Path, header: checkpoint.Header, model: GPT) -> None:
    """A run directory at step 0: checkpoints with `model`, a fresh optimizer, the configuration."""
    state = fresh_state(header.config, len(header.vocabulary), model)
    try:
        (run_dir / "checkpoints").mkdir(parents=True)
        for which in Which:
            checkpoint.save(checkpoint.file_of(run_dir, which), state, header)
        write_durably(run_dir / "config.yaml", to_yaml(header.config).encode())
    except OSError as error:
        raise ConfigError(f"{run_dir}: cannot be written ({error.strerror})") from None
    numbers = sum(leaf.size for leaf in array_leaves(model).values())
    described = f"{header.config.model.mha_type} attention, {len(header.vocabulary)} characters"
    note(f"{run_dir}: {numbers:,} parameters, {described}")


def fresh_state(config: Config, vocab_size: int, model: GPT) -> TrainState:
    """The state before the first step, with `model`; compiled, so no random weights are made."""

    def put(model: GPT) -> TrainState:
        state = init_state(config, vocab_size, config.seed)
        ema = None if state.ema is None else model
        return dataclasses.replace(state, model=model, ema=ema)

    return eqx.filter_jit(put)(model)


def check_own(options: ImportOptions, name: str) -> None:
    """Nothing is said about a file of `chargpt export` that it says itself."""
    for option in ("config", "dataset_name", "dataset_filepath", "dataset_seq_len"):
        spelled, given = option.replace("_", ".", 1), getattr(options, option)
        own = f"{name} has its own configuration and vocabulary; leave {spelled} out"
        require(given is None, f"{spelled}: {own}")


def own_source(name: str, metadata: dict[str, str]) -> Source:
    """What a file of `chargpt export` says about itself, checked as a checkpoint's header is."""
    version = metadata["chargpt_format"]
    known = f"this version of chargpt reads {FORMAT!r}"
    require(version == FORMAT, f"{name}: is of format {version!r}; {known}")
    try:
        vocabulary = json.loads(metadata["vocabulary"])
        ordered = isinstance(vocabulary, str) and sorted(set(vocabulary)) == list(vocabulary)
        require(ordered, "its vocabulary is not a sorted string of different characters")
        return from_plain(json.loads(metadata["config"])), vocabulary, metadata["corpus_sha256"]
    except Exception as error:
        reason = f"{one_line(error)} is missing" if isinstance(error, KeyError) else one_line(error)
        message = f"{name}: its metadata does not fit this version of chargpt ({reason})"
        raise ConfigError(message) from None


def foreign_source(options: ImportOptions, file: Any) -> Source:
    """What config.json says about a file of Llama architecture, and the vocabulary of a text."""
    no_text = "dataset.name: write the text whose characters are the vocabulary of the file"
    require(options.dataset_name is not None, no_text)
    dataset = {"name": options.dataset_name, "filepath": options.dataset_filepath}
    path = Path(options.config or Path(options.file).with_name("config.json"))
    config = from_llama(path, dataset, options.dataset_seq_len)
    corpus = load_corpus(config.dataset)
    table, name = NAMES["embedding"], f"file={options.file}"
    present = table in file.keys()  # noqa: SIM118 - not a mapping
    require(present, f"{name}: has no tensor {table}, which its configuration asks for")
    shape, characters = file.get_slice(table).get_shape(), len(corpus.tokenizer)
    other = f"has {characters} different characters, but {table} has shape {shape}"
    advice = "write the dataset.name that the model was trained on"
    require(shape[:1] == [characters], f"dataset {corpus.name}: {other}; {advice}")
    return config, corpus.tokenizer.vocabulary, corpus.sha256


def read_model(name: str, file: Any, header: checkpoint.Header, dtypes: Sequence[str]) -> GPT:
    """The model of `header` with the file's numbers; ConfigError if a tensor does not fit."""
    found = {tensor: file.get_slice(tensor) for tensor in file.keys()}  # noqa: SIM118
    config, layers = header.config, header.config.model.num_layers
    experts = config.model.num_experts or 1
    enough = layers * experts <= len(found)  # before a size that a stranger claims is built
    size = f"{layers} layers" + (f" of {experts} experts" if experts > 1 else "")
    require(enough, f"{name}: has {len(found)} tensors, too few for {size}")
    sizes = len(header.vocabulary), config.dataset.seq_len
    try:
        skeleton = eqx.filter_eval_shape(GPT, config.model, *sizes, key=random_key(0, Stream.init))
    except Exception as error:
        message = f"{name}: its configuration makes no model ({one_line(error)})"
        raise ConfigError(message) from None
    leaves = array_leaves(skeleton)
    names = {path: tensor_names(path, skeleton) for path in leaves}
    shapes: dict[str, tuple[int, ...]] = {}
    for path, leaf in leaves.items():
        shapes |= dict.fromkeys(names[path], leaf.shape[stack_axes(path) :])
    for tensor, shape in shapes.items():
        missing = f"has no tensor {tensor}, which its configuration asks for"
        require(tensor in found, f"{name}: {missing}")
        has, dtype = tuple(found[tensor].get_shape()), found[tensor].get_dtype()
        other = f"has shape {list(has)}, its configuration asks for {list(shape)}"
        require(has == shape, f"{name}: {tensor} {other}")
        readable = f"holds {dtype} numbers; {', '.join(dtypes)} can be read"
        require(dtype in dtypes, f"{name}: {tensor} {readable}")
    for tensor in found:
        extra = f"has a tensor {tensor!r}, which its configuration has no place for"
        require(tensor in shapes, f"{name}: {extra}")

    def fill(path: Any, leaf: Any) -> Any:
        if dotted(path) not in names:
            return leaf
        tensors = map(file.get_tensor, names[dotted(path)])
        parts = [np.asarray(tensor, np.float32) for tensor in tensors]
        return jnp.array(np.stack(parts).reshape(leaf.shape))

    return jax.tree_util.tree_map_with_path(fill, skeleton)
