"""`chargpt compare`: what runs reached and what they cost: a table, documents, a page, records."""

import csv
import dataclasses
import datetime
import io
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from chargpt.config import did_you_mean, options, to_yaml
from chargpt.errors import one_line, require
from chargpt.study import figures, page
from chargpt.study.arms import Arm, Difference, best_of, group
from chargpt.study.page import Cell
from chargpt.study.records import ENDING, read_records, to_jsonl

# Characters of the table, at least: on a narrower terminal its lines wrap, and nothing is left out.
WIDTH = 100


class Drawing(StrEnum):
    """What the figure for documents shows: loss against costs, or the cache; the differences."""

    costs = "costs"
    cache = "cache"
    paired = "paired"


@dataclasses.dataclass
class CompareOptions:
    """Tables and a page of figures that compare runs; runs that differ only by seed are an arm."""

    # Run directories, folders of them, files in them, globs; and records of earlier comparisons
    paths: tuple[str, ...] = ()
    out: str | None = None  # the files to write, without endings; null = comparison, in the folder
    title: str = "What attention costs, and what it buys"
    figure: Drawing = Drawing.costs  # what the figure for documents shows
    # Options, such as optimizer.learning_rate,model.d_ff: of the arms that differ only in them, the
    # best; null = all
    best_of: str | None = None

    def __post_init__(self) -> None:
        require(bool(self.paths), "compare: needs runs; write chargpt compare outputs/… multirun/…")
        if self.out:
            page.check_stem(self.out)
        for name in [] if self.best_of is None else self.best_of.split(","):
            hint = did_you_mean(name, options())
            require(name in options(), f"best_of: {name}: there is no such option{hint}")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Arms, and what a reader must know about their numbers."""

    arms: list[Arm]
    remarks: list[str]


def compare(options: CompareOptions, ranked: bool = False) -> None:
    """Print the table; write the files. `ranked`: best arms first."""
    result = read_comparison(options.paths, options.best_of)
    out = Path(options.out) if options.out else default_place(options.paths)
    show(result, Console(highlight=False, width=max(Console().width, WIDTH)), ranked)
    for path in write(result, out, options.title, options.figure):
        print(path)


def read_comparison(paths: Sequence[str], best: str | None = None) -> Comparison:
    """The comparison of all finished runs in `paths`; ConfigError if there is none.

    `best`: options, with commas between; of arms that differ only in them, the best is compared.
    """
    arms, remarks = group(read_records(paths))
    why = one_line("; ".join(remarks[:3]))
    require(bool(arms), f"{' '.join(paths)}: no run there is finished; {why}")
    if best is not None:
        arms, remark = best_of(best.split(","), arms)
        remarks.append(remark)
    return Comparison(arms, remarks + doubts(arms))


def default_place(paths: Sequence[str]) -> Path:
    """`comparison` in the folder given, if it is a single one, otherwise in the current one."""
    is_folder = len(paths) == 1 and Path(paths[0]).is_dir()
    return (Path(paths[0]) if is_folder else Path()) / "comparison"


def doubts(arms: Sequence[Arm]) -> list[str]:
    """What makes numbers of these runs less comparable than they look, a line each."""
    runs = [run for arm in arms for run in arm.runs.values()]
    found = []

    def differ(what: str, values: Iterable[Any], consequence: str) -> None:
        distinct = list(dict.fromkeys(map(str, values)))
        if len(distinct) > 1:
            listed = ", ".join(value[:40] for value in distinct)
            found.append(f"{what} differ ({listed}): {consequence}")

    speeds = "their speeds cannot be compared"
    differ("texts", (run.corpus[:12] for run in runs), "their losses cannot be compared")
    differ("devices", (run.summary.get("device") for run in runs), speeds)
    differ("versions of jax", (run.jax for run in runs), "compare their speeds with care")
    trainers = [(run.config.trainer, run.config.dataset.seq_len) for run in runs]
    tokens = [f"{t.num_steps * t.batch_size * seq_len:,}" for t, seq_len in trainers]
    differ("training tokens", tokens, "their losses come from different budgets")
    if any(map(in_population, arms)):
        found.append(f"{SHARED} of a program that trains several runs: not those of a run alone")
    single = ", ".join(arm.name for arm in arms if len(arm.runs) == 1)
    if single and len(arms) > 1:
        found.append(f"only one seed, so no spread: {single}; add seed=0,1,2")
    unpaired = ", ".join(arm.name for arm in arms[1:] if not arm.difference(arms[0]))
    if unpaired:
        paired = f"no seed in common with {arms[0].name}, so no paired difference"
        found.append(f"{paired}: {unpaired}")
    return found


# ---- the table

SHARED = "*"  # marks speeds, memory and times of runs that shared a program with others
OF_PROGRAM = ("tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes", "train_seconds")
NUMBERS = {  # column: name in summary.json, unit
    "params": ("num_params", ""),
    "cache B/token": ("kv_cache_bytes_per_token", ""),
    "train tok/s": ("tokens_per_second", ""),
    "decode tok/s": ("decode_tokens_per_second", ""),
    "memory": ("peak_memory_bytes", "B"),
    "time": ("train_seconds", "s"),
}
LAST = "last val loss"  # in documents only: terminals have no room for it
COLUMNS = ("arm", "seeds", "best val loss", LAST, "minus first", "agree", *NUMBERS)
EXPLANATION = (
    "Best loss over the whole validation split, in nats per character: mean ± sample standard "
    "deviation over seeds; the last one: mean. 'Minus first' is the difference in best loss to the "
    "first arm, taken seed by seed: mean ± half of its 95 % interval (Student's t over the seeds "
    "that both have). 'Agree': seeds whose difference has the sign of that mean. "
    "Cache: bytes that a token leaves in the KV cache. Speeds: tokens per second of the training "
    "loop, and of sampling one text. Memory: what XLA allots to the compiled training step on each "
    "device. Time: wall time of a run, compilation and evaluation included."
)


def plus_minus(mean: float, more: float | None, sign: str = "") -> Cell:
    return f"{mean:{sign}.4f}" + ("" if more is None else f" ± {more:.4f}"), mean


def losses(arm: Arm, first: Arm) -> list[Cell]:
    """The best loss, the last one, the difference to the first arm, and how many seeds agree."""
    best, last = (arm.estimate(f"{which}/val_loss") for which in ("best", "final"))
    found = None if arm is first else Difference.of(list(arm.difference(first).values()))
    nothing: Cell = ("-", None)
    return [
        plus_minus(best.mean, best.spread) if best else nothing,
        plus_minus(last.mean, None) if last else nothing,
        plus_minus(found.mean, found.interval, "+") if found else nothing,
        (f"{found.agreeing}/{found.pairs}", found.agreeing) if found else nothing,
    ]


def short(value: float | None, unit: str = "") -> str:
    """A number of three digits with its metric prefix: 808k, 1.02M, 62.3MB."""
    if value is None:
        return "-"
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{prefix}{unit}"
    return f"{value:.3g}{unit}" if value < 100 else f"{value:.0f}{unit}"


def rows(arms: Sequence[Arm]) -> list[list[Cell]]:
    """The cells of each arm, in the order of COLUMNS."""
    return [row(arm, arms[0]) for arm in arms]


def in_population(arm: Arm) -> bool:
    """Whether a run of it shared its program with others."""
    return any((run.number("population") or 1) > 1 for run in arm.runs.values())


def row(arm: Arm, first: Arm) -> list[Cell]:
    cells: list[Cell] = [(arm.name, arm.name), (str(len(arm.runs)), len(arm.runs))]
    cells += losses(arm, first)
    for name, unit in NUMBERS.values():
        estimate = arm.estimate(name)
        mean = estimate.mean if estimate else None
        mark = SHARED if name in OF_PROGRAM and in_population(arm) and mean is not None else ""
        cells.append((short(mean, unit) + mark, mean))
    return cells


def ranking(arms: Sequence[Arm]) -> list[int]:
    """The numbers of the arms, lowest loss first."""
    return sorted(range(len(arms)), key=lambda number: arms[number].best_loss)


def show(result: Comparison, console: Console, ranked: bool = False) -> None:
    """The table in the terminal, the best arm in bold; if ranked, the best run; the remarks."""
    lines, ranks = rows(result.arms), ranking(result.arms)
    best = ranks[0]
    order = ranks if ranked else range(len(lines))
    shown = [number for number, name in enumerate(COLUMNS) if name != LAST]
    titles = [COLUMNS[number].replace(" ", "\n", 1) for number in shown]
    cells = [[lines[number][column][0] for column in shown] for number in order]
    widths = [
        1 + max(map(len, "\n".join(texts).split("\n")))
        for texts in zip(titles, *cells, strict=True)
    ]
    room = console.width - sum(widths[1:])

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(titles[0], overflow="fold")
    for title in titles[1:]:
        table.add_column(title, justify="right", overflow="fold", no_wrap=True)
    for number, (name, *numbers) in zip(order, cells, strict=True):
        style = "bold" if number == best and len(lines) > 1 else None
        table.add_row(*map(Text, (broken(name, room), *numbers)), style=style)
    console.print(table)
    notes = [f"note: {remark}" for remark in result.remarks]
    if ranked:
        run = min(result.arms[best].runs.values(), key=lambda run: run.best_loss)
        notes.insert(0, f"best run: {run.path}")
    for text in notes:
        console.print(Text(one_line(text)), soft_wrap=True)


def broken(name: str, room: int) -> str:
    """The name; its words that are longer than `room` begin a line with their "="."""
    words = (word if len(word) <= room else word.replace("=", "\n=", 1) for word in name.split(" "))
    return " ".join(words)


def to_markdown(arms: Sequence[Arm]) -> str:
    texts = [[text for text, _ in cells] for cells in rows(arms)]
    escaped = [[text.replace("\\", "\\\\").replace("|", "\\|") for text in line] for line in texts]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *escaped]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_csv(arms: Sequence[Arm]) -> str:
    """A row for each run: all digits of its numbers, for other programs."""
    numbers = ["best/val_loss", "best/step", "final/val_loss", *figures.COSTS]
    numbers += ["flops_per_token", "compile_seconds"]
    lines: list[list[Any]] = [["arm", "seed", *numbers, "compile_cached", "path"]]
    for arm in arms:
        for seed, run in sorted(arm.runs.items()):
            cached = run.summary.get("compile_cached")
            lines.append([arm.name, seed, *map(run.number, numbers), cached, run.path])
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    return buffer.getvalue()


# ---- the files


def write(
    result: Comparison, out: Path, title: str, drawing: Drawing = Drawing.costs
) -> list[Path]:
    """Page, Markdown, CSV, the figure for documents, records of the runs: `out` with an ending."""
    arms, about = result.arms, subtitle(result.arms)
    draw = {
        Drawing.costs: figures.tradeoffs,
        Drawing.cache: figures.frontier,
        Drawing.paired: figures.paired_differences,
    }[drawing]
    notes = [f"Note: {remark}" for remark in result.remarks]
    paragraphs = [f"# {title}", about, to_markdown(arms).rstrip(), *notes, EXPLANATION]
    contents = {
        ".html": page.render(title, about, blocks(result)),
        ".md": ("\n\n".join(paragraphs) + "\n").encode(),
        ".csv": to_csv(arms).encode(),
        ".png": figures.to_png(draw(arms)),
        ENDING: to_jsonl(run for arm in arms for _, run in sorted(arm.runs.items())).encode(),
    }
    return page.write_files(out, contents)


def subtitle(arms: Sequence[Arm]) -> str:
    """What was compared, where, when."""
    runs = [run for arm in arms for run in arm.runs.values()]
    configs = [run.config for run in runs]
    facts: list[Iterable[Any]] = [
        (config.dataset.name.name for config in configs),
        (f"{config.trainer.num_steps:,}" for config in configs),
        (f"{config.trainer.batch_size} x {config.dataset.seq_len}" for config in configs),
        (run.summary.get("device") for run in runs),
        (run.jax for run in runs),
    ]
    texts, steps, batches, devices, jax = (", ".join(dict.fromkeys(map(str, f))) for f in facts)
    return (
        f"{len(runs)} runs of {len(arms)} arms on {texts}, {steps} steps of {batches} characters; "
        f"{devices}, jax {jax}; {datetime.date.today().isoformat()}"
    )


def blocks(result: Comparison) -> list[str]:
    """The page from top to bottom."""
    arms = result.arms
    parts = [page.table(COLUMNS, rows(arms), ranking(arms)[0], arms=True)]
    parts += map(page.paragraph, result.remarks)
    parts.append(page.details("What the columns mean", EXPLANATION))
    if len(arms) > 1:
        text = "Down is better. Point at a row of the table to highlight its arm."
        parts.append(page.heading("What it costs, what it buys", text))
        parts.append(page.drawing(figures.tradeoffs(arms, figures.PAGE), "tradeoffs"))
    if any(len({size for size, _, _ in kind}) > 1 for kind in figures.by_cache(arms).values()):
        text = "A line for each attention type, through the lowest loss at each size."
        parts.append(page.heading("What the cache buys", text))
        parts.append(page.drawing(figures.frontier(arms, figures.PAGE), "frontier"))
    if any(arm.difference(arms[0]) for arm in arms[1:]):
        text = "A seed draws the same batches in every arm: differences within it say more."
        parts.append(page.heading("Seed by seed", text))
        parts.append(page.drawing(figures.paired_differences(arms, figures.PAGE), "paired"))
    has_flops = all(arm.estimate("flops_per_token") for arm in arms)
    drawings = {
        name: page.drawing(figures.curves(arms, name, figures.PAGE), f"curves-{name}")
        for name in figures.AXES
        if name != "FLOPs" or has_flops
    }
    samples = [(number, arm.name, arm.first_run.sample) for number, arm in enumerate(arms)]
    parts += [
        page.heading("Validation loss", "Mean over seeds, shaded from the lowest to the highest."),
        page.tabs("curves", drawings),
        page.heading("What they write", "The last sample of each arm's first seed."),
        page.texts(samples),
        page.heading("Where it comes from"),
    ]
    for arm in arms:
        text = ""
        for seed, run in sorted(arm.runs.items()):
            text += f"seed {seed}: {run.best_loss:.4f}  {run.path}\n"
        text += f"\n{to_yaml(arm.first_run.config)}"
        parts.append(page.details(f"{arm.name}: runs and configuration", text))
    return parts
