"""`chargpt inspect`: what every head of every layer reads, as maps and entropies."""

import dataclasses
import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chargpt.checkpoint import Which, open_run
from chargpt.compose import slug
from chargpt.errors import note, require
from chargpt.run import trained
from chargpt.run.cache import kept_executables
from chargpt.run.directory import Record, find_runs, read_run
from chargpt.study import page
from chargpt.study.arms import name_arms
from chargpt.study.figures import PAGE, PAPER, Theme, add_legend, new_figure, to_png

MAX_RUNS = 12  # more columns nobody reads
MAX_LABELS = 48  # characters along an axis, beyond which their labels would overlap
SHADES = (
    "Row: the character that asks. Column: the one that is read. "
    "The darker, the more (square root of the weight)."
)
PROMPT = "To be, or not to be, that is the question:"


@dataclasses.dataclass
class InspectOptions:
    """Attention maps and entropies of trained models on a text, head by head, side by side."""

    paths: tuple[str, ...] = ()  # run directories, folders of them, globs
    run: str | None = None  # the same as one option; the newest run when both are left out
    checkpoint: Which = Which.best  # best | last
    prompt: str = PROMPT  # the text that is read
    out: str = "attention"  # the files to write, without their ending

    def __post_init__(self) -> None:
        require(self.prompt != "", "prompt=: is empty; write a text for the models to read")
        is_file = Path(self.out).name not in ("", "..")
        require(is_file, f"out={self.out}: is a folder; write out=FOLDER/NAME")


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one model reads of the text."""

    name: str
    weights: np.ndarray  # [layers, heads, t, s]

    @property
    def entropies(self) -> np.ndarray:
        """[layers, heads]: nats, mean over positions."""
        weights = np.where(self.weights > 0, self.weights, 1.0)
        return -(weights * np.log(weights)).sum(-1).mean(-1)


@kept_executables(note)
def inspect(options: InspectOptions) -> None:
    """Print the entropies; write the page, and the PNGs of runs whose attention has weights."""
    weights = read_all(options)
    readings = [Reading(name, array) for name, array in weights if array is not None]
    without = [name for name, array in weights if array is None]
    lines = [f"{name}: none (its attention has no weights)" for name in without]
    text, out = options.prompt, Path(options.out)
    most = f"ln {len(text)} = {math.log(len(text)):.2f} is the most"
    for reading in readings:
        print(f"{reading.name}: entropy of each head in nats ({most})")
        for layer, heads in enumerate(reading.entropies):
            print(f"  layer {layer}  " + "  ".join(f"{entropy:.2f}" for entropy in heads))
    for line in lines:
        print(line)
    blocks = list(map(page.paragraph, lines))
    images: dict[str, bytes] = {}  # by the end of its name
    if readings:
        overview = to_png(draw_overview(readings))
        maps = [to_png(draw_maps(reading, text)) for reading in readings]
        blocks += figures(readings, overview, maps)
        images[".png"] = overview
        for number, (reading, png) in enumerate(zip(readings, maps, strict=True)):
            images[f"-{number}-{slug(reading.name)}.png"] = png
    out.parent.mkdir(parents=True, exist_ok=True)
    page.write_page(out.with_name(f"{out.name}.html"), "What each head reads", f"{text!r}", blocks)
    for ending, png in images.items():
        out.with_name(out.name + ending).write_bytes(png)
    for ending in (".html", *images):
        print(out.with_name(out.name + ending))


def figures(readings: list[Reading], overview: bytes, maps: list[bytes]) -> list[str]:
    """The page's figures: all runs side by side, their entropies, and one run at a time."""
    images = {
        reading.name: page.image(png, f"attention maps of {reading.name}")
        for reading, png in zip(readings, maps, strict=True)
    }
    return [
        page.heading(
            "Side by side", f"{SHADES} L0 H1 is head 1 of layer 0, with its entropy in nats."
        ),
        page.image(overview, "attention maps of every run, layer and head"),
        page.heading(
            "Entropies",
            "How widely each head reads: the entropy of its weights in nats, mean over positions.",
        ),
        page.drawing(draw_entropies(readings, PAGE), "entropies"),
        page.heading("One at a time", SHADES),
        page.tabs("maps", images),
    ]


def read_all(options: InspectOptions) -> list[tuple[str, np.ndarray | None]]:
    """(name, attention weights) of every run; of runs that differ only in their seed, the first."""
    places = options.paths + (() if options.run is None else (options.run,))
    runs = find_runs(places) if places else [open_run(None, options.checkpoint)[0]]
    first_of: dict[str, Record] = {}
    for record in map(read_run, runs):
        first_of.setdefault(str(sorted(record.settings().items())), record)
    chosen = list(first_of.values())
    if len(chosen) > MAX_RUNS:
        note(f"{len(chosen)} runs: the first {MAX_RUNS} are shown")
    chosen = chosen[:MAX_RUNS]
    names = name_arms(chosen)
    which = options.checkpoint.name
    return [
        (name, trained.load(record.path, which).attention_weights(options.prompt))
        for name, record in zip(names, chosen, strict=True)
    ]


def draw_overview(readings: list[Reading]) -> Figure:
    """A row for each run, a column for each head of each layer."""
    columns = max(reading.weights.shape[0] * reading.weights.shape[1] for reading in readings)
    width, height = 1.4 + 0.85 * columns, 0.4 + 1.05 * len(readings)
    figure, axes = new_figure(PAPER, height, len(readings), columns, width)
    for number, axis in enumerate(axes):
        row, column = divmod(number, columns)
        layers, heads = readings[row].weights.shape[:2]
        if column >= layers * heads:
            axis.set_axis_off()
            continue
        layer, head = divmod(column, heads)
        draw_map(
            axis,
            readings[row].weights[layer, head],
            f"L{layer} H{head}  {readings[row].entropies[layer, head]:.1f}",
        )
        if column == 0:
            axis.set_ylabel(
                readings[row].name,
                fontsize=8,
                rotation=0,
                ha="right",
                va="center",
                parse_math=False,
            )
    return figure


def draw_map(axis: Axes, weights: np.ndarray, title: str) -> None:
    axis.grid(False)
    axis.imshow(np.sqrt(weights), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(title, fontsize=7, loc="left")
    axis.set_xticks([])
    axis.set_yticks([])


def draw_maps(reading: Reading, text: str, theme: Theme = PAPER) -> Figure:
    """A grid of maps: a row for each layer, a column for each head."""
    layers, heads, length, _ = reading.weights.shape
    side = 1.9 if length <= MAX_LABELS else 2.4
    width, height = 0.6 + side * heads, 0.8 + (side + 0.25) * layers
    figure, axes = new_figure(theme, height, layers, heads, width)
    for number, axis in enumerate(axes):
        layer, head = divmod(number, heads)
        draw_map(
            axis,
            reading.weights[layer, head],
            f"layer {layer}, head {head}: {reading.entropies[layer, head]:.2f}",
        )
        if length <= MAX_LABELS:
            labels = [
                character if character.isprintable() else "\N{RETURN SYMBOL}" for character in text
            ]
            if head == 0:
                axis.set_yticks(
                    range(length), labels, fontsize=min(6, 150 / length), parse_math=False
                )
            if layer == layers - 1:
                axis.set_xticks(
                    range(length), labels, fontsize=min(6, 150 / length), parse_math=False
                )
    figure.suptitle(reading.name, fontsize=11, color=theme.ink, parse_math=False)
    return figure


def draw_entropies(readings: list[Reading], theme: Theme = PAPER) -> Figure:
    """A point for each head, layer by layer, each run in its colour."""
    figure, (axes,) = new_figure(theme, 4)
    width = 0.7 / len(readings)
    for number, reading in enumerate(readings):
        layers, heads = reading.entropies.shape
        x = np.repeat(np.arange(layers), heads) + width * (number - (len(readings) - 1) / 2)
        axes.plot(
            x,
            reading.entropies.ravel(),
            "o",
            markersize=5,
            alpha=0.8,
            label=reading.name,
            **theme.style(number),
        )
    layers = max(reading.entropies.shape[0] for reading in readings)
    axes.set_xticks(range(layers), [f"layer {layer}" for layer in range(layers)])
    axes.set_ylabel("entropy of a head's weights, nats")
    axes.set_ylim(bottom=0)
    add_legend(axes, theme)
    return figure
