"""The trials of a study: each is asked for, worked on by one process, and told how it ended.

The study is one SQLite file. A trial that no process works on any more is handed out again.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from chargpt.config import Config, spelled
from chargpt.errors import ConfigError, RunFailed, require
from chargpt.run.process import lock
from chargpt.study.space import Parameter, Space


def open_study(folder: Path, space: Space) -> Any:
    """The study in `folder`, a new one if there is none; ConfigError if its space is another."""
    try:
        import optuna
    except ImportError:
        raise ConfigError("search: needs Optuna; write pip install -e '.[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url, options = f"sqlite:///{folder / 'study.db'}", {"connect_args": {"timeout": 60}}
    with lock(working(folder, "next"), wait=True):  # two processes must not make the tables at once
        study = optuna.create_study(
            storage=optuna.storages.RDBStorage(url, engine_kwargs=options),
            study_name=space.name,
            load_if_exists=True,
            direction="minimize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
        )
    content = json.dumps(dataclasses.asdict(space), sort_keys=True)
    is_same = study.user_attrs.get("space", content) == content
    problem = f"its study searches another space than {space.name} is now; write another out=DIR"
    require(is_same, f"{folder}: {problem}")
    study.set_user_attr("space", content)
    return study


def working(folder: Path, name: str) -> Path:
    """A folder whose lock says that a process is at work on something."""
    path = folder / "working" / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def trial_folder(folder: Path, trial: Any) -> Path:
    return folder / f"trial_{trial.number:04}"


def claim(
    study: Any, folder: Path, num_trials: int, seed: int | None
) -> tuple[Any, contextlib.ExitStack] | None:
    """(trial, its lock): one left behind by a process, or a new one; None if all are done."""
    from optuna.samplers import TPESampler
    from optuna.trial import Trial, TrialState

    def running() -> dict[int, Any]:
        trials = study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        return {trial.number: trial for trial in trials}

    with lock(working(folder, "next"), wait=True):  # one process at a time chooses what to do
        for number, frozen in running().items():
            if held := try_lock(working(folder, str(number))):
                if number in running():  # and did not end just before its lock was free
                    return Trial(study, frozen._trial_id), held
                held.close()
        done = len(study.get_trials(deepcopy=False))
        if done >= num_trials:
            return None
        # A sampler with the same seed would repeat itself: after a crash, and in other processes.
        entropy = None if seed is None else [seed, done]
        study.sampler = TPESampler(seed=int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        trial = study.ask()
        held = try_lock(working(folder, str(trial.number)))
        assert held is not None  # its number is new
        return trial, held


def try_lock(path: Path) -> contextlib.ExitStack | None:
    """A lock that is held until its block ends; None if another process has it."""
    with contextlib.suppress(ConfigError), contextlib.ExitStack() as held:
        held.enter_context(lock(path))
        return held.pop_all()
    return None


@dataclasses.dataclass
class Asked:
    """A trial that this process works on, for as long as it holds the lock."""

    trial: Any
    config: Config
    run_dir: Path
    reported: set[int]  # steps of which the study knows the loss
    held: contextlib.ExitStack
    pruned: bool = False
    step: str = ""  # what its compiled step depends on, if several train at once

    def watch(self, step: int, loss: float) -> bool:
        """Report a loss; whether others were better there."""
        if step not in self.reported and math.isfinite(loss):
            self.trial.report(loss, step)
        self.pruned = self.trial.should_prune()
        return self.pruned


def ask(
    study: Any, space: Space, folder: Path, num_trials: int, seed: int | None
) -> Iterator[Asked]:
    """Trials to work on, one after another, until the study has so many."""
    while claimed := claim(study, folder, num_trials, seed):
        trial, held = claimed
        run_dir = trial_folder(folder, trial)
        values = {parameter.name: suggest(trial, parameter) for parameter in space.parameters}
        known = set(study.get_trials(deepcopy=False)[trial.number].intermediate_values)
        print(f"trial {trial.number}: {' '.join(spelled(values))}", flush=True)
        names = {"wandb.group": folder.name, "wandb.name": run_dir.name}
        try:
            config = space.compose(values | names)
        except ConfigError as error:
            with held:
                tell_failed(study, trial, error)
            continue
        run_dir.mkdir(exist_ok=True)
        yield Asked(trial, config, run_dir, known, held)


def tell(study: Any, asked: Asked, outcome: float | Exception) -> None:
    """Tell the study how a trial ended, and let go of it; an unexpected error is raised again."""
    from optuna.trial import TrialState

    with asked.held:
        if isinstance(outcome, ConfigError | RunFailed):
            tell_failed(study, asked.trial, outcome)
        elif isinstance(outcome, Exception):
            raise outcome
        elif asked.pruned:
            study.tell(asked.trial, state=TrialState.PRUNED)
        else:
            study.tell(asked.trial, outcome)


def tell_failed(study: Any, trial: Any, error: Exception) -> None:
    from optuna.trial import TrialState

    print(f"trial {trial.number} failed: {error}", flush=True)
    trial.set_user_attr("failed", str(error))
    study.tell(trial, state=TrialState.FAIL)


def suggest(trial: Any, parameter: Parameter) -> Any:
    """A value of the parameter: a new one, or the one that the trial has already."""
    if parameter.choices is not None:
        return trial.suggest_categorical(parameter.name, parameter.choices)
    draw = trial.suggest_int if parameter.whole else trial.suggest_float
    step = parameter.step or (1 if parameter.whole else None)
    return draw(parameter.name, parameter.low, parameter.high, step=step, log=parameter.log)
