"""Hydra's side of a run: composing it, naming it and its folder, explaining Hydra's errors.

The only module that calls Hydra's composition. Importing it registers the schema and the resolvers
of configs/default.yaml, also in a process that a launcher starts and that never sees main.py.
"""

import contextlib
import functools
import hashlib
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from chargpt.config import CONFIGS, Config, did_you_mean, options, typed
from chargpt.errors import ConfigError, RunFailed, one_line, require

EXPECTED = (ConfigError, RunFailed, HydraException, OmegaConfBaseException)  # errors of one line
# Hydra's launchers, and the extras of this package that install them
EXTRAS = {"joblib": "joblib", "submitit_slurm": "slurm", "submitit_local": "slurm"}


@functools.cache
def compose(overrides: tuple[str, ...] = ()) -> Config:
    """The configuration that main.py would train; ConfigError if it would refuse."""
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return parse(hydra.compose("default", list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from None


def parse(settings: DictConfig) -> Config:
    """What Hydra composed; ConfigError if a rule of it or of its attention type is broken."""
    config = typed(settings)
    from chargpt import model, parallel  # JAX: after the rules that do not need it

    model.check(config.model)
    parallel.check(config)
    return config


def change(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with values of dotted names; ConfigError if one is unknown or breaks a rule."""
    settings = OmegaConf.structured(config)
    try:
        for name, value in values.items():
            OmegaConf.update(settings, name, value, merge=True)
        return parse(settings)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from None


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """{dotted name: value} of overrides; ConfigError if one adds, deletes or chooses a file."""
    values = {}
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(explain(error)) from None
    for override in parsed:
        name, line = override.key_or_group, override.input_line
        chooses = name in ("experiment", "launcher")
        single = not (chooses or override.is_delete() or override.is_add())
        require(single, f"{line}: cannot be combined with resume=; give single options")
        if not name.startswith("hydra."):
            values[name] = override.value()
    return values


def jobs(config: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """(overrides, settings) of every job of the sweep that Hydra is about to start.

    Nothing for a sweeper that chooses its jobs as it goes; what Hydra refuses is left to Hydra.
    """
    if config.hydra.sweeper["_target_"] != BasicSweeperConf._target_:
        return
    loader = GlobalHydra.instance().config_loader()
    given = [f"{name}={values}" for name, values in (config.hydra.sweeper.params or {}).items()]
    with contextlib.suppress(HydraException, OmegaConfBaseException):
        parser = OverridesParser.create(loader)
        overrides = parser.parse_overrides([*given, *config.hydra.overrides.task])
        (batch,) = BasicSweeper.split_arguments(overrides, None)
        for job in batch:
            settings = loader.load_sweep_config(config, job)
            with open_dict(settings):
                del settings["hydra"]
                # The job's own names follow from files that do not exist yet
                settings.wandb.name = settings.wandb.group = "job"
            yield " ".join(job), settings


# ---- names and folders


def in_sweep() -> bool:
    """Whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def run_directory() -> Path:
    """Where Hydra put the current run."""
    return Path(HydraConfig.get().runtime.output_dir)


def task_overrides() -> list[str]:
    """The overrides typed for this run, without Hydra's own."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def run_dir(resume: str | None, fresh: str) -> str:
    """Where a run lives: the directory that it continues in, or a fresh one."""
    is_run = resume is None or (Path(resume) / "config.yaml").is_file()
    require(is_run, f"resume={resume}: is not a run directory (it has no config.yaml)")
    return fresh if resume is None else resume


def hydra_files(resume: str | None, process: int | None) -> str | None:
    """Where Hydra writes its files: a resumed run keeps those of its start.

    Of several processes the first one writes.
    """
    _, rank = launched() or (None, process or 0)
    return ".hydra" if resume is None and rank == 0 else None


def launched() -> tuple[str, int] | None:
    """(launcher, number of this process) if one has started several that train together."""
    several = {
        "SLURM": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
        "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    }
    for name, (number, rank) in several.items():
        if int(os.environ.get(number) or 1) > 1:
            return name, int(os.environ.get(rank) or 0)
    indexed = os.environ.get("JOB_COMPLETION_INDEX")
    if indexed and "KUBERNETES_SERVICE_HOST" in os.environ:
        return "Kubernetes", int(indexed)
    return None


def run_name(base: Any) -> str:
    """What sets a run apart: `base`, and settings typed for it (of a sweep, those that differ)."""
    common = {f"model.mha_type={base}"}
    if in_sweep():  # Hydra's file about all jobs of the sweep
        multirun = OmegaConf.load(Path(HydraConfig.get().sweep.dir) / "multirun.yaml")
        common |= {setting.lower() for setting in multirun.hydra.overrides.task}
    own = [s for s in task_overrides() if s.lower() not in common and belongs_in_name(s)]
    return " ".join([str(base), *(re.sub(r"^[^=]*\.", "", setting) for setting in own)])


def belongs_in_name(setting: str) -> bool:
    """Whether a run's name has this setting: of an option that is not incidental."""
    name = setting.partition("=")[0]
    return name in options() and not options()[name][1].incidental


def run_group(name: str) -> str:
    """Which runs are shown together: those of a sweep, or those that differ only in the seed."""
    return Path(HydraConfig.get().sweep.dir).name if in_sweep() else re.sub(r" seed=\d+", "", name)


def sweep_dir(overrides: Iterable[str]) -> str:
    """Where a sweep lives: it follows from what was typed, so the same command continues it."""
    changes_no_job = ("mode=", "launcher=")
    typed_text = " ".join(s for s in overrides if not s.startswith(changes_no_job))
    short = re.sub(r"\b(experiment=|model\.|trainer\.|optimizer\.|dataset\.)", "", typed_text)
    return f"multirun/{slug(short)[:48]}-{hashlib.sha256(typed_text.encode()).hexdigest()[:8]}"


def slug(name: str) -> str:
    """`name` as a plain folder name, which cannot leave its parent and needs no quotes."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip(".-")[:80] or "run"


def quoted(text: str) -> str:
    """A text as the value of an override, in quotes if Hydra would read something else."""
    plain = re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./+-]*", text)
    if plain and text.lower() not in ("null", "true", "false", "nan", "inf"):
        return text
    return QuotedString(text, Quote.single).with_quotes()


def command(arguments: Sequence[str]) -> str:
    """Training with these overrides, as a person types it."""
    in_checkout = (CONFIGS.parent / "main.py").is_file()
    return f"{'python main.py' if in_checkout else 'chargpt train'} {shlex.join(arguments)}"


# ---- errors


def explain(error: Exception) -> str:
    """One line for an error of ours, of Hydra's or of OmegaConf's."""
    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    for cause in chain:
        if isinstance(cause, ConfigError | RunFailed):  # in a resolver, say
            return str(cause).split("\n")[0]
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file:
            return explain_missing(cause)
    for cause in reversed(chain):
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            return explain_key(cause)
    return one_line(error)


def explain_missing(error: MissingConfigException) -> str:
    """One line for a file that a group of configurations does not have."""
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    if group == "hydra/launcher" and (extra := EXTRAS.get(name)):
        return f"launcher={extra}: is not installed; write pip install -e '.[{extra}]'"
    known = sorted(error.options or ())
    hint = did_you_mean(name, known)
    return f"{group}={name}: there is no such {group}{hint}; write one of {', '.join(known)}"


def no_such_option(name: str) -> str:
    """What is wrong with a name that is not an option: it names a group, or is misspelt."""
    if any(known.startswith(f"{name}.") for known in options()):
        return f"{name}: is a group of options; name one of them, such as {name}.NAME=…"
    hint = did_you_mean(name, options())
    return f"{name}: there is no such option{hint} (all are in configs/default.yaml)"


def explain_key(error: OmegaConfBaseException) -> str:
    """One line for a key that does not exist, or a value that its type does not allow."""
    name = str(error.full_key)
    if name not in options():
        return no_such_option(name)
    choices = getattr(options()[name][0].type, "__members__", ())  # of an enum
    text = one_line(str(error.msg).split("\n")[0])
    return f"{name}: {text[0].lower()}{text[1:]}{did_you_mean(str(error.value), choices)}"


ConfigStore.instance().store(name="schema", node=Config)
vmap = {"_target_": "hydra_plugins.chargpt_launcher.PopulationLauncher", "members": None}
ConfigStore.instance().store(group="hydra/launcher", name="vmap", node=vmap)
for resolver in (slug, run_dir, run_name, run_group, sweep_dir, hydra_files):
    OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
