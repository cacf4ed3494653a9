"""Hugging Face's Llama models: which of them our model can be, and with which configuration."""

import inspect
import json
import math
from pathlib import Path
from typing import Any

import equinox as eqx

from chargpt.compose import change, compose
from chargpt.config import Activation, AttentionType, Config, Norm, NormPosition
from chargpt.errors import ConfigError, one_line, require

MAX_CONFIG_BYTES = 1 << 20


def from_llama(path: Path, dataset: dict[str, Any], seq_len: int | None) -> Config:
    """The configuration of the model that config.json describes; ConfigError if ours is not that.

    `dataset` are options of ours, by name: the text whose characters are the vocabulary. `seq_len`
    is a context shorter than the file's max_position_embeddings.
    """
    llama = LlamaConfig(path)
    limit = llama.whole("max_position_embeddings", 2048)
    seq_len = limit if seq_len is None else seq_len
    rule = f"must be in [1, {limit}], the file's max_position_embeddings"
    require(1 <= seq_len <= limit, f"dataset.seq_len={seq_len}: {rule}")
    heads = llama.whole("num_attention_heads")
    kv_heads = llama.whole("num_key_value_heads", heads)
    kinds = {1: AttentionType.mqa, heads: AttentionType.standard}
    kind = kinds.get(kv_heads, AttentionType.gqa)
    model = {
        "mha_type": kind,
        "d_model": llama.whole("hidden_size"),
        "num_layers": llama.whole("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": kv_heads if kind is AttentionType.gqa else None,
        "head_dim": llama.whole("head_dim", llama.whole("hidden_size") // heads),
        "d_ff": llama.whole("intermediate_size"),
        "activation": Activation.swiglu,
        "norm": Norm.rmsnorm,
        "norm_position": NormPosition.pre,
        "rope": True,
        "rope_theta": llama.rope_theta(),
        "learned_positions": False,
        "qk_norm": False,
        "tie_embeddings": llama.flag("tie_word_embeddings"),
    }
    values = {f"model.{name}": value for name, value in model.items()}
    values |= {f"dataset.{name}": value for name, value in dataset.items()}
    return change(compose(), values | {"dataset.seq_len": seq_len, "wandb.name": kind.name})


# Read off its signature: making one would make an array, and so choose the devices
NORM_EPS = inspect.signature(eqx.nn.RMSNorm).parameters["eps"].default
# {field: (the value of our model, Hugging Face's default, why no other can be imported)}
OURS: dict[str, tuple[Any, Any, str]] = {
    "model_type": ("llama", None, "only llama can be imported"),
    "architectures": (*2 * (["LlamaForCausalLM"],), "only LlamaForCausalLM can be imported"),
    "partial_rotary_factor": (1, 1, "our RoPE rotates all of a head"),
    "attention_bias": (False, False, "our projections have no biases"),
    "mlp_bias": (False, False, "our projections have no biases"),
    "hidden_act": ("silu", "silu", "our gated activation is silu"),
    "rms_norm_eps": (NORM_EPS, 1e-6, f"our norm uses {NORM_EPS:g}"),
    "sliding_window": (None, None, "our model has none"),
    "quantization_config": (None, None, "our model has none"),
    "use_sliding_window": (False, False, "our attention reads the whole context"),
}


class LlamaConfig:
    """Hugging Face's config.json of a Llama model; ConfigError if ours is not that model.

    A field that the file lacks has the value that Hugging Face's LlamaConfig gives it.
    """

    def __init__(self, path: Path):
        self.name = f"config={path}"
        missing = "there is no such file; write config=PATH of Hugging Face's config.json"
        require(path.is_file(), f"{self.name}: {missing}")
        small = path.stat().st_size <= MAX_CONFIG_BYTES
        require(small, f"{self.name}: is too large for a configuration")
        try:
            self.fields = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{self.name}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{self.name}: is not JSON ({one_line(error)})") from None
        require(isinstance(self.fields, dict), f"{self.name}: is not a JSON object")
        for name, (ours, default, reason) in OURS.items():
            value = self.get(name, default)
            same_kind = isinstance(value, bool) == isinstance(ours, bool)
            self._refuse(name, same_kind and value == ours, reason, value)
        layers = self.get("layer_types", [])
        full = isinstance(layers, list) and all(layer == "full_attention" for layer in layers)
        self._refuse("layer_types", full, "our attention reads the whole context")
        for name in ("rope_scaling", "rope_parameters"):
            rope = self.get(name, {})
            plain = isinstance(rope, dict) and set(rope) <= {"rope_type", "type", "rope_theta"}
            kind = rope.get("rope_type", rope.get("type", "default")) if plain else None
            self._refuse(name, kind == "default", "our RoPE is neither scaled nor partial")

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or `default` if it is null or missing."""
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
        number = isinstance(value, int | float) and not isinstance(value, bool)
        good = number and math.isfinite(value) and value > 0
        self._refuse("rope_theta", good, "must be a number above 0", value)
        return float(value)

    def _refuse(self, name: str, good: bool, reason: str, value: Any = None) -> None:
        """ConfigError with the value, as the file or its default has it, unless it is good."""
        value = self.fields.get(name) if value is None else value
        require(good, f"{self.name}: {name}={json.dumps(value)[:100]}: {reason}")
