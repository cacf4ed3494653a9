"""The typed configuration of a run: every option with its type, its rules, its neutral value.

configs/default.yaml holds the values and says what each option means. The dataclasses here are the
table of options: name, type, rules, and with `option(...)` the neutral value and how the option
behaves in a compiled step, on resume and in a comparison. This module does not need JAX, so that
bad input is answered at once.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from chargpt.errors import ConfigError, require

MAX_SEQ_LEN = (
    1 << 20
)  # longer attention scores fit in no memory; a stranger's file may claim anything
MAX_WARMUP = 100  # steps of warm-up by default, in a run that is long enough
REQUIRED = object()  # has been there from the beginning: a file without it is damaged


def shipped(folder: str) -> Path:
    """A folder that lies beside src/ in a checkout, and inside the package in a wheel."""
    inside = Path(__file__).parent / folder
    return inside if inside.is_dir() else Path(__file__).parents[2] / folder


CONFIGS = shipped("configs")


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


@dataclasses.dataclass(frozen=True)
class Option:
    """What the program must know about an option besides its type and its value."""

    neutral: Any = REQUIRED  # what the program did before the option existed
    traced: bool = (
        False  # an input of the compiled step: runs that differ in it share the executable
    )
    fixed: bool = False  # cannot change on resume: it would be another run
    incidental: bool = False  # changes neither what is learned nor how fast; not in a run's name


def option(neutral: Any = REQUIRED, **facts: bool) -> Any:
    """A field of the configuration, with what `Option` says about it."""
    return dataclasses.field(metadata={"option": Option(neutral, **facts)})


fixed = functools.partial(option, fixed=True)
traced = functools.partial(option, traced=True)
incidental = functools.partial(option, incidental=True)


def require_at_least(group: str, config: Any, minimum: int, names: Iterable[str]) -> None:
    """Every named field that is set is >= minimum; `group` is its parent on the command line."""
    for name in names:
        value = getattr(config, name)
        require(
            value is None or value >= minimum, f"{group}{name}={value}: must be at least {minimum}"
        )


def require_between(
    group: str, config: Any, low: float, high: float, names: Iterable[str], *, closed: str = ""
) -> None:
    """Every named field that is set is between the bounds, which only `closed` includes."""
    brackets = "[" if "low" in closed else "(", "]" if "high" in closed else ")"
    interval = f"{brackets[0]}{low:g}, {high:g}{brackets[1]}"
    for name in names:
        value = getattr(config, name)
        at_end = (value == low and "low" in closed) or (value == high and "high" in closed)
        good = value is None or (math.isfinite(value) and (low < value < high or at_end))
        require(good, f"{group}{name}={value}: must be a finite number in {interval}")


def require_divides(name: str, value: int | None, number: int, what: str) -> None:
    """`value`, if it is set, divides `number`."""
    if value is not None and number % value:
        # Up to more than any sensible choice: an absurd number is answered at once too.
        divisors = [str(d) for d in range(1, min(number, 4096) + 1) if number % d == 0]
        raise ConfigError(
            f"{name}={value}: does not divide {what}={number}; write one of {', '.join(divisors)}"
        )


@dataclasses.dataclass
class MLAConfig:
    q_lora_rank: int | None = fixed()
    kv_lora_rank: int = fixed()
    qk_nope_head_dim: int = fixed()
    qk_rope_head_dim: int = fixed()
    v_head_dim: int = fixed()

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self)]
        require_at_least("model.mla.", self, 1, names)


@dataclasses.dataclass
class ModelConfig:
    mha_type: AttentionType = fixed()
    d_model: int = fixed()
    num_layers: int = fixed()
    num_heads: int = fixed()
    num_kv_heads: int | None = fixed()
    head_dim: int | None = fixed()
    d_ff: int | None = fixed()
    match: Match = fixed("none")
    activation: Activation = fixed()
    norm: Norm = fixed()
    norm_position: NormPosition = fixed()
    rope: bool = fixed()
    rope_theta: float = fixed()
    learned_positions: bool = fixed(False)
    qk_norm: bool = fixed()
    dropout: float = fixed()
    tie_embeddings: bool = fixed(False)
    zero_init: bool = fixed(False)
    residual_scale: float = fixed(1.0)
    logit_softcap: float | None = fixed(None)
    mla: MLAConfig = fixed()

    def __post_init__(self) -> None:
        sizes = ["d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff"]
        require_at_least("model.", self, 1, sizes)
        numbers = ["rope_theta", "residual_scale", "logit_softcap"]
        require_between("model.", self, 0.0, math.inf, numbers)
        require_between("model.", self, 0.0, 1.0, ["dropout"], closed="low")
        require(
            not (self.zero_init and self.tie_embeddings),
            "model.zero_init=true: an output head of zeros cannot be the embedding; "
            "write model.tie_embeddings=false",
        )

    @property
    def ff_width(self) -> int:
        return 4 * self.d_model if self.d_ff is None else self.d_ff


@dataclasses.dataclass
class DatasetConfig:
    name: DatasetName = option()
    filepath: str | None = incidental()  # a text is known by its hash
    seq_len: int = fixed()
    sampling: Sampling = fixed("random")
    val_fraction: float = fixed()

    def __post_init__(self) -> None:
        require_at_least("dataset.", self, 1, ["seq_len"])
        require(
            self.seq_len <= MAX_SEQ_LEN,
            f"dataset.seq_len={self.seq_len}: must be at most {MAX_SEQ_LEN:,}",
        )
        require_between("dataset.", self, 0.0, 1.0, ["val_fraction"])
        if self.name is DatasetName.file:
            require(
                self.filepath is not None,
                "dataset.name=file: needs a text; write dataset.filepath=PATH",
            )
        else:
            require(
                self.filepath is None,
                f"dataset.filepath={self.filepath}: is read only with dataset.name=file, "
                f"not {self.name.name}",
            )


@dataclasses.dataclass
class OptimizerConfig:
    name: OptimizerName = fixed()
    learning_rate: float = traced()
    adam_learning_rate: float | None = traced(None)
    weight_decay: float = traced()
    momentum: float = option(0.95)
    newton_schulz_steps: int = option(5)
    beta1: float = option()
    beta2: float = option()
    eps: float = option(1e-8)
    grad_clip: float | None = option()
    schedule: Schedule = option()
    warmup_steps: int | None = traced()
    decay_fraction: float = traced(0.2)
    final_lr_fraction: float = traced(0.1)
    ema_decay: float | None = fixed(None)

    def __post_init__(self) -> None:
        positive = ["learning_rate", "adam_learning_rate", "eps", "grad_clip"]
        shares = ["beta1", "beta2", "momentum", "ema_decay"]
        fractions = ["decay_fraction", "final_lr_fraction"]
        require_between("optimizer.", self, 0.0, math.inf, positive)
        require_between("optimizer.", self, 0.0, math.inf, ["weight_decay"], closed="low")
        require_between("optimizer.", self, 0.0, 1.0, shares, closed="low")
        require_between("optimizer.", self, 0.0, 1.0, fractions, closed="low high")
        require_at_least("optimizer.", self, 0, ["warmup_steps"])
        require_at_least("optimizer.", self, 1, ["newton_schulz_steps"])
        require(
            self.adam_learning_rate is None or self.name is OptimizerName.muon,
            f"optimizer.adam_learning_rate={self.adam_learning_rate}: is read only with "
            "optimizer.name=muon; write optimizer.learning_rate",
        )


@dataclasses.dataclass
class TrainerConfig:
    num_steps: int = traced()
    batch_size: int = option()
    grad_accum_steps: int = option(1)
    num_devices: int | None = option(1)
    precision: Precision = option()
    log_every: int = incidental()
    eval_every: int = option()
    eval_tokens: int | None = option(None)
    checkpoint_every: int = incidental()
    sample_chars: int = incidental(400)
    max_skipped_steps: int = incidental(10)

    def __post_init__(self) -> None:
        names = {field.name for field in dataclasses.fields(self)} - {"precision", "sample_chars"}
        require_at_least("trainer.", self, 1, sorted(names))
        require_at_least("trainer.", self, 0, ["sample_chars"])
        name = "trainer.grad_accum_steps"
        require_divides(name, self.grad_accum_steps, self.batch_size, "trainer.batch_size")
        share = self.batch_size // self.grad_accum_steps
        what = "trainer.batch_size / trainer.grad_accum_steps"
        require_divides("trainer.num_devices", self.num_devices, share, what)


@dataclasses.dataclass
class WandbConfig:
    project: str = incidental()
    entity: str | None = incidental()
    group: str | None = incidental()
    name: str = incidental()
    tags: list[str] = incidental([])

    def __post_init__(self) -> None:  # OmegaConf lets lists inside a list through
        texts = all(isinstance(tag, str) for tag in self.tags)
        require(texts, f"wandb.tags={self.tags}: must be a list of plain texts")


@dataclasses.dataclass
class Config:
    mode: Mode = incidental()
    seed: int = option(traced=True, fixed=True)
    resume: str | None = incidental(None)
    model: ModelConfig = option()
    dataset: DatasetConfig = option()
    optimizer: OptimizerConfig = option()
    trainer: TrainerConfig = option()
    wandb: WandbConfig = option()

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, f"seed={self.seed}: must be in [0, 2^32)")
        steps = self.trainer.num_steps
        require(
            self.warmup_steps <= steps,
            f"optimizer.warmup_steps={self.warmup_steps}: is longer than the run; "
            f"write null, or at most trainer.num_steps={steps}",
        )
        require(
            self.dataset.sampling is Sampling.random or steps * self.trainer.batch_size < 2**31,
            "dataset.sampling=epochs: counts at most 2^31 sequences; "
            "write dataset.sampling=random, or fewer steps",
        )

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up: those configured, or a tenth of the run, at most MAX_WARMUP."""
        configured = self.optimizer.warmup_steps
        return min(MAX_WARMUP, self.trainer.num_steps // 10) if configured is None else configured


@functools.cache
def options(
    schema: type = Config, prefix: str = ""
) -> dict[str, tuple[dataclasses.Field[Any], Option]]:
    """(field, facts) of every option by its dotted name; groups such as `model` are not options."""
    found: dict[str, tuple[dataclasses.Field[Any], Option]] = {}
    for field in dataclasses.fields(schema):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            found |= options(field.type, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = field, field.metadata["option"]
    return found


def to_plain(config: Config) -> dict[str, Any]:
    """The configuration as JSON-able data, enums by name."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def to_yaml(config: Config) -> str:
    """The configuration as config.yaml holds it."""
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(config)))


def from_plain(plain: dict[str, Any]) -> Config:
    """The configuration that `to_plain` of this version or of an earlier one made, rules checked.

    What the file does not know has its neutral value. Anything but plain values is refused.
    """
    require("${" not in str(plain), "a saved configuration holds plain values, no ${...}")
    neutral = OmegaConf.create()
    for name, (_, facts) in options().items():
        if facts.neutral is not REQUIRED:
            OmegaConf.update(neutral, name, facts.neutral)
    merged = OmegaConf.merge(OmegaConf.structured(Config), neutral, plain)
    assert isinstance(merged, DictConfig)
    return typed(merged)


def typed(settings: DictConfig) -> Config:
    """Settings under our schema as a Config; ConfigError if a rule is broken."""
    try:
        config = OmegaConf.to_object(settings)
    except ConfigError as error:  # without the lines that OmegaConf adds
        raise ConfigError(str(error).split("\n")[0]) from None
    assert isinstance(config, Config)
    for name, value in flatten(dataclasses.asdict(config)).items():
        require("${" not in str(value), f"{name}={value}: a saved configuration may not hold ${{")
    return config


def flatten(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names, as the command line spells them."""
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        nested = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def settings_of(config: Config) -> dict[str, Any]:
    """Every option's value, as JSON has it, by dotted name."""
    return flatten(to_plain(config))


def differences(config: Config) -> dict[str, Any]:
    """The settings that differ from configs/default.yaml, without those computed from others."""
    default: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "default.yaml"))
    usual = {name: value for name, value in flatten(default).items() if "${" not in str(value)}
    chosen = settings_of(config)
    return {name: chosen[name] for name in chosen if name in usual and chosen[name] != usual[name]}


def spell(value: Any) -> str:
    """A value as the command line has it."""
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    return value.name if isinstance(value, Enum) else str(value)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean …?" for the nearest known word or last part of a name, if one is near."""
    known = list(known)
    last_part = [name for name in known if name.rpartition(".")[2] == word.rpartition(".")[2]]
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    near = last_part if len(last_part) == 1 else near
    return f"; did you mean {near[0]}?" if near else ""
