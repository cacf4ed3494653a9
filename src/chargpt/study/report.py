"""What a person sees of a search: the best trials, and a page with Optuna's figures."""

import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from chargpt.compose import command
from chargpt.config import spell, spelled
from chargpt.run.directory import read_run
from chargpt.study import page
from chargpt.study.figures import WIDTH, to_png
from chargpt.study.page import Cell
from chargpt.study.space import Space
from chargpt.study.trials import trial_folder

SHOWN = 10  # trials in the terminal
ENOUGH = 6  # finished trials, to say what mattered
LOSS = "best val loss"
STYLE: Any = {  # of Optuna's figures
    "backend": "agg",
    "figure.figsize": (WIDTH, 4.5),
    "savefig.bbox": "tight",
    "text.parse_math": True,  # powers of ten
}


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
