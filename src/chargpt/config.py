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
from collections.abc import Iterable, Mapping
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import DictConfig, OmegaConf

from chargpt.errors import ConfigError, require

# Attention scores of longer contexts fit in no memory, and an imported file may claim anything.
MAX_SEQ_LEN = 1 << 20
MAX_WARMUP = 100  # steps of warm-up by default, in a run that is long enough
REQUIRED = object()  # the option has always existed: a file without it is damaged


def shipped(folder: str) -> Path:
    """A folder that is beside src/ in a checkout, and inside the package in a wheel."""
    inside = Path(__file__).parent / folder
    return inside if inside.is_dir() else Path(__file__).parents[2] / folder


CONFIGS = shipped("configs")


class AttentionType(StrEnum):
    standard = "standard"
    selective = "selective"
    mqa = "mqa"
    gqa = "gqa"
    mla = "mla"
    equinox = "equinox"


Activation = StrEnum("Activation", ["relu", "gelu", "relu2", "swiglu"])
Norm = StrEnum("Norm", ["rmsnorm", "layernorm"])
NormPosition = StrEnum("NormPosition", ["pre", "post"])
Positions = StrEnum("Positions", ["rope", "sinusoidal", "learned", "alibi", "none"])
OutputGate = StrEnum("OutputGate", ["none", "head", "element"])
Sink = StrEnum("Sink", ["none", "learned", "zero"])
Router = StrEnum("Router", ["softmax", "sigmoid_bias"])
DatasetName = StrEnum("DatasetName", ["shakespeare", "tinyshakespeare", "file"])
Match = StrEnum("Match", ["none", "params"])
Sampling = StrEnum("Sampling", ["random", "epochs"])
OptimizerName = StrEnum("OptimizerName", ["adamw", "muon"])
Schedule = StrEnum("Schedule", ["cosine", "wsd", "constant"])
Precision = StrEnum("Precision", ["float32", "bfloat16"])
Mode = StrEnum("Mode", ["offline", "online", "disabled"])


@dataclasses.dataclass(frozen=True)
class Option:
    """What the program must know about an option in addition to its type and its value."""

    neutral: Any = REQUIRED  # what the program did before the option existed
    least: int | None = None  # the smallest value allowed
    within: tuple[float, float, str] | None = None  # (low, high, closed) of require_between
    # An input of the compiled step: runs that differ in it share the executable
    traced: bool = False
    fixed: bool = False  # cannot change on resume: it would be another run
    incidental: bool = False  # changes neither what is learned nor how fast; not in a run's name


POSITIVE = (0.0, math.inf, "")
NOT_NEGATIVE = (0.0, math.inf, "low")
BELOW_ONE = (0.0, 1.0, "low")
FRACTION = (0.0, 1.0, "low high")


def option(neutral: Any = REQUIRED, **facts: Any) -> Any:
    """A field of the configuration, with what `Option` says about it."""
    return dataclasses.field(metadata={"option": Option(neutral, **facts)})


fixed = functools.partial(option, fixed=True)
traced = functools.partial(option, traced=True)
incidental = functools.partial(option, incidental=True)


def require_at_least(group: str, config: Any, minimum: int, names: Iterable[str]) -> None:
    """Every named field that is set is >= minimum; `group` is its parent on the command line."""
    for name in names:
        value = getattr(config, name)
        rule = f"must be at least {minimum}"
        require(value is None or value >= minimum, f"{group}{name}={value}: {rule}")


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
        # No divisors beyond any sensible choice, so that an absurd number is answered at once too
        divisors = [str(d) for d in range(1, min(number, 4096) + 1) if number % d == 0]
        rule = f"does not divide {what}={number}; write one of {', '.join(divisors)}"
        raise ConfigError(f"{name}={value}: {rule}")


@dataclasses.dataclass
class Group:
    """Options whose names begin with `prefix`; a value out of range is a ConfigError."""

    prefix: ClassVar[str]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            facts = field.metadata["option"]
            if facts.least is not None:
                require_at_least(self.prefix, self, facts.least, [field.name])
            if facts.within is not None:
                low, high, closed = facts.within
                require_between(self.prefix, self, low, high, [field.name], closed=closed)


@dataclasses.dataclass
class MLAConfig(Group):
    prefix = "model.mla."

    q_lora_rank: int | None = fixed(least=1)
    kv_lora_rank: int = fixed(least=1)
    qk_nope_head_dim: int = fixed(least=1)
    qk_rope_head_dim: int = fixed(least=1)
    v_head_dim: int = fixed(least=1)
    latent_norm: bool = fixed(True)


@dataclasses.dataclass
class ModelConfig(Group):
    prefix = "model."

    mha_type: AttentionType = fixed()
    d_model: int = fixed(least=1)
    num_layers: int = fixed(least=1)
    num_heads: int = fixed(least=1)
    num_kv_heads: int | None = fixed(least=1)
    head_dim: int | None = fixed(least=1)
    d_ff: int | None = fixed(least=1)
    match: Match = fixed("none")
    activation: Activation = fixed()
    num_experts: int | None = fixed(None, least=1)
    experts_per_token: int = fixed(2, least=1)
    shared_experts: int = fixed(0, least=0)
    expert_d_ff: int | None = fixed(None, least=1)
    router: Router = fixed("softmax")
    router_renormalise: bool = fixed(True)
    router_aux_loss: float = fixed(0.01, within=NOT_NEGATIVE)
    router_z_loss: float = fixed(0.0, within=NOT_NEGATIVE)
    router_bias_rate: float = fixed(0.001, within=NOT_NEGATIVE)
    norm: Norm = fixed()
    norm_position: NormPosition = fixed()
    positions: Positions | None = fixed(None)
    rope: bool = fixed()
    rope_theta: float = fixed(within=POSITIVE)
    learned_positions: bool = fixed(False)
    ngram: int = fixed(1, least=1)
    window: int | None = fixed(None, least=1)
    window_pattern: str | None = fixed(None)
    output_gate: OutputGate = fixed("none")
    sink: Sink = fixed("none")
    qk_norm: bool = fixed()
    dropout: float = fixed(within=BELOW_ONE)
    tie_embeddings: bool = fixed(False)
    zero_init: bool = fixed(False)
    residual_scale: float = fixed(1.0, within=POSITIVE)
    logit_softcap: float | None = fixed(None, within=POSITIVE)
    mla: MLAConfig = fixed()

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = "an output head of zeros cannot be the embedding; write model.tie_embeddings=false"
        require(not (self.zero_init and self.tie_embeddings), f"model.zero_init=true: {rule}")
        self._check_positions()
        self._check_experts()
        pattern = self.window_pattern
        if pattern is not None:
            rule = f"model.window_pattern={pattern}: "
            letters = "must consist of L (a layer with the window) and G (one without)"
            require(bool(pattern) and set(pattern) <= {"L", "G"}, rule + letters)
            require(self.window is not None, rule + "needs a window; write model.window=W")
            none = f"none of {self.num_layers} layers has the window; write L earlier"
            require("L" in pattern[: self.num_layers], rule + none)

    def _check_positions(self) -> None:
        """Neither `rope=false` nor `learned_positions=true` contradicts `positions`."""
        if self.positions is None:
            return
        chosen = f"model.positions={self.positions.name} says otherwise; leave one of them out"
        no_rope = self.positions is Positions.rope and not self.rope
        require(not no_rope, f"model.rope=false: {chosen}")
        learned = self.learned_positions and self.positions is not Positions.learned
        require(not learned, f"model.learned_positions=true: {chosen}")

    def _check_experts(self) -> None:
        number, per_token = self.num_experts, self.experts_per_token
        if number is not None:
            rule = f"is more than model.num_experts={number}; write that or fewer"
            require(per_token <= number, f"model.experts_per_token={per_token}: {rule}")
            learns = per_token > 1 or not self.router_renormalise
            rule = "the share of a token's one expert is 1, from which no router learns"
            advice = "write model.router_renormalise=false"
            require(learns, f"model.experts_per_token={per_token}: {rule}; {advice}")
            rule = "counts the weights of a layer without experts; write model.match=none"
            require(self.match is Match.none, f"model.match={self.match}: {rule}")
        names = ["experts_per_token", "shared_experts", "expert_d_ff", "router"]
        names += ["router_renormalise", "router_z_loss"]
        unread = dict.fromkeys([] if number else names, "model.num_experts=E")
        unread |= {"router_aux_loss": "model.router=softmax"} if self.has_biases else {}
        if not self.has_biases:
            unread["router_bias_rate"] = "model.router=sigmoid_bias"
        for name, needed in unread.items():
            own, neutral = getattr(self, name), options()[f"model.{name}"][1].neutral
            rule = f"is read only with {needed}; write that as well"
            require(own == neutral, f"model.{name}={own}: {rule}")

    @property
    def has_biases(self) -> bool:
        return self.router is Router.sigmoid_bias

    @property
    def positions_name(self) -> str:
        """How the model knows positions, for people."""
        if self.positions is not None and self.positions is not Positions.none:
            return self.positions.name
        kinds = {"rope": self.has_rope, "learned": self.has_learned_positions}
        return " and ".join(kind for kind, has in kinds.items() if has) or "no positions"

    @property
    def has_rope(self) -> bool:
        return self.rope if self.positions is None else self.positions is Positions.rope

    @property
    def has_learned_positions(self) -> bool:
        chosen = self.positions is Positions.learned
        return self.learned_positions if self.positions is None else chosen

    @property
    def has_alibi(self) -> bool:
        return self.positions is Positions.alibi

    @property
    def ff_width(self) -> int:
        return 4 * self.d_model if self.d_ff is None else self.d_ff

    @property
    def expert_width(self) -> int:
        """d_ff of an expert; by default those that a token is given are as wide as d_ff."""
        shared_out = self.ff_width // (self.experts_per_token + self.shared_experts)
        return max(1, shared_out) if self.expert_d_ff is None else self.expert_d_ff


@dataclasses.dataclass
class DatasetConfig(Group):
    prefix = "dataset."

    name: DatasetName = option()
    filepath: str | None = incidental()  # a text is known by its hash
    seq_len: int = fixed(least=1)
    sampling: Sampling = fixed("random")
    val_fraction: float = fixed(within=(0.0, 1.0, ""))

    def __post_init__(self) -> None:
        super().__post_init__()
        longest = f"dataset.seq_len={self.seq_len}: must be at most {MAX_SEQ_LEN:,}"
        require(self.seq_len <= MAX_SEQ_LEN, longest)
        if self.name is DatasetName.file:
            rule = "needs a text; write dataset.filepath=PATH"
            require(self.filepath is not None, f"dataset.name=file: {rule}")
        else:
            rule = f"is read only with dataset.name=file, not {self.name}"
            require(self.filepath is None, f"dataset.filepath={self.filepath}: {rule}")


@dataclasses.dataclass
class OptimizerConfig(Group):
    prefix = "optimizer."

    name: OptimizerName = fixed()
    learning_rate: float = traced(within=POSITIVE)
    adam_learning_rate: float | None = traced(None, within=POSITIVE)
    weight_decay: float = traced(within=NOT_NEGATIVE)
    momentum: float = option(0.95, within=BELOW_ONE)
    newton_schulz_steps: int = option(5, least=1)
    beta1: float = option(within=BELOW_ONE)
    beta2: float = option(within=BELOW_ONE)
    eps: float = option(1e-8, within=POSITIVE)
    grad_clip: float | None = option(within=POSITIVE)
    schedule: Schedule = option()
    warmup_steps: int | None = traced(least=0)
    decay_fraction: float = traced(0.2, within=FRACTION)
    final_lr_fraction: float = traced(0.1, within=FRACTION)
    ema_decay: float | None = fixed(None, within=BELOW_ONE)

    def __post_init__(self) -> None:
        super().__post_init__()
        read = self.adam_learning_rate is None or self.name is OptimizerName.muon
        rule = "is read only with optimizer.name=muon; write optimizer.learning_rate"
        require(read, f"optimizer.adam_learning_rate={self.adam_learning_rate}: {rule}")


@dataclasses.dataclass
class TrainerConfig(Group):
    prefix = "trainer."

    num_steps: int = traced(least=1)
    batch_size: int = option(least=1)
    grad_accum_steps: int = option(1, least=1)
    num_devices: int | None = option(1, least=1)
    precision: Precision | None = option()
    deterministic: bool = option(False)
    log_every: int = incidental(least=1)
    eval_every: int = option(least=1)
    eval_tokens: int | None = option(None, least=1)
    checkpoint_every: int = incidental(least=1)
    sample_chars: int = incidental(400, least=0)
    max_skipped_steps: int = incidental(10, least=1)
    patience: int | None = option(None, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        name, batch_size = "trainer.grad_accum_steps", self.batch_size
        require_divides(name, self.grad_accum_steps, batch_size, "trainer.batch_size")


@dataclasses.dataclass
class ParallelConfig(Group):
    prefix = "parallel."

    data: int | None = option(None, least=1)
    tensor: int = option(1, least=1)
    fsdp: bool = option(False)
    stall_factor: float | None = incidental(None, within=(1.0, math.inf, ""))


@dataclasses.dataclass
class DistributedConfig(Group):
    """Of this process only: neither saved with a run nor compared."""

    prefix = "distributed."

    coordinator: str | None = incidental(None)
    num_processes: int | None = incidental(None, least=1)
    process_id: int | None = incidental(None, least=0)
    initialization_timeout: int = incidental(300, least=1)
    heartbeat_timeout: int = incidental(100, least=1)

    @classmethod
    def of(cls, values: dict[str, Any]) -> "DistributedConfig":
        """With the values of dotted names that are its own, and otherwise neutral."""
        neutral = {
            field.name: field.metadata["option"].neutral for field in dataclasses.fields(cls)
        }
        for name, value in values.items():
            group, _, own = name.partition(".")
            if group == "distributed" and own in neutral:
                neutral[own] = value
        options: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), neutral))
        return options

    def __post_init__(self) -> None:
        super().__post_init__()
        three = {"coordinator": "HOST:PORT", "num_processes": "N", "process_id": "I"}
        given = [name for name in three if getattr(self, name) is not None]
        missing = " ".join(f"distributed.{n}={v}" for n, v in three.items() if n not in given)
        require(len(given) in (0, 3), f"distributed.{''.join(given[:1])}: write {missing} as well")
        if self.num_processes is not None and self.process_id is not None:
            rule = f"must be less than distributed.num_processes={self.num_processes}"
            inside = self.process_id < self.num_processes
            require(inside, f"distributed.process_id={self.process_id}: {rule}")


@dataclasses.dataclass
class WandbConfig:
    project: str = incidental()
    entity: str | None = incidental()
    group: str | None = incidental()
    name: str = incidental()
    tags: list[str] = incidental([])

    def __post_init__(self) -> None:  # OmegaConf lets lists inside a list through
        strings = all(isinstance(tag, str) for tag in self.tags)
        require(strings, f"wandb.tags={self.tags}: must be a list of strings")


@dataclasses.dataclass
class Config:
    mode: Mode = incidental()
    seed: int = option(traced=True, fixed=True)
    resume: str | None = incidental(None)
    init_from: str | None = fixed(None)
    model: ModelConfig = option()
    dataset: DatasetConfig = option()
    optimizer: OptimizerConfig = option()
    trainer: TrainerConfig = option()
    parallel: ParallelConfig = option()
    distributed: DistributedConfig = option()
    wandb: WandbConfig = option()

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, f"seed={self.seed}: must be in [0, 2^32)")
        warmup, steps = self.warmup_steps, self.trainer.num_steps
        rule = f"is longer than the run; write null, or at most trainer.num_steps={steps}"
        require(warmup <= steps, f"optimizer.warmup_steps={warmup}: {rule}")
        rule = "counts at most 2^31 sequences; write dataset.sampling=random, or fewer steps"
        counted = steps * self.trainer.batch_size < 2**31
        random = self.dataset.sampling is Sampling.random
        require(random or counted, f"dataset.sampling=epochs: {rule}")
        ngram, seq_len = self.model.ngram, self.dataset.seq_len
        rule = f"must be at most dataset.seq_len={seq_len}"
        require(ngram <= seq_len, f"model.ngram={ngram}: {rule}")
        self._check_devices()

    def _check_devices(self) -> None:
        trainer, parallel = self.trainer, self.parallel
        share, what = trainer.batch_size // trainer.grad_accum_steps, "trainer.batch_size"
        what += " / trainer.grad_accum_steps"
        require_divides("parallel.data", parallel.data, share, what)
        if (number := trainer.num_devices) is None:
            return
        require_divides("parallel.tensor", parallel.tensor, number, "trainer.num_devices")
        name = "trainer.num_devices"
        if parallel.tensor > 1:
            name += " / parallel.tensor"
        require_divides(name, number // parallel.tensor, share, what)
        product = f"parallel.data={parallel.data} x parallel.tensor={parallel.tensor}"
        same = parallel.data is None or parallel.data * parallel.tensor == number
        rule = f"{product} needs another number; leave one of them out"
        require(same, f"trainer.num_devices={number}: {rule}")

    def alone(self) -> "Config":
        """Without what holds for one process only, as a run keeps it."""
        return dataclasses.replace(self, distributed=DistributedConfig.of({}))

    def ends_at(self, step: int, best_step: int | None) -> bool:
        """Whether a run whose best evaluation was at `best_step` trains no more after `step`."""
        trainer = self.trainer
        if step >= trainer.num_steps:
            return True
        if trainer.patience is None or best_step is None:
            return False
        return step // trainer.eval_every - best_step // trainer.eval_every >= trainer.patience

    @property
    def num_devices(self) -> int | None:
        """How many devices are asked for; None leaves it to the program."""
        if self.parallel.data is not None:
            return self.parallel.data * self.parallel.tensor
        return self.trainer.num_devices

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up: those configured, or a tenth of the run, at most MAX_WARMUP."""
        configured = self.optimizer.warmup_steps
        return min(MAX_WARMUP, self.trainer.num_steps // 10) if configured is None else configured


OptionTable = dict[str, tuple[dataclasses.Field[Any], Option]]


@functools.cache
def options(schema: type = Config, prefix: str = "") -> OptionTable:
    """(field, facts) of every option by its dotted name; groups such as `model` are not options."""
    found: OptionTable = {}
    for field in dataclasses.fields(schema):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            found |= options(field.type, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = field, field.metadata["option"]
    return found


def to_plain(config: Config) -> dict[str, Any]:
    """The configuration as JSON-able data, enums by name."""
    plain: Any = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return plain


def to_yaml(config: Config) -> str:
    """The configuration as config.yaml holds it."""
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(config)))


def from_plain(plain: dict[str, Any]) -> Config:
    """The configuration that `to_plain` of this or an earlier version made; its rules are checked.

    An option that the file lacks has its neutral value. Anything but plain values is refused.
    """
    require("${" not in str(plain), "a saved configuration holds plain values, not ${...}")
    merged: Any = OmegaConf.merge(OmegaConf.structured(Config), neutral_settings(), plain)
    return typed(merged)


@functools.cache
def neutral_settings() -> DictConfig:
    """The neutral value of every option that has one."""
    neutral = OmegaConf.create()
    for name, (_, facts) in options().items():
        if facts.neutral is not REQUIRED:
            OmegaConf.update(neutral, name, facts.neutral)
    return neutral


def typed(settings: DictConfig) -> Config:
    """Settings under our schema as a Config; ConfigError if a rule is broken."""
    try:
        config = OmegaConf.to_object(settings)
    except ConfigError as error:  # without the lines that OmegaConf adds
        raise ConfigError(str(error).split("\n")[0]) from None
    assert isinstance(config, Config)
    for name, value in flatten(dataclasses.asdict(config)).items():
        rule = "a saved configuration may not contain ${"
        require("${" not in str(value), f"{name}={value}: {rule}")
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


def changes(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """{name: (value before, after)} of the settings in which two configurations differ."""
    old, new = settings_of(before), settings_of(after)
    return {name: (old[name], new[name]) for name in old if old[name] != new[name]}


def spell(value: Any) -> str:
    """A value as the command line spells it."""
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    return value.name if isinstance(value, Enum) else str(value)


def spelled(values: Mapping[str, Any]) -> list[str]:
    """{dotted name: value} as the command line spells them."""
    return [f"{name}={spell(value)}" for name, value in values.items()]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean …?" for the nearest known word or last part of a name, if one is near."""
    known = list(known)
    last_part = [name for name in known if name.rpartition(".")[2] == word.rpartition(".")[2]]
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    near = last_part if len(last_part) == 1 else near
    return f"; did you mean {near[0]}?" if near else ""
