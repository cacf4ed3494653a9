"""`chargpt search`: Optuna asks for settings, a run answers with its loss; poor runs end early.

The study is one SQLite file. Several processes may work on it at once, and the same command
continues it after a crash: a trial that nobody is working on any more resumes from its checkpoint.
"""

import contextlib
import dataclasses
import json
import math
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from chargpt.compose import command
from chargpt.config import require_at_least, spell
from chargpt.errors import ConfigError, RunFailed, require
from chargpt.run.directory import read_run
from chargpt.run.process import lock
from chargpt.study import page
from chargpt.study.figures import PAGE, PAPER, TYPE, Theme, add_legend, new_figure
from chargpt.study.space import Parameter, Space, read_space, to_wandb_sweep

SHOWN = 10  # trials in the terminal
ENOUGH = 6  # finished trials, to say what mattered


@dataclasses.dataclass
class SearchOptions:
    """Search for good settings with Optuna, or hand the same space to `wandb sweep`."""

    space: str = "configs/search/adamw.yaml"  # what to vary; configs/search/ has more
    num_trials: int = 20  # of the whole study: the same command goes on until there are so many
    out: str | None = None  # the study's folder; null = search/NAME-OF-SPACE
    seed: int | None = None  # of the sampler; null = another one each time
    write_wandb: str | None = None  # write the space as a `wandb sweep` file instead

    def __post_init__(self) -> None:
        require_at_least("", self, 1, ["num_trials"])
        require_at_least("", self, 0, ["seed"])


def search(options: SearchOptions) -> None:
    """Run trials until the study has `num_trials`; then its table and its page."""
    os.environ.pop("WANDB_RUN_ID", None)  # one W&B run for each trial
    space = read_space(Path(options.space))
    if options.write_wandb is not None:
        Path(options.write_wandb).write_text(
            yaml.safe_dump(to_wandb_sweep(space), sort_keys=False), encoding="utf-8"
        )
        print(f"{options.write_wandb}\nwandb sweep {shlex.quote(options.write_wandb)}")
        return
    folder = Path(options.out or f"search/{space.name}")
    with lock(working(folder, "next"), wait=True):  # two processes must not make the tables at once
        study = open_study(folder, space)
    try:
        while True:
            with lock(
                working(folder, "next"), wait=True
            ):  # one process at a time chooses what to do
                claimed = claim(study, options, folder)
            if claimed is None:
                break
            trial, held = claimed
            with held:
                run_trial(study, trial, space, folder)
    finally:
        report(study, space, folder)


def open_study(folder: Path, space: Space) -> Any:
    """The study in `folder`, if need be a new one; ConfigError if it searches another space."""
    try:
        import optuna
    except ImportError:
        raise ConfigError("search: needs Optuna; write pip install -e '.[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=optuna.storages.RDBStorage(
            f"sqlite:///{folder / 'study.db'}", engine_kwargs={"connect_args": {"timeout": 60}}
        ),
        study_name=space.name,
        load_if_exists=True,
        direction="minimize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
    )
    content = json.dumps(dataclasses.asdict(space), sort_keys=True)
    require(
        study.user_attrs.get("space", content) == content,
        f"{folder}: its study searches another space than {space.name} is now; "
        "write another out=DIR",
    )
    study.set_user_attr("space", content)
    return study


def working(folder: Path, name: str) -> Path:
    """A folder whose lock says that a process is at work on something."""
    path = folder / "working" / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def trial_folder(folder: Path, number: int) -> Path:
    return folder / f"trial_{number:04}"


def claim(
    study: Any, options: SearchOptions, folder: Path
) -> tuple[Any, contextlib.ExitStack] | None:
    """(trial, its lock): one left behind by a process, or a new one; None if all are done."""
    from optuna.samplers import TPESampler
    from optuna.trial import Trial, TrialState

    def running(number: int) -> bool:
        return study.get_trials(deepcopy=False)[number].state is TrialState.RUNNING

    trials = study.get_trials(deepcopy=False)
    for frozen in trials:
        if frozen.state is TrialState.RUNNING and (
            held := try_lock(working(folder, str(frozen.number)))
        ):
            if running(frozen.number):  # and did not end just before its lock was free
                return Trial(study, frozen._trial_id), held
            held.close()
    if len(trials) >= options.num_trials:
        return None
    # A sampler that starts afresh would repeat itself: after a crash, and in each of several
    # processes.
    entropy = None if options.seed is None else [options.seed, len(trials)]
    study.sampler = TPESampler(seed=int(np.random.SeedSequence(entropy).generate_state(1)[0]))
    trial = study.ask()
    held = try_lock(working(folder, str(trial.number)))
    assert held is not None  # its number is new
    return trial, held


def try_lock(path: Path) -> contextlib.ExitStack | None:
    """A lock that is held until its block ends; None where another process has it."""
    held = contextlib.ExitStack()
    try:
        held.enter_context(lock(path))
    except ConfigError:
        return None
    return held


def run_trial(study: Any, trial: Any, space: Space, folder: Path) -> None:
    """Train what the trial asks for, or go on with it, and tell the study how it went."""
    from optuna.trial import TrialState

    from chargpt.run.start import train_or_resume

    run_dir = trial_folder(folder, trial.number)
    values = {parameter.name: suggest(trial, parameter) for parameter in space.parameters}
    reported = set(study.get_trials(deepcopy=False)[trial.number].intermediate_values)
    pruned = False

    def watch(step: int, loss: float) -> bool:
        nonlocal pruned
        if step not in reported and math.isfinite(loss):
            trial.report(loss, step)
        pruned = trial.should_prune()
        return pruned

    print(
        f"trial {trial.number}: "
        + " ".join(f"{name}={spell(value)}" for name, value in values.items()),
        flush=True,
    )
    try:
        config = space.compose(values | {"wandb.group": folder.name, "wandb.name": run_dir.name})
        run_dir.mkdir(exist_ok=True)
        loss = train_or_resume(config, run_dir, watch)
    except (ConfigError, RunFailed) as error:
        print(f"trial {trial.number} failed: {error}", flush=True)
        trial.set_user_attr("failed", str(error))
        study.tell(trial, state=TrialState.FAIL)
        return
    if pruned:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, loss)


def suggest(trial: Any, parameter: Parameter) -> Any:
    """A value of the parameter: a new one, or the one that the trial has already."""
    if parameter.choices is not None:
        return trial.suggest_categorical(parameter.name, parameter.choices)
    if parameter.whole:
        return trial.suggest_int(
            parameter.name,
            parameter.low,
            parameter.high,
            step=parameter.step or 1,
            log=parameter.log,
        )
    return trial.suggest_float(
        parameter.name, parameter.low, parameter.high, step=parameter.step, log=parameter.log
    )


# ---- what a person sees


def complete(study: Any) -> list[Any]:
    """Trials that came to their end, best first."""
    from optuna.trial import TrialState

    return sorted(
        study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]),
        key=lambda trial: trial.value,
    )


def report(study: Any, space: Space, folder: Path) -> None:
    """Show the best trials, and all on a page; print the command that trains the best again."""
    trials = study.get_trials(deepcopy=False)
    ranked = complete(study)
    states = [trial.state.name.lower() for trial in trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    console = Console(highlight=False)
    console.print(f"{len(trials)} trials: {counts}")
    if not ranked:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in (
        "trial",
        "best val loss",
        *(parameter.name.rpartition(".")[2] for parameter in space.parameters),
    ):
        table.add_column(name, justify="right")
    for trial in ranked[:SHOWN]:
        table.add_row(
            str(trial.number),
            f"{trial.value:.4f}",
            *(show_value(trial.params.get(p.name)) for p in space.parameters),
        )
    console.print(table)
    best = ranked[0]
    values = [f"{name}={spell(value)}" for name, value in best.params.items()]
    print(f"best: {trial_folder(folder, best.number)}\n{command([*space.overrides, *values])}")
    path = folder / "search.html"
    page.write_page(
        path,
        f"Search: {space.name}",
        f"{len(trials)} trials: {counts}",
        blocks(study, space, folder),
    )
    print(path)


def show_value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else spell(value)


def blocks(study: Any, space: Space, folder: Path) -> list[str]:
    ranked, trials = complete(study), study.get_trials(deepcopy=False)
    columns = [
        "trial",
        "best val loss",
        *(parameter.name.rpartition(".")[2] for parameter in space.parameters),
    ]
    rows = [
        [(str(trial.number), trial.number), (f"{trial.value:.4f}", trial.value)]
        + [
            (show_value(trial.params.get(p.name)), trial.params.get(p.name))
            for p in space.parameters
        ]
        for trial in ranked
    ]
    parts = [
        page.table(columns, rows, 0, keys=False),
        page.heading("History", "Every finished trial, and the best so far."),
    ]
    parts.append(page.drawing(draw_history(trials, PAGE), "history"))
    importances = importance(study)
    if importances:
        parts += [
            page.heading(
                "Importance",
                "How much of what sets good trials apart each option explains (PED-ANOVA).",
            ),
            page.drawing(draw_importance(importances, PAGE), "importance"),
        ]
    parts += [
        page.heading(
            "Parallel coordinates", "A line for each trial; the best tenth in the second colour."
        ),
        page.drawing(draw_parallel(ranked, space, PAGE), "parallel"),
        page.heading("Where it comes from"),
        page.details(
            "Space", yaml.safe_dump(json.loads(study.user_attrs["space"]), sort_keys=False)
        ),
    ]
    best = trial_folder(folder, ranked[0].number)
    sample = read_run(best).sample if (best / "config.yaml").exists() else ""
    return parts + (
        [page.heading("What the best one writes"), page.texts([(0, best.name, sample)])]
        if sample
        else []
    )


def importance(study: Any) -> dict[str, float]:
    """Each option's share in what makes a trial good; empty if there are too few trials to tell."""
    import optuna

    if len(complete(study)) < ENOUGH:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def draw_history(trials: Sequence[Any], theme: Theme = PAPER) -> Figure:
    figure, (axes,) = new_figure(theme, 4)
    done = sorted(
        (trial for trial in trials if trial.state.name == "COMPLETE"),
        key=lambda trial: trial.number,
    )
    numbers, losses = [trial.number for trial in done], [trial.value for trial in done]
    axes.plot(numbers, losses, "o", label="trial", **theme.style(0))
    axes.step(
        numbers, np.minimum.accumulate(losses), where="post", label="best so far", **theme.style(1)
    )
    axes.set_xlabel("trial")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("best validation loss")
    add_legend(axes, theme)
    return figure


def draw_importance(importances: dict[str, float], theme: Theme = PAPER) -> Figure:
    figure, (axes,) = new_figure(theme, 0.8 + 0.4 * len(importances))
    names = list(importances)[::-1]
    axes.barh(names, [importances[name] for name in names], height=0.6, color=theme.arms[0])
    axes.set_xlabel("share")
    return figure


def draw_parallel(trials: Sequence[Any], space: Space, theme: Theme = PAPER) -> Figure:
    """Best trials last, so that they lie on top; every axis from its lowest to highest value."""
    figure, (axes,) = new_figure(theme, 4.4)
    names = [*(parameter.name for parameter in space.parameters), "best val loss"]
    columns = [place(trials, parameter) for parameter in space.parameters]
    losses = np.array([trial.value for trial in trials])
    columns.append((scaled(losses), (f"{losses.min():.3f}", f"{losses.max():.3f}")))
    count = max(1, len(trials) // 10)
    for row in reversed(range(len(trials))):
        among_best = row < count
        style = theme.style(1 if among_best else 0) | dict(
            linewidth=2 if among_best else 1, alpha=1 if among_best else 0.45
        )
        axes.plot(range(len(names)), [heights[row] for heights, _ in columns], **style)
    for x, (_, (low, high)) in enumerate(columns):
        for y, text, side in ((-0.03, low, "top"), (1.03, high, "bottom")):
            axes.text(
                x, y, text, ha="center", va=side, fontsize=TYPE, color=theme.ink, parse_math=False
            )
    axes.set_xticks(range(len(names)), [name.rpartition(".")[2] for name in names])
    axes.tick_params(axis="x", pad=14)
    axes.set_yticks([])
    axes.set_ylim(-0.12, 1.12)
    return figure


def place(trials: Sequence[Any], parameter: Parameter) -> tuple[np.ndarray, tuple[str, str]]:
    """(height of each trial on the parameter's axis, what stands at its ends)."""
    values = [trial.params[parameter.name] for trial in trials]
    if parameter.choices is not None:
        last = max(1, len(parameter.choices) - 1)
        heights = np.array([parameter.choices.index(value) / last for value in values])
        return heights, (spell(parameter.choices[0]), spell(parameter.choices[-1]))
    transform: Callable[[Any], Any] = np.log if parameter.log else np.asarray
    low, high = transform(float(parameter.low)), transform(float(parameter.high))
    return (transform(np.array(values, float)) - low) / (high - low), (
        f"{parameter.low:g}",
        f"{parameter.high:g}",
    )


def scaled(values: np.ndarray) -> np.ndarray:
    width = values.max() - values.min()
    return (values - values.min()) / (width if width > 0 else 1)
