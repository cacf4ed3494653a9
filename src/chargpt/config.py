"""The typed schema of a run, and every rule that its values must keep.

configs/default.yaml holds the values and says what each option means; the dataclasses here hold names, types and rules, so
that bad input is answered in one line before JAX is even imported. From `parse` on, there are only typed objects.
"""

import dataclasses
import difflib
import hashlib
import math
import re
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

MAX_SEQ_LEN = 1 << 20  # attention scores of more characters fit in no memory; a stranger's checkpoint may claim anything
CONFIGS = Path(__file__).parents[2] / "configs"


class ConfigError(ValueError):
    """Input that a person can mend. Its text is one line: what is wrong, and what to write instead."""


class AttentionType(Enum):
    standard = "standard"
    selective = "selective"
    mqa = "mqa"
    gqa = "gqa"
    mla = "mla"
    equinox = "equinox"

    def __str__(self) -> str:
        return self.name  # what ${model.mha_type} becomes in a run's name


class Activation(Enum):
    relu = "relu"
    gelu = "gelu"
    relu2 = "relu2"
    swiglu = "swiglu"


class Norm(Enum):
    rmsnorm = "rmsnorm"
    layernorm = "layernorm"


class NormPosition(Enum):
    pre = "pre"
    post = "post"


class DatasetName(Enum):
    shakespeare = "shakespeare"
    tinyshakespeare = "tinyshakespeare"
    file = "file"


class Match(Enum):
    none = "none"
    params = "params"


class Sampling(Enum):
    random = "random"
    epochs = "epochs"


class OptimizerName(Enum):
    adamw = "adamw"
    muon = "muon"


class Schedule(Enum):
    cosine = "cosine"
    wsd = "wsd"
    constant = "constant"


class Precision(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Mode(Enum):
    offline = "offline"
    online = "online"
    disabled = "disabled"


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def require_at_least(group: str, config: Any, minimum: int, names: Iterable[str]) -> None:
    """Every named field that is set is a number >= minimum; `group` is how the command line spells its parent."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value >= minimum, f"{group}{name}={value}: must be at least {minimum}")


def require_between(group: str, config: Any, low: float, high: float, names: Iterable[str], *, closed: str = "") -> None:
    """Every named field that is set is finite and strictly between the bounds; `closed` names bounds that are allowed."""
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        inside = low < value < high or (value == low and "low" in closed) or (value == high and "high" in closed)
        interval = f"{'[' if 'low' in closed else '('}{low:g}, {high:g}{']' if 'high' in closed else ')'}"
        require(math.isfinite(value) and inside, f"{group}{name}={value}: must be a finite number in {interval}")


@dataclasses.dataclass
class MLAConfig:
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    def __post_init__(self) -> None:
        require_at_least("model.mla.", self, 1, [field.name for field in dataclasses.fields(self)])


@dataclasses.dataclass
class ModelConfig:
    mha_type: AttentionType
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None
    head_dim: int | None
    d_ff: int | None
    match: Match
    activation: Activation
    norm: Norm
    norm_position: NormPosition
    rope: bool
    rope_theta: float
    learned_positions: bool
    qk_norm: bool
    dropout: float
    tie_embeddings: bool
    zero_init: bool
    residual_scale: float
    logit_softcap: float | None
    mla: MLAConfig

    def __post_init__(self) -> None:
        require_at_least("model.", self, 1, ["d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff"])
        require_between("model.", self, 0.0, math.inf, ["rope_theta", "residual_scale", "logit_softcap"])
        require_between("model.", self, 0.0, 1.0, ["dropout"], closed="low")
        kind = self.mha_type.name
        require(
            not (self.zero_init and self.tie_embeddings),
            "model.zero_init=true: an output head of zeros cannot be the embedding; write model.tie_embeddings=false",
        )
        if self.head_dim is not None:
            require(
                self.mha_type in GROUPED,
                f"model.head_dim={self.head_dim}: {kind} attention has heads of "
                + ("model.mla.*_head_dim" if self.mha_type is AttentionType.mla else "d_model / num_heads")
                + "; write model.head_dim=null",
            )
        elif self.mha_type is not AttentionType.mla:
            require(
                self.d_model % self.num_heads == 0,
                f"model.num_heads={self.num_heads}: does not divide model.d_model={self.d_model}; "
                f"write one of {', '.join(map(str, divisors(self.d_model)))}",
            )
        if self.mha_type is AttentionType.gqa:
            require(
                self.num_heads % self.kv_heads == 0,
                f"model.num_kv_heads={self.kv_heads}: does not divide model.num_heads={self.num_heads}; "
                f"write one of {', '.join(map(str, divisors(self.num_heads)))}",
            )
        if self.rope:
            name, width = ("model.mla.qk_rope_head_dim", self.mla.qk_rope_head_dim)
            if self.mha_type is not AttentionType.mla:
                name = "model.head_dim" if self.mha_type in GROUPED else "model.d_model / model.num_heads"
                width = self.head_width
            require(
                width % 2 == 0,
                f"{name}={width}: RoPE turns pairs of numbers, so it must be even; or write model.rope=false",
            )
        if self.qk_norm:
            reason = {
                AttentionType.selective: "its keys must stay linear in query and token, or they cannot be factorised",
                AttentionType.mla: "normalised keys cannot be absorbed into the query",
                AttentionType.equinox: "eqx.nn.MultiheadAttention is the reference as it is",
            }.get(self.mha_type)
            require(reason is None, f"model.qk_norm=true: {kind} attention has none ({reason}); write model.qk_norm=false")

    @property
    def head_width(self) -> int:
        """Width of one head's queries and values where the type has one: head_dim, or d_model / num_heads."""
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        """Key/value heads of standard, gqa and mqa; gqa without a number takes half of the query heads."""
        match self.mha_type:
            case AttentionType.mqa:
                return 1
            case AttentionType.gqa:
                return max(1, self.num_heads // 2) if self.num_kv_heads is None else self.num_kv_heads
            case _:
                return self.num_heads

    @property
    def ff_width(self) -> int:
        return 4 * self.d_model if self.d_ff is None else self.d_ff


GROUPED = (AttentionType.standard, AttentionType.gqa, AttentionType.mqa)


def divisors(number: int) -> list[int]:
    """The divisors of `number`, up to more than any sensible choice: an absurd number is answered at once too."""
    return [candidate for candidate in range(1, min(number, 4096) + 1) if number % candidate == 0]


@dataclasses.dataclass
class DatasetConfig:
    name: DatasetName
    filepath: str | None
    seq_len: int
    sampling: Sampling
    val_fraction: float

    def __post_init__(self) -> None:
        require_at_least("dataset.", self, 1, ["seq_len"])
        require(self.seq_len <= MAX_SEQ_LEN, f"dataset.seq_len={self.seq_len}: must be at most {MAX_SEQ_LEN:,}")
        require_between("dataset.", self, 0.0, 1.0, ["val_fraction"])
        if self.name is DatasetName.file:
            require(self.filepath is not None, "dataset.name=file: needs a text; write dataset.filepath=PATH")
        else:
            require(
                self.filepath is None,
                f"dataset.filepath={self.filepath}: is read only with dataset.name=file, not {self.name.name}",
            )


@dataclasses.dataclass
class OptimizerConfig:
    name: OptimizerName
    learning_rate: float
    adam_learning_rate: float | None
    weight_decay: float
    momentum: float
    newton_schulz_steps: int
    beta1: float
    beta2: float
    eps: float
    grad_clip: float | None
    schedule: Schedule
    warmup_steps: int
    decay_fraction: float
    final_lr_fraction: float
    ema_decay: float | None

    def __post_init__(self) -> None:
        require_between("optimizer.", self, 0.0, math.inf, ["learning_rate", "adam_learning_rate", "eps", "grad_clip"])
        require_between("optimizer.", self, 0.0, math.inf, ["weight_decay"], closed="low")
        require_between("optimizer.", self, 0.0, 1.0, ["beta1", "beta2", "momentum", "ema_decay"], closed="low")
        require_between("optimizer.", self, 0.0, 1.0, ["decay_fraction", "final_lr_fraction"], closed="low high")
        require_at_least("optimizer.", self, 0, ["warmup_steps"])
        require_at_least("optimizer.", self, 1, ["newton_schulz_steps"])
        require(
            self.adam_learning_rate is None or self.name is OptimizerName.muon,
            f"optimizer.adam_learning_rate={self.adam_learning_rate}: is read only with optimizer.name=muon; "
            "write optimizer.learning_rate",
        )


@dataclasses.dataclass
class TrainerConfig:
    num_steps: int
    batch_size: int
    grad_accum_steps: int
    num_devices: int | None
    precision: Precision
    log_every: int
    eval_every: int
    eval_tokens: int | None
    checkpoint_every: int
    sample_chars: int
    max_skipped_steps: int

    def __post_init__(self) -> None:
        positive = ["num_steps", "batch_size", "grad_accum_steps", "log_every", "eval_every", "eval_tokens"]
        require_at_least("trainer.", self, 1, [*positive, "num_devices", "checkpoint_every", "max_skipped_steps"])
        require_at_least("trainer.", self, 0, ["sample_chars"])
        require(
            self.batch_size % self.grad_accum_steps == 0,
            f"trainer.grad_accum_steps={self.grad_accum_steps}: does not divide trainer.batch_size={self.batch_size}; "
            f"write one of {', '.join(map(str, divisors(self.batch_size)))}",
        )
        share = self.batch_size // self.grad_accum_steps
        require(
            self.num_devices is None or share % self.num_devices == 0,
            f"trainer.num_devices={self.num_devices}: cannot share {share} sequences evenly; "
            f"write one of {', '.join(map(str, divisors(share)))}",
        )


@dataclasses.dataclass
class WandbConfig:
    project: str
    entity: str | None
    group: str | None
    name: str
    tags: list[str]

    def __post_init__(self) -> None:  # OmegaConf lets lists inside of a list through
        require(all(isinstance(tag, str) for tag in self.tags), f"wandb.tags={self.tags}: must be a list of plain texts")


@dataclasses.dataclass
class Config:
    mode: Mode
    seed: int
    resume: str | None
    model: ModelConfig
    dataset: DatasetConfig
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    wandb: WandbConfig

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, f"seed={self.seed}: must be in [0, 2^32)")
        warmup, steps = self.optimizer.warmup_steps, self.trainer.num_steps
        require(
            warmup <= steps,
            f"optimizer.warmup_steps={warmup}: is longer than the run; write at most trainer.num_steps={steps}",
        )
        require(
            self.dataset.sampling is Sampling.random or steps * self.trainer.batch_size < 2**31,
            "dataset.sampling=epochs: counts at most 2^31 sequences; write dataset.sampling=random, or fewer steps",
        )


def run_dir(resume: str | None, fresh: str) -> str:
    """Where a run lives: the directory that it continues in, or a fresh one."""
    if resume is None:
        return fresh
    require((Path(resume) / "config.yaml").is_file(), f"resume={resume}: is no run directory (it has no config.yaml)")
    return resume


UNTOLD = re.compile(r"[+~]|(mode|resume|experiment|launcher)=|wandb\.|dataset\.file")  # not in a run's name


def run_name(base: Any) -> str:
    """What sets a run apart: `base`, and the settings that were typed for it, in a sweep those that its jobs differ in."""
    typed = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    common = {f"model.mha_type={base}"}
    if in_sweep():
        with open(Path(HydraConfig.get().sweep.dir) / "multirun.yaml", encoding="utf-8") as file:  # Hydra's, of the whole sweep
            common |= {setting.lower() for setting in OmegaConf.load(file).hydra.overrides.task}
    telling = [setting for setting in typed if setting.lower() not in common and not UNTOLD.match(setting)]
    return " ".join([str(base), *(re.sub(r"^[^=]*\.", "", setting) for setting in telling)])


def in_sweep() -> bool:
    """Whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def run_group(name: str) -> str:
    """What runs are shown together: those of one sweep, or of one name but for their seeds."""
    return Path(HydraConfig.get().sweep.dir).name if in_sweep() else re.sub(r" seed=\d+", "", name)


def sweep_dir(overrides: Iterable[str]) -> str:
    """Where a sweep lives: it follows from what was typed, so that the same command goes on with it."""
    typed = " ".join(setting for setting in overrides if not setting.startswith(("mode=", "launcher=")))  # they change no job
    short = re.sub(r"\b(experiment=|model\.|trainer\.|optimizer\.|dataset\.)", "", typed)
    return f"multirun/{slug(short)[:48]}-{hashlib.sha256(typed.encode()).hexdigest()[:8]}"


def slug(name: str) -> str:
    """`name` as a plain folder name: it can neither leave its parent nor needs it quotes, for a shell or for Hydra."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip(".-")[:80] or "run"


def parse(composed: DictConfig) -> Config:
    """The typed configuration of what Hydra composed; ConfigError where a rule is broken."""
    try:
        config = OmegaConf.to_object(composed)
    except ConfigError as error:
        raise ConfigError(str(error).split("\n")[0]) from None  # without the lines that OmegaConf adds
    assert isinstance(config, Config)
    for name, value in flatten(dataclasses.asdict(config)).items():
        require("${" not in str(value), f"{name}={value}: holds ${{, which a saved configuration may not; write it without")
    return config


def to_plain(config: Config) -> dict[str, Any]:
    """The configuration as JSON-able data, enums by name."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def from_plain(plain: dict[str, Any]) -> Config:
    """The configuration that `to_plain` made, all rules checked again; what only looks like one is refused, not obeyed."""
    require("${" not in str(plain), "a saved configuration holds plain values, no ${...}")
    merged = OmegaConf.merge(OmegaConf.structured(Config), plain)
    assert isinstance(merged, DictConfig)
    return parse(merged)


def flatten(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names, as the command line spells them."""
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def differences(config: Config) -> dict[str, Any]:
    """The settings that differ from configs/default.yaml, by dotted name; those that follow others there are left out."""
    default: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "default.yaml"))
    chosen, usual = flatten(to_plain(config)), flatten(default)
    return {name: value for name, value in chosen.items() if value != usual[name] and not str(usual[name]).startswith("${")}


def spell(value: Any) -> str:
    """A value as the command line has it."""
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    return value.name if isinstance(value, Enum) else str(value)


def quoted(text: str) -> str:
    """A text as the value of an override: in quotes where Hydra would read something else."""
    if re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./+-]*", text) and text.lower() not in ("null", "true", "false", "nan", "inf"):
        return text
    # a backslash is one, but before a quotation mark it guards what follows
    guarded = re.sub(r"(\\*)('|\Z)", lambda end: end[1] * 2 + end[2].replace("'", "\\'"), text)
    return f"'{guarded}'"


def option_names(schema: type = Config, prefix: str = "") -> list[str]:
    """Every dotted name of the schema, groups such as `model` among them."""
    names = []
    for field in dataclasses.fields(schema):
        names.append(prefix + field.name)
        if dataclasses.is_dataclass(field.type):
            names += option_names(field.type, f"{prefix}{field.name}.")  # type: ignore[arg-type]
    return names


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean …?" for the nearest known word, or for a dotted name's last part alone; empty where none is near."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    last_part = [name for name in known if name.rpartition(".")[2] == word.rpartition(".")[2]]
    near = (last_part if len(last_part) == 1 else []) or near
    return f"; did you mean {near[0]}?" if near else ""


def hydra_files(resume: str | None) -> str | None:
    """Where Hydra writes its files: a resumed run keeps those of its beginning."""
    return ".hydra" if resume is None else None


# Known to Hydra as soon as this is imported: a job of a sweep may be composed in a process that never sees main.py.
ConfigStore.instance().store(name="schema", node=Config)
for resolver in (slug, run_dir, run_name, run_group, sweep_dir, hydra_files):
    OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
