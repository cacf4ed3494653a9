"""`chargpt inspect`: what every head of every layer reads, as maps and entropies."""

import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chargpt.checkpoint import Which, find_run
from chargpt.compose import slug
from chargpt.errors import note, require
from chargpt.run import trained
from chargpt.run.cache import kept_executables
from chargpt.run.directory import find_runs, read_run
from chargpt.study import page
from chargpt.study.arms import name_arms, one_of_each
from chargpt.study.figures import PAGE, PAPER, Theme, new_figure, to_png

MAX_RUNS = 12  # nobody reads more rows
MAX_LABELS = 48  # characters along an axis, beyond which their labels would overlap
SHADES = (
    "Row: the character that asks. Column: the one that is read. "
    "The darker, the more (square root of the weight)."
)
EXAMPLE = "L0 H1 is head 1 of layer 0, with its entropy in nats."
ENTROPIES = "How widely each head reads: the entropy of its weights in nats, mean over positions."
PROMPT = "To be, or not to be, that is the question:"


@dataclasses.dataclass
class InspectOptions:
    """Attention maps and entropies of trained models on a text, head by head, side by side."""

    paths: tuple[str, ...] = ()  # run directories, folders of them, globs
    run: str | None = None  # the same as one option; the newest run if neither is given
    checkpoint: Which = Which.best  # best | last
    prompt: str = PROMPT  # the text that is read
    out: str = "attention"  # the files to write, without their ending

    def __post_init__(self) -> None:
        require(self.prompt != "", "prompt=: is empty; write a text for the models to read")
        page.check_stem(self.out)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one model reads of the text."""

    name: str
    weights: np.ndarray  # [layers, heads, t, s]

    @functools.cached_property
    def entropies(self) -> np.ndarray:
        """[layers, heads]: nats, mean over positions."""
        weights = np.where(self.weights > 0, self.weights, 1.0)
        return -(weights * np.log(weights)).sum(-1).mean(-1)


@kept_executables(note)
def inspect(options: InspectOptions) -> None:
    """Print the entropies; write the page, and the PNGs of runs whose attention has weights."""
    weights, text = read_all(options), options.prompt
    readings = [Reading(name, array) for name, array in weights if array is not None]
    without = [name for name, array in weights if array is None]
    lines = [f"{name}: none (its attention has no weights)" for name in without]
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
        maps = {reading.name: to_png(draw_maps(reading, text)) for reading in readings}
        blocks += figures(readings, overview, maps)
        images[".png"] = overview
        for number, (name, png) in enumerate(maps.items()):
            images[f"-{number}-{slug(name)}.png"] = png
    html = page.render("What each head reads", f"{text!r}", blocks)
    for path in page.write_files(Path(options.out), {".html": html, **images}):
        print(path)


def figures(readings: list[Reading], overview: bytes, maps: dict[str, bytes]) -> list[str]:
    """The page's figures: all runs side by side, their entropies, and one run at a time."""
    images = {name: page.image(png, f"attention maps of {name}") for name, png in maps.items()}
    return [
        page.heading("Side by side", f"{SHADES} {EXAMPLE}"),
        page.image(overview, "attention maps of every run, layer and head"),
        page.heading("Entropies", ENTROPIES),
        page.drawing(draw_entropies(readings, PAGE), "entropies"),
        page.heading("One at a time", SHADES),
        page.tabs("maps", images),
    ]


def read_all(options: InspectOptions) -> list[tuple[str, np.ndarray | None]]:
    """(name, attention weights) of every run; of runs that differ only in their seed, the first."""
    places = options.paths + (() if options.run is None else (options.run,))
    runs = find_runs(places) if places else [find_run(None, options.checkpoint)]
    chosen = one_of_each(list(map(read_run, runs)))
    if len(chosen) > MAX_RUNS:
        note(f"{len(chosen)} runs: only the first {MAX_RUNS} are shown")
    chosen = chosen[:MAX_RUNS]
    models = (trained.load(record.path, options.checkpoint.name) for record in chosen)
    weights = [model.attention_weights(options.prompt) for model in models]
    return list(zip(name_arms(chosen), weights, strict=True))


def draw_overview(readings: list[Reading]) -> Figure:
    """A row for each run, a column for each head of each layer."""
    columns = max(reading.entropies.size for reading in readings)
    width, height = 1.4 + 0.85 * columns, 0.4 + 1.05 * len(readings)
    figure, axes = new_figure(PAPER, height, len(readings), columns, width)
    for row, reading in enumerate(readings):
        line = axes[row * columns : (row + 1) * columns]
        line[0].set_ylabel(reading.name, fontsize=8, rotation=0, ha="right", va="center")
        for axis, (layer, head) in zip(line, np.ndindex(reading.entropies.shape), strict=False):
            title = f"L{layer} H{head}  {reading.entropies[layer, head]:.1f}"
            draw_map(axis, reading.weights[layer, head], title)
        for axis in line[reading.entropies.size :]:
            axis.set_axis_off()
    return figure


def draw_map(axis: Axes, weights: np.ndarray, title: str) -> None:
    axis.grid(False)
    axis.imshow(np.sqrt(weights), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(title, fontsize=7, loc="left")
    axis.set(xticks=[], yticks=[])


def draw_maps(reading: Reading, text: str) -> Figure:
    """A grid of maps: a row for each layer, a column for each head."""
    layers, heads, length, _ = reading.weights.shape
    side = 1.9 if length <= MAX_LABELS else 2.4
    width, height = 0.6 + side * heads, 0.8 + (side + 0.25) * layers
    figure, axes = new_figure(PAPER, height, layers, heads, width)
    for axis, (layer, head) in zip(axes, np.ndindex(layers, heads), strict=True):
        title = f"layer {layer}, head {head}: {reading.entropies[layer, head]:.2f}"
        draw_map(axis, reading.weights[layer, head], title)
    if length <= MAX_LABELS:
        labels = [c if c.isprintable() else "\N{RETURN SYMBOL}" for c in text]
        size = min(6, 150 / length)
        for axis in axes[::heads]:
            axis.set_yticks(range(length), labels, fontsize=size)
        for axis in axes[-heads:]:
            axis.set_xticks(range(length), labels, fontsize=size)
    figure.suptitle(reading.name, fontsize=11, color=PAPER.ink)
    return figure


def draw_entropies(readings: list[Reading], theme: Theme = PAPER) -> Figure:
    """A point for each head, layer by layer, each run in its colour."""
    figure, (axes,) = new_figure(theme, 4)
    width = 0.7 / len(readings)
    for number, reading in enumerate(readings):
        layers, heads = reading.entropies.shape
        x = np.repeat(np.arange(layers), heads) + width * (number - (len(readings) - 1) / 2)
        points = dict(markersize=5, alpha=0.8, label=reading.name, **theme.style(number))
        axes.plot(x, reading.entropies.ravel(), "o", **points)
    layers = max(len(reading.entropies) for reading in readings)
    axes.set_xticks(range(layers), [f"layer {layer}" for layer in range(layers)])
    axes.set_ylabel("entropy of a head's weights, nats")
    axes.set_ylim(bottom=0)
    axes.legend(ncols=2, **theme.legend)
    return figure
