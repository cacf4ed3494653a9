"""`chargpt compare`: what runs reached and what they cost, as a table, Markdown, CSV and a page."""

import csv
import dataclasses
import datetime
import io
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from chargpt.config import to_yaml
from chargpt.errors import one_line, require
from chargpt.run.directory import Record, find_runs, read_run
from chargpt.study import figures, page
from chargpt.study.arms import Arm, Estimate, group

# Characters of the table, at least: on a narrower terminal its lines wrap, and nothing is left out.
WIDTH = 100
Cell = tuple[str, float | str | None]  # as a person reads it, and what it stands for


@dataclasses.dataclass
class CompareOptions:
    """Tables and a page of figures that compare runs; runs that differ only by seed are an arm."""

    paths: tuple[str, ...] = ()  # run directories, folders of them, files in them, globs
    out: str | None = (
        None  # the files to write, without their ending; null = comparison, in the folder given
    )
    title: str = "What attention costs, and what it buys"

    def __post_init__(self) -> None:
        require(bool(self.paths), "compare: needs runs; write chargpt compare outputs/… multirun/…")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Arms, and what a reader must know beside their numbers."""

    arms: list[Arm]
    remarks: list[str]


def compare(options: CompareOptions, ranked: bool = False) -> None:
    """Print the table; write the page, Markdown, CSV and figure. `ranked`: best arms first."""
    result = read_comparison(options.paths)
    out = Path(options.out) if options.out else default_place(options.paths)
    require(out.name not in ("", ".."), f"out={options.out}: is a folder; write out=FOLDER/NAME")
    show(result, Console(highlight=False, width=max(Console().width, WIDTH)), ranked)
    for path in write(result, out, options.title):
        print(path)


def read_comparison(paths: Sequence[str]) -> Comparison:
    """The comparison of all finished runs in `paths`; ConfigError where there is none."""
    arms, left_out = group([read_run(path) for path in find_runs(paths)])
    require(
        bool(arms),
        f"{' '.join(paths)}: no run there is finished; " + one_line("; ".join(left_out[:3])),
    )
    return Comparison(arms, left_out + doubts(arms))


def default_place(paths: Sequence[str]) -> Path:
    """`comparison` in the one folder given, or else where one stands."""
    alone = len(paths) == 1 and Path(paths[0]).is_dir()
    return (Path(paths[0]) if alone else Path()) / "comparison"


def doubts(arms: Sequence[Arm]) -> list[str]:
    """What makes numbers of these runs less comparable than they look, a line each."""
    runs = [run for arm in arms for run in arm.runs.values()]
    found = []

    def differ(what: str, values: Sequence[Any], consequence: str) -> None:
        distinct = list(dict.fromkeys(map(str, values)))
        if len(distinct) > 1:
            found.append(
                f"{what} differ ({', '.join(value[:40] for value in distinct)}): {consequence}"
            )

    differ("texts", [run.corpus[:12] for run in runs], "their losses cannot be compared")
    differ(
        "devices", [run.summary.get("device") for run in runs], "their speeds cannot be compared"
    )
    differ("versions of jax", [run.jax for run in runs], "nor quite their speeds")
    tokens = [
        run.config.trainer.num_steps * run.config.trainer.batch_size * run.config.dataset.seq_len
        for run in runs
    ]
    differ(
        "training tokens", [f"{count:,}" for count in tokens], "so do the budgets behind the losses"
    )
    single = [arm.name for arm in arms if len(arm.runs) == 1]
    if single and len(arms) > 1:
        found.append(f"one seed alone, so no spread: {', '.join(single)}; add seed=0,1,2")
    unpaired = [arm.name for arm in arms[1:] if not arm.difference(arms[0])]
    if unpaired:
        found.append(
            f"no seed in common with {arms[0].name}, so no paired difference: {', '.join(unpaired)}"
        )
    return found


# ---- the table


def plus_minus(estimate: Estimate | None, digits: str) -> str:
    if estimate is None:
        return "-"
    return f"{estimate.mean:{digits}}" + (
        "" if estimate.spread is None else f" ± {estimate.spread:{digits.lstrip('+')}}"
    )


def short(value: float | None, unit: str = "") -> str:
    """A number of three digits with its metric prefix: 808k, 1.02M, 62.3MB."""
    if value is None:
        return "-"
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{prefix}{unit}"
    return f"{value:.3g}{unit}" if value < 100 else f"{value:.0f}{unit}"


def mean_of(arm: Arm, name: str) -> float | None:
    estimate = arm.estimate(name)
    return estimate.mean if estimate else None


def mean_loss(arm: Arm) -> float:
    """Of its runs, which are all finished."""
    return statistics.fmean(run.best_loss for run in arm.runs.values())


def loss_cell(arm: Arm, first: Arm) -> Cell:
    return plus_minus(arm.estimate("best/val_loss"), ".4f"), mean_of(arm, "best/val_loss")


def difference_cell(arm: Arm, first: Arm) -> Cell:
    estimate = None if arm is first else Estimate.of(arm.difference(first).values())
    return plus_minus(estimate, "+.4f"), estimate.mean if estimate else None


def number_cell(name: str, unit: str = "") -> Callable[[Arm, Arm], Cell]:
    return lambda arm, first: (short(mean_of(arm, name), unit), mean_of(arm, name))


COLUMNS: dict[str, Callable[[Arm, Arm], Cell]] = {
    "arm": lambda arm, first: (arm.name, arm.name),
    "seeds": lambda arm, first: (str(len(arm.runs)), len(arm.runs)),
    "best val loss": loss_cell,
    "minus first": difference_cell,
    "params": number_cell("num_params"),
    "cache B/token": number_cell("kv_cache_bytes_per_token"),
    "train tok/s": number_cell("tokens_per_second"),
    "decode tok/s": number_cell("decode_tokens_per_second"),
    "memory": number_cell("peak_memory_bytes", "B"),
    "time": number_cell("train_seconds", "s"),
}
EXPLANATION = (
    "Best loss over the whole validation split, in nats per character: mean ± sample standard "
    "deviation over seeds. 'Minus first' is the difference to the first arm, taken seed by seed. "
    "Cache: bytes that a token leaves in the KV cache. Speeds: tokens per second of the training "
    "loop, and of sampling one text. Memory: what XLA allots to the compiled training step on each "
    "device. Time: wall time of a run, compilation and evaluation included."
)


def rows(arms: Sequence[Arm]) -> list[list[Cell]]:
    return [[cell(arm, arms[0]) for cell in COLUMNS.values()] for arm in arms]


def best_arm(arms: Sequence[Arm]) -> int:
    """The number of the arm with the lowest loss."""
    return min(range(len(arms)), key=lambda number: mean_loss(arms[number]))


def show(result: Comparison, console: Console, ranked: bool = False) -> None:
    """The table in the terminal, the best arm in bold; if ranked, the best run; the remarks."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for number, name in enumerate(COLUMNS):
        table.add_column(
            name.replace(" ", "\n", 1),
            justify="left" if number == 0 else "right",
            overflow="fold",
            no_wrap=number > 0,
        )
    best, lines = best_arm(result.arms), rows(result.arms)
    order = list(range(len(result.arms)))
    if ranked:
        order.sort(key=lambda number: mean_loss(result.arms[number]))
    for number in order:
        style = "bold" if number == best and len(result.arms) > 1 else None
        table.add_row(*[Text(text) for text, _ in lines[number]], style=style)
    console.print(table)
    if ranked:
        run = min(result.arms[best].runs.values(), key=lambda run: run.best_loss)
        console.print(Text(one_line(f"best run: {run.path}")), soft_wrap=True)
    for remark in result.remarks:
        console.print(Text(one_line(f"note: {remark}")), soft_wrap=True)


def to_markdown(arms: Sequence[Arm]) -> str:
    escaped = [
        [text.replace("\\", "\\\\").replace("|", "\\|") for text, _ in row] for row in rows(arms)
    ]
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *escaped]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_csv(arms: Sequence[Arm]) -> str:
    """A row for each run: numbers in full, for other programs."""
    numbers = [
        "best/val_loss",
        "best/step",
        "final/val_loss",
        *figures.COSTS,
        "flops_per_token",
        "compile_seconds",
    ]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["arm", "seed", *numbers, "compile_cached", "path"])
    for arm in arms:
        for seed, run in sorted(arm.runs.items()):
            writer.writerow(
                [
                    arm.name,
                    seed,
                    *map(run.number, numbers),
                    run.summary.get("compile_cached"),
                    run.path,
                ]
            )
    return buffer.getvalue()


# ---- the files


def write(result: Comparison, out: Path, title: str) -> list[Path]:
    """The page, the Markdown, the CSV and the figure for documents: `out` with their endings."""
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = [out.with_name(out.name + ending) for ending in (".html", ".md", ".csv", ".png")]
    arms = result.arms
    page.write_page(paths[0], title, subtitle(arms), blocks(result))
    paths[1].write_text(
        f"# {title}\n\n{subtitle(arms)}\n\n{to_markdown(arms)}\n{EXPLANATION}\n", encoding="utf-8"
    )
    paths[2].write_text(to_csv(arms), encoding="utf-8")
    paths[3].write_bytes(figures.to_png(figures.tradeoffs(arms)))
    return paths


def subtitle(arms: Sequence[Arm]) -> str:
    """What was compared, where, when."""
    runs = [run for arm in arms for run in arm.runs.values()]
    configs = [run.config for run in runs]
    texts = together(config.dataset.name.name for config in configs)
    steps = together(f"{config.trainer.num_steps:,}" for config in configs)
    batches = together(f"{c.trainer.batch_size} x {c.dataset.seq_len}" for c in configs)
    devices, versions = (
        together(run.summary.get("device") for run in runs),
        together(run.jax for run in runs),
    )
    return (
        f"{len(runs)} runs of {len(arms)} arms on {texts}, {steps} steps of {batches} characters; "
        f"{devices}, jax {versions}; {datetime.date.today().isoformat()}"
    )


def together(values: Iterable[Any]) -> str:
    """The distinct values, in the order in which they first appear."""
    return ", ".join(dict.fromkeys(map(str, values)))


def blocks(result: Comparison) -> list[str]:
    """The page from top to bottom."""
    arms = result.arms
    parts = [
        page.table(list(COLUMNS), rows(arms), best_arm(arms)),
        *map(page.paragraph, result.remarks),
    ]
    parts.append(page.details("What the columns mean", EXPLANATION))
    if len(arms) > 1:
        parts += [
            page.heading(
                "What it costs, what it buys",
                "Down is better. Point at a row of the table to see its arm alone.",
            ),
            page.drawing(figures.tradeoffs(arms, figures.PAGE), "tradeoffs"),
        ]
        if any(arm.difference(arms[0]) for arm in arms[1:]):
            parts += [
                page.heading(
                    "Seed by seed",
                    "A seed draws the same batches in every arm: differences within it say more.",
                ),
                page.drawing(figures.paired_differences(arms, figures.PAGE), "paired"),
            ]
    axes = [
        name
        for name in figures.AXES
        if name != "FLOPs" or all(mean_of(arm, "flops_per_token") for arm in arms)
    ]
    drawings = {
        name: page.drawing(figures.curves(arms, name, figures.PAGE), f"curves-{name}")
        for name in axes
    }
    parts += [
        page.heading("Validation loss", "Mean over seeds, shaded from the lowest to the highest."),
        page.tabs("curves", drawings),
        page.heading("What they write", "The last sample of each arm's first seed."),
        page.texts([(number, arm.name, first_run(arm).sample) for number, arm in enumerate(arms)]),
        page.heading("Where it comes from"),
    ]
    for arm in arms:
        listed = "\n".join(
            f"seed {seed}: {run.number('best/val_loss'):.4f}  {run.path}"
            for seed, run in sorted(arm.runs.items())
        )
        parts.append(
            page.details(
                f"{arm.name}: runs and configuration",
                f"{listed}\n\n{to_yaml(first_run(arm).config)}",
            )
        )
    return parts


def first_run(arm: Arm) -> Record:
    return arm.runs[min(arm.runs)]
