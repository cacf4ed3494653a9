"""`chargpt search`: Optuna asks for settings, a run answers with its loss; poor runs end early.

Several processes may work on a study at once, and the same command continues it after a crash: a
trial that no process works on any more resumes from its checkpoint.
"""

import dataclasses
import functools
import itertools
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from chargpt.config import require_at_least
from chargpt.errors import ConfigError, RunFailed, note
from chargpt.study.report import report
from chargpt.study.space import read_space, to_wandb_sweep
from chargpt.study.trials import Asked, ask, open_study, tell


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
    asked = ask(study, space, folder, options.num_trials, options.seed)
    try:
        if options.members == 1:
            train_one_by_one(study, asked)
        else:
            train_together(study, asked, options)
    finally:
        report(study, space, folder)


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
