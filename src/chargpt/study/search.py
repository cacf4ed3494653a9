"""`chargpt search`: Optuna asks for settings, a run answers with its loss; poor runs end early.

The study is one SQLite file. Several processes may work on it at once, and the same command
continues it after a crash: a trial that no process works on any more resumes from its checkpoint.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import shlex
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from chargpt.compose import command
from chargpt.config import Config, require_at_least, spell
from chargpt.errors import ConfigError, RunFailed, note, require
from chargpt.run.directory import read_run
from chargpt.run.process import lock
from chargpt.study import page
from chargpt.study.figures import WIDTH, to_png
from chargpt.study.page import Cell
from chargpt.study.space import Parameter, Space, read_space, to_wandb_sweep

SHOWN = 10  # trials in the terminal
ENOUGH = 6  # finished trials, to say what mattered
LOSS = "best val loss"
STYLE: Any = {  # of Optuna's figures
    "backend": "agg",
    "figure.figsize": (WIDTH, 4.5),
    "savefig.bbox": "tight",
    "text.parse_math": True,  # powers of ten
}


@dataclasses.dataclass
class SearchOptions:
    """Search for good settings with Optuna, or hand the same space to `wandb sweep`."""

    space: str = "configs/search/adamw.yaml"  # what to vary; configs/search/ has more
    num_trials: int = 20  # of the whole study: the same command continues until there are so many
    out: str | None = None  # the study's folder; null = search/NAME-OF-SPACE
    members: int | None = 1  # trials that train at once, as one program; null = as many as fit
    seed: int | None = None  # of the sampler; null = another one each time
    write_wandb: str | None = None  # write the space as a `wandb sweep` file instead

    def __post_init__(self) -> None:
        require_at_least("", self, 1, ["num_trials", "members"])
        require_at_least("", self, 0, ["seed"])


def search(options: SearchOptions) -> None:
    """Run trials until the study has `num_trials`; then its table and its page."""
    os.environ.pop("WANDB_RUN_ID", None)  # one W&B run for each trial
    space = read_space(Path(options.space))
    if options.write_wandb is not None:
        sweep = yaml.safe_dump(to_wandb_sweep(space), sort_keys=False)
        Path(options.write_wandb).write_text(sweep, encoding="utf-8")
        print(f"{options.write_wandb}\nwandb sweep {shlex.quote(options.write_wandb)}")
        return
    folder = Path(options.out or f"search/{space.name}")
    study = open_study(folder, space)
    asked = ask(study, options, space, folder)
    try:
        if options.members == 1:
            train_one_by_one(study, asked)
        else:
            train_together(study, asked, options)
    finally:
        report(study, space, folder)


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
    study: Any, options: SearchOptions, folder: Path
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
        if done >= options.num_trials:
            return None
        # A sampler with the same seed would repeat itself: after a crash, and in other processes.
        entropy = None if options.seed is None else [options.seed, done]
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


def ask(study: Any, options: SearchOptions, space: Space, folder: Path) -> Iterator[Asked]:
    """Trials to work on, one after another."""
    while claimed := claim(study, options, folder):
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


def train_one_by_one(study: Any, trials: Iterator[Asked]) -> None:
    from chargpt.run.start import train_or_resume

    for asked in trials:
        try:
            outcome: Any = train_or_resume(asked.config, asked.run_dir, asked.watch)
        except Exception as error:
            outcome = error
        tell(study, asked, outcome)


def train_together(study: Any, trials: Iterator[Asked], options: SearchOptions) -> None:
    """Train as many trials at once as one program has members; each that ends makes room.

    Those of another compiled step wait until that program has no more to do, at most as many as it
    has members.
    """
    from chargpt.parallel import offer_cpu_devices
    from chargpt.run import cache, population
    from chargpt.run.process import StopSignal

    offer_cpu_devices()
    corpora, waiting = population.Corpora(), list[Asked]()
    working: dict[population.Job, Asked] = {}

    def with_steps() -> Iterator[Asked]:
        """The trials, each with what its compiled step depends on."""
        for asked in trials:
            try:
                corpus = corpora.of(asked.config, asked.run_dir)
            except ConfigError as error:
                tell(study, asked, error)
            else:
                asked.step = population.shared_step(asked.config, corpus.sha256)
                yield asked

    more = with_steps()

    def next_job(step: str, lanes: int) -> population.Job | None:
        """A trial of the same step: one that waits, or a new one."""
        found = next((asked for asked in waiting if asked.step == step), None)
        if found is not None:
            waiting.remove(found)
        while found is None and len(waiting) < lanes and (asked := next(more, None)):
            if asked.step == step:
                found = asked
            else:
                waiting.append(asked)
        if found is None:
            return None
        job = population.Job(found.config, found.run_dir, watch=found.watch)
        working[job] = found
        return job

    with StopSignal() as stop, cache.kept_executables(note):
        while waiting or (waiting := list(itertools.islice(more, 1))):
            first, config = waiting[0], waiting[0].config
            ended = sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))
            left = max(1, options.num_trials - ended)
            try:
                corpus = corpora.of(config, first.run_dir)
                program = population.fitting(config, corpus, left, options.members)
            except (ConfigError, RunFailed) as error:
                tell(study, waiting.pop(0), error)
                continue
            supply = functools.partial(next_job, first.step, program.members or 1)
            together = population.Population(program, supply, stop, len(first.run_dir.name))
            for job, outcome in together.train(left * config.trainer.num_steps):
                tell(study, working.pop(job), outcome)


def suggest(trial: Any, parameter: Parameter) -> Any:
    """A value of the parameter: a new one, or the one that the trial has already."""
    if parameter.choices is not None:
        return trial.suggest_categorical(parameter.name, parameter.choices)
    draw = trial.suggest_int if parameter.whole else trial.suggest_float
    step = parameter.step or (1 if parameter.whole else None)
    return draw(parameter.name, parameter.low, parameter.high, step=step, log=parameter.log)


def spelled(values: dict[str, Any]) -> list[str]:
    return [f"{name}={spell(value)}" for name, value in values.items()]


# ---- what a person sees


def report(study: Any, space: Space, folder: Path) -> None:
    """Show the best trials, and all on a page; print the command that trains the best again."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    states = Counter(trial.state.name.lower() for trial in trials)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    summary = f"{len(trials)} trials: {counts}"
    print(summary)
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    ranked = sorted(complete, key=lambda trial: trial.value)
    if not ranked:
        return
    columns = ["trial", LOSS, *(p.name.rpartition(".")[2] for p in space.parameters)]
    rows = [row(trial, space) for trial in ranked]
    header = [Column(name, justify="right", overflow="fold") for name in columns]
    table = Table(*header, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for cells in rows[:SHOWN]:
        table.add_row(*(Text(text) for text, _ in cells))
    Console(highlight=False).print(table)
    best = trial_folder(folder, ranked[0])
    print(f"best: {best}\n{command([*space.overrides, *spelled(ranked[0].params)])}")
    blocks = [page.table(columns, rows, best=0, arms=False), *drawings(study, len(ranked))]
    content = yaml.safe_dump(json.loads(study.user_attrs["space"]), sort_keys=False)
    blocks += [page.heading("Where it comes from"), page.details("Space", content)]
    if (best / "config.yaml").exists() and (sample := read_run(best).sample):
        blocks += [page.heading("What the best one writes"), page.texts([(0, best.name, sample)])]
    html = page.render(f"Search: {space.name}", summary, blocks)
    print(*page.write_files(folder / "search", {".html": html}))


def row(trial: Any, space: Space) -> list[Cell]:
    values = [trial.params.get(parameter.name) for parameter in space.parameters]
    texts = [f"{value:.3g}" if isinstance(value, float) else spell(value) for value in values]
    number, loss = (str(trial.number), trial.number), (f"{trial.value:.4f}", trial.value)
    return [number, loss, *zip(texts, values, strict=True)]


def drawings(study: Any, finished: int) -> list[str]:
    """Optuna's figures of a study with so many finished trials."""
    from optuna.visualization import matplotlib as optuna_draws

    parts = [
        page.heading("History", "Every finished trial, and the best so far."),
        drawing(optuna_draws.plot_optimization_history, study, "history"),
    ]
    if finished >= ENOUGH:
        text = "How much each option explains of what sets good trials apart (PED-ANOVA)."
        parts.append(page.heading("Importance", text))
        parts.append(drawing(optuna_draws.plot_param_importances, study, "importance"))
    text = "A line for each trial: the darker, the lower its loss."
    parts.append(page.heading("Parallel coordinates", text))
    parts.append(drawing(optuna_draws.plot_parallel_coordinate, study, "parallel coordinates"))
    return parts


def drawing(draw: Callable[..., Any], study: Any, alternative: str) -> str:
    """One of Optuna's figures, as an image."""
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # They are experimental, and an axis may have one value.
        warnings.simplefilter("ignore")
        figure = draw(study, target_name=LOSS).figure
        png = to_png(figure)
        pyplot.close(figure)
    return page.image(png, alternative)
