"""Weights leave and enter as safetensors files, under the names that the field gives them.

Hugging Face's Llama names for everything that has one, Qwen3's for QK-norm, DeepSeek-V2's for MLA; our leaves are stacked
over the layers, the file has one tensor per layer. The rotary halves of MLA lie as in Llama: DeepSeek's own files interleave
them. Reading is safe: safetensors holds numbers alone, the library checks every offset against the file's size, and every
shape is checked against the model's before a number is read.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from chargpt import checkpoint
from chargpt.config import (
    Activation,
    AttentionType,
    Config,
    ConfigError,
    DatasetConfig,
    DatasetName,
    Norm,
    NormPosition,
    from_plain,
    require,
    to_plain,
)
from chargpt.corpus import CharTokenizer, load_corpus
from chargpt.model import GPT
from chargpt.space import compose_config
from chargpt.tools import Which, note, open_run
from chargpt.train import Stream, TrainState, init_state, random_key

FORMAT = "2"
MAX_CONFIG_BYTES = 1 << 20
FLOATS = ("F32", "F16", "BF16")  # numpy knows the last one once JAX is imported

NAMES = {
    "embedding": "model.embed_tokens.weight",
    "position_embedding": "model.embed_positions.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
BLOCK_NAMES = {  # how names within a block begin; the first that fits
    "attention.mha.query_proj.": "self_attn.q_proj.",
    "attention.mha.key_proj.": "self_attn.k_proj.",
    "attention.mha.value_proj.": "self_attn.v_proj.",
    "attention.mha.output_proj.": "self_attn.o_proj.",
    "attention.q_a_norm.": "self_attn.q_a_layernorm.",
    "attention.kv_a_proj.": "self_attn.kv_a_proj_with_mqa.",
    "attention.kv_a_norm.": "self_attn.kv_a_layernorm.",
    "attention.": "self_attn.",
    "feed_forward.": "mlp.",
    "attention_norm.": "input_layernorm.",
    "feed_forward_norm.": "post_attention_layernorm.",
}


@dataclasses.dataclass
class ExportOptions:
    """The weights of a trained model as a safetensors file, under Hugging Face's names."""

    run: str | None = None  # run directory; the newest one when left out
    checkpoint: Which = Which.best  # best | last
    file: str = ""  # the file to write

    def __post_init__(self) -> None:
        require(self.file != "", "file: is missing; write file=OUT.safetensors")


@dataclasses.dataclass
class ImportOptions:
    """A run directory, at step 0, from a safetensors file: one of `chargpt export`, or any of Llama architecture."""

    file: str = ""  # the file to read
    run: str = ""  # the directory to make
    config: str | None = None  # Hugging Face's configuration; config.json beside the file when left out
    dataset_name: DatasetName | None = None  # of a foreign file: the text whose characters, sorted, are its vocabulary
    dataset_filepath: str | None = None  # with dataset.name=file
    dataset_seq_len: int | None = None  # of a foreign file: a context shorter than its max_position_embeddings

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
    note(f"{run_dir}, {options.checkpoint.name} checkpoint, step {header.step}: {len(tensors)} tensors, {len(data):,} bytes")


def to_tensors(model: GPT) -> dict[str, np.ndarray]:
    """Every array of the model by its name in a file, the layers apart."""
    tensors = {}
    for path, leaf in array_leaves(model).items():
        numbers = np.asarray(leaf)
        parts = numbers if path.startswith("blocks.") else numbers[None]
        names = tensor_names(path, model.num_layers)
        tensors |= {name: np.ascontiguousarray(part) for name, part in zip(names, parts, strict=True)}
    return tensors


def array_leaves(model: GPT) -> dict[str, Any]:
    """Every array, or shape of one, by its dotted path."""
    leaves = jax.tree_util.tree_leaves_with_path(model)
    is_array = lambda leaf: isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)  # noqa: E731
    return {jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in leaves if is_array(leaf)}


def tensor_names(path: str, num_layers: int) -> list[str]:
    """The names in a file of the leaf at `path`: one per layer for a stacked one."""
    if not path.startswith("blocks."):
        return [NAMES[path]]
    path = path.removeprefix("blocks.")
    ours, theirs = next(pair for pair in BLOCK_NAMES.items() if path.startswith(pair[0]))
    return [f"model.layers.{i}.{theirs}{path.removeprefix(ours)}" for i in range(num_layers)]


# ---- in


def import_weights(options: ImportOptions) -> None:
    """Make a run directory whose checkpoints hold the weights of the file and a fresh optimizer."""
    run_dir = Path(options.run)
    require(not run_dir.exists(), f"run={run_dir}: exists already; write the name of a new directory")
    require(Path(options.file).is_file(), f"file={options.file}: there is no such file")
    try:
        with safe_open(options.file, framework="numpy") as file:
            metadata = file.metadata() or {}
            ours = "chargpt_format" in metadata
            header = own_header(options, metadata) if ours else foreign_header(options, file)
            model = read_model(options.file, file, header.config, len(header.vocabulary), foreign=not ours)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"file={options.file}: cannot be read as safetensors ({one_line(error)})") from None

    state = fresh_state(header.config, len(header.vocabulary), model)
    try:
        (run_dir / "checkpoints").mkdir(parents=True)
        for which in Which:
            checkpoint.save(run_dir / "checkpoints" / f"{which.name}.eqx", state, header)
        (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(to_plain(header.config))), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run={run_dir}: cannot be written ({error.strerror})") from None
    kind = header.config.model.mha_type.name
    numbers = sum(leaf.size for leaf in array_leaves(model).values())
    note(f"{run_dir}: {numbers:,} parameters, {kind} attention, {len(header.vocabulary)} characters")


def fresh_state(config: Config, vocab_size: int, model: GPT) -> TrainState:
    """The state before the first step with `model` in it; compiled, so that the random weights in its place are never made."""

    def put(model):
        state = eqx.tree_at(lambda state: state.model, init_state(config, vocab_size, config.seed), model)
        return state if state.ema is None else eqx.tree_at(lambda state: state.ema, state, model)

    return eqx.filter_jit(put)(model)


def own_header(options: ImportOptions, metadata: dict[str, str]) -> checkpoint.Header:
    """What a file of `chargpt export` says about itself, checked as a checkpoint's header is."""
    name = f"file={options.file}"
    for option in ("config", "dataset_name", "dataset_filepath", "dataset_seq_len"):
        spelled = option.replace("_", ".", 1)
        require(
            getattr(options, option) is None, f"{spelled}: {name} has its own configuration and vocabulary; leave {spelled} out"
        )
    found = metadata["chargpt_format"]
    require(found == FORMAT, f"{name}: is of format {found!r}; this version of chargpt reads {FORMAT!r}")
    try:
        vocabulary = json.loads(metadata["vocabulary"])
        if not isinstance(vocabulary, str) or CharTokenizer.from_text(vocabulary).vocabulary != vocabulary:
            raise ValueError("its vocabulary is not a sorted string of different characters")
        return fresh_header(from_plain(json.loads(metadata["config"])), vocabulary, str(metadata["corpus_sha256"]))
    except Exception as error:
        reason = f"{one_line(error)} is missing" if isinstance(error, KeyError) else one_line(error)
        raise ConfigError(f"{name}: its metadata does not fit this version of chargpt ({reason})") from None


def fresh_header(config: Config, vocabulary: str, corpus_sha256: str) -> checkpoint.Header:
    return checkpoint.Header(
        config=config,
        vocabulary=vocabulary,
        corpus_sha256=corpus_sha256,
        step=0,
        seconds=0.0,
        best_val_loss=None,
        best_step=None,
        versions={},
        record_sizes={},
    )


def read_model(name: str, file: Any, config: Config, vocab_size: int, *, foreign: bool) -> GPT:
    """The model that `config` describes with the file's numbers; ConfigError naming the first tensor that does not fit."""
    found = {tensor: file.get_slice(tensor) for tensor in file.keys()}  # noqa: SIM118 - no mapping
    layers = config.model.num_layers
    require(layers <= len(found), f"file={name}: has {len(found)} tensors, too few for {layers} layers")
    try:
        build = lambda: GPT(config.model, vocab_size, config.dataset.seq_len, key=random_key(0, Stream.init))  # noqa: E731
        skeleton = eqx.filter_eval_shape(build)
    except Exception as error:
        raise ConfigError(f"file={name}: its configuration makes no model ({one_line(error)})") from None
    leaves = array_leaves(skeleton)
    stacked = lambda path: path.startswith("blocks.")  # noqa: E731
    names = {path: tensor_names(path, layers) for path in leaves}
    expected = {
        tensor: leaf.shape[1:] if stacked(path) else leaf.shape for path, leaf in leaves.items() for tensor in names[path]
    }
    missing = [tensor for tensor in expected if tensor not in found]
    extra = [tensor for tensor in found if tensor not in expected]
    require(not missing, f"file={name}: has no tensor {(missing or [''])[0]}, which its configuration asks for")
    require(not extra, f"file={name}: has a tensor {(extra or [''])[0]!r}, which its configuration has no place for")
    dtypes = FLOATS if foreign else FLOATS[:1]
    for tensor, shape in expected.items():
        has = tuple(found[tensor].get_shape())
        require(has == shape, f"file={name}: {tensor} has shape {list(has)}, its configuration asks for {list(shape)}")
        dtype = found[tensor].get_dtype()
        require(dtype in dtypes, f"file={name}: {tensor} holds {dtype} numbers; {', '.join(dtypes)} can be read")

    def fill(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        parts = [np.asarray(file.get_tensor(tensor), np.float32) for tensor in names[jax.tree_util.keystr(path).lstrip(".")]]
        return jnp.array(np.stack(parts).reshape(leaf.shape))

    return jax.tree_util.tree_map_with_path(fill, skeleton)


# ---- in, from elsewhere


def foreign_header(options: ImportOptions, file: Any) -> checkpoint.Header:
    """The header for a file of Llama architecture: its shape from Hugging Face's config.json, its vocabulary from a text."""
    path = Path(options.file).with_name("config.json") if options.config is None else Path(options.config)
    llama = LlamaConfig(path)
    require(options.dataset_name is not None, "dataset.name: write the text whose characters are the vocabulary of the file")
    limit = llama.whole("max_position_embeddings", 2048)
    seq_len = limit if options.dataset_seq_len is None else options.dataset_seq_len
    require(1 <= seq_len <= limit, f"dataset.seq_len={seq_len}: must be in [1, {limit}], the file's max_position_embeddings")
    base = compose_config(("mode=offline",))
    dataset = DatasetConfig(
        name=options.dataset_name,
        filepath=options.dataset_filepath,
        seq_len=seq_len,
        sampling=base.dataset.sampling,
        val_fraction=base.dataset.val_fraction,
    )
    corpus = load_corpus(dataset)
    table = "model.embed_tokens.weight"
    require(table in file.keys(), f"file={options.file}: has no tensor {table}, which its configuration asks for")  # noqa: SIM118
    shape = file.get_slice(table).get_shape()
    characters = len(corpus.tokenizer)
    require(
        shape[:1] == [characters],
        f"dataset {dataset.name.name}: has {characters} different characters, but {table} has shape {shape}; "
        "write the dataset.name that the model was trained on",
    )
    heads, kv_heads = llama.whole("num_attention_heads"), llama.whole("num_key_value_heads", llama.whole("num_attention_heads"))
    kind = AttentionType.gqa
    if kv_heads in (heads, 1):
        kind = AttentionType.standard if kv_heads == heads else AttentionType.mqa
    model = dataclasses.replace(
        base.model,
        mha_type=kind,
        d_model=llama.whole("hidden_size"),
        num_layers=llama.whole("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads if kind is AttentionType.gqa else None,
        head_dim=llama.whole("head_dim", llama.whole("hidden_size") // heads),
        d_ff=llama.whole("intermediate_size"),
        activation=Activation.swiglu,
        norm=Norm.rmsnorm,
        norm_position=NormPosition.pre,
        rope=True,
        rope_theta=llama.rope_theta(),
        learned_positions=False,
        qk_norm=False,
        tie_embeddings=llama.flag("tie_word_embeddings"),
    )
    config = dataclasses.replace(base, model=model, dataset=dataset, wandb=dataclasses.replace(base.wandb, name=kind.name))
    return fresh_header(config, corpus.tokenizer.vocabulary, corpus.sha256)


class LlamaConfig:
    """Hugging Face's config.json of a Llama model; ConfigError where it asks for what our model does not do.

    What the file leaves out has the value that Hugging Face's LlamaConfig gives it.
    """

    NORM_EPS = eqx.nn.RMSNorm(1, use_bias=False).eps

    def __init__(self, path: Path):
        self.name = f"config={path}"
        require(path.is_file(), f"{self.name}: there is no such file; write config=PATH of Hugging Face's config.json")
        try:
            require(path.stat().st_size <= MAX_CONFIG_BYTES, f"{self.name}: is too large for a configuration")
            self.fields = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{self.name}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{self.name}: is no JSON ({one_line(error)})") from None
        require(isinstance(self.fields, dict), f"{self.name}: is no JSON object")
        self._refuse("model_type", self.get("model_type") == "llama", "llama alone can be imported")
        names = self.get("architectures", ["LlamaForCausalLM"])
        self._refuse("architectures", names == ["LlamaForCausalLM"], "LlamaForCausalLM alone can be imported")
        self._refuse("partial_rotary_factor", self.get("partial_rotary_factor", 1) == 1, "our RoPE turns all of a head")
        for name in ("attention_bias", "mlp_bias"):
            self._refuse(name, not self.flag(name), "our projections have no biases")
        self._refuse("hidden_act", self.get("hidden_act", "silu") == "silu", "our gated activation is silu")
        eps = self.get("rms_norm_eps", 1e-6)
        self._refuse("rms_norm_eps", eps == self.NORM_EPS, f"our norm uses {self.NORM_EPS:g}", eps)
        for name in ("sliding_window", "quantization_config"):
            self._refuse(name, self.get(name) is None, "our model has none")
        self._refuse("use_sliding_window", not self.flag("use_sliding_window"), "our attention reads the whole context")
        layers = self.get("layer_types", [])
        full = isinstance(layers, list) and all(layer == "full_attention" for layer in layers)
        self._refuse("layer_types", full, "our attention reads the whole context")
        for name in ("rope_scaling", "rope_parameters"):
            rope = self.get(name, {})
            plain = isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) == "default"
            plain = plain and set(rope) <= {"rope_type", "type", "rope_theta"}
            self._refuse(name, plain, "our RoPE is neither scaled nor partial")

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or `default` where it is null or left out."""
        value = self.fields.get(name)
        return default if value is None else value

    def whole(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        self._refuse(name, good, "must be a whole number of at least 1", value)
        return value

    def flag(self, name: str) -> bool:
        value = self.get(name, False)
        self._refuse(name, isinstance(value, bool), "must be true or false")
        return value

    def rope_theta(self) -> float:
        value = self.get("rope_parameters", {}).get("rope_theta", self.get("rope_theta", 10_000.0))
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        self._refuse("rope_theta", good, "must be a number above 0", value)
        return float(value)

    def _refuse(self, name: str, good: bool, reason: str, value: Any = None) -> None:
        """ConfigError with the value, as the file or its default has it, unless it is good."""
        if not good:
            value = self.fields.get(name) if value is None else value
            raise ConfigError(f"{self.name}: {name}={json.dumps(value)[:100]}: {reason}")


def one_line(error: Exception) -> str:
    """The text of an error on one line, without characters that a terminal would obey."""
    return "".join(character if character.isprintable() else "?" for character in " ".join(str(error).split()))
