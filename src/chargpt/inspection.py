"""`chargpt inspect`: what every head of every layer reads, as maps and entropies, runs side by side, in PNG and on a page."""

import dataclasses
import math
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from chargpt import page
from chargpt.compilation import kept_executables
from chargpt.config import ConfigError, require
from chargpt.corpus import CharTokenizer
from chargpt.figures import PAGE, PAPER, Theme, new_figure, to_png
from chargpt.model import GPT
from chargpt.records import find_runs, name_arms, read_run
from chargpt.tools import Which, note, open_run

MAX_RUNS = 12  # more columns nobody reads
MAX_LABELS = 48  # characters along an axis, beyond which their labels would overlap
SHADES = "Row: the character that asks. Column: the one that is read. The darker, the more (square root of the weight)."
PROMPT = "To be, or not to be, that is the question:"


@dataclasses.dataclass
class InspectOptions:
    """Attention maps and entropies of trained models on a text, layer by layer and head by head, side by side."""

    paths: tuple[str, ...] = ()  # run directories, folders of them, globs
    run: str | None = None  # the same as one option; the newest run when both are left out
    checkpoint: Which = Which.best  # best | last
    prompt: str = PROMPT  # the text that is read
    out: str = "attention"  # the files to write, without their ending

    def __post_init__(self) -> None:
        require(self.prompt != "", "prompt=: is empty; write a text for the models to read")


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one model reads of the text."""

    name: str
    path: Path
    weights: np.ndarray  # [layers, heads, t, s]

    @property
    def entropies(self) -> np.ndarray:
        """[layers, heads]: nats, mean over positions."""
        weights = np.where(self.weights > 0, self.weights, 1.0)
        return -(weights * np.log(weights)).sum(-1).mean(-1)


@kept_executables(note)
def inspect(options: InspectOptions) -> None:
    """Write the PNG and the page; print the entropies."""
    readings = read_all(options)
    text = options.prompt
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    pictures = [(reading, to_png(draw_maps(reading, text))) for reading in readings]
    for reading in readings:
        print(f"{reading.name}: entropy of each head in nats (ln {len(text)} = {math.log(len(text)):.2f} is the most)")
        for layer, heads in enumerate(reading.entropies):
            print(f"  layer {layer}  " + "  ".join(f"{entropy:.2f}" for entropy in heads))
    paths = [out.with_name(out.name + ending) for ending in (".png", ".html")]
    overview = to_png(draw_overview(readings))
    paths[0].write_bytes(overview)
    blocks = [
        page.heading("Side by side", f"{SHADES} L0 H1 is head 1 of layer 0, with its entropy in nats."),
        page.image(overview, "attention maps of every run, layer and head"),
        page.heading("Entropies", "How widely each head reads: the entropy of its weights in nats, mean over positions."),
        page.drawing(draw_entropies(readings, PAGE), "entropies"),
        page.heading("One at a time", SHADES),
        page.tabs("maps", {r.name: page.image(png, f"attention maps of {r.name}") for r, png in pictures}),
    ]
    page.write_page(paths[1], "What each head reads", f"{text!r}", blocks)
    for number, (reading, png) in enumerate(pictures):
        path = out.with_name(f"{out.name}-{number}-{'-'.join(reading.name.split())}.png")
        path.write_bytes(png)
        paths.append(path)
    for path in paths:
        print(path)


def read_all(options: InspectOptions) -> list[Reading]:
    """One reading for each run, the first seed of runs that differ in nothing else."""
    places = options.paths + (() if options.run is None else (options.run,))
    runs = find_runs(places) if places else [open_run(None, options.checkpoint)[0]]
    settings = {}
    for run in runs:
        settings.setdefault(tuple(sorted((name, str(value)) for name, value in read_run(run).settings().items())), run)
    chosen = list(settings.values())
    if len(chosen) > MAX_RUNS:
        note(f"{len(chosen)} runs: the first {MAX_RUNS} are shown")
    chosen = chosen[:MAX_RUNS]
    names = name_arms([read_run(run) for run in chosen])
    return [read(run, name, options) for run, name in zip(chosen, names, strict=True)]


def read(run: Path, name: str, options: InspectOptions) -> Reading:
    run_dir, state, header = open_run(str(run), options.checkpoint)
    try:
        tokens = CharTokenizer(header.vocabulary).encode(options.prompt)
    except ValueError as error:
        raise ConfigError(f"prompt: {error}; {run} knows {header.vocabulary!r}") from None
    context = header.config.dataset.seq_len
    require(len(tokens) <= context, f"prompt: has {len(tokens)} characters, {run} reads {context}; write a shorter one")
    weights = eqx.filter_jit(GPT.attention_weights)(state.averaged, jnp.asarray(tokens))
    return Reading(name, run_dir, np.asarray(jax.device_get(weights), np.float64))


def draw_overview(readings: list[Reading]) -> Figure:
    """A row for each run, a column for each head of each layer."""
    columns = max(reading.weights.shape[0] * reading.weights.shape[1] for reading in readings)
    figure, axes = new_figure(PAPER, 1.4 + 0.85 * columns, 0.4 + 1.05 * len(readings), len(readings), columns)
    for number, axis in enumerate(axes):
        row, column = divmod(number, columns)
        layers, heads = readings[row].weights.shape[:2]
        if column >= layers * heads:
            axis.set_axis_off()
            continue
        layer, head = divmod(column, heads)
        draw_map(axis, readings[row].weights[layer, head], f"L{layer} H{head}  {readings[row].entropies[layer, head]:.1f}")
        if column == 0:
            axis.set_ylabel(readings[row].name, fontsize=8, rotation=0, ha="right", va="center", parse_math=False)
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
    figure, axes = new_figure(theme, 0.6 + side * heads, 0.8 + (side + 0.25) * layers, layers, heads)
    for number, axis in enumerate(axes):
        layer, head = divmod(number, heads)
        draw_map(axis, reading.weights[layer, head], f"layer {layer}, head {head}: {reading.entropies[layer, head]:.2f}")
        if length <= MAX_LABELS:
            labels = [character if character.isprintable() else "\N{RETURN SYMBOL}" for character in text]
            if head == 0:
                axis.set_yticks(range(length), labels, fontsize=min(6, 150 / length), parse_math=False)
            if layer == layers - 1:
                axis.set_xticks(range(length), labels, fontsize=min(6, 150 / length), parse_math=False)
    figure.suptitle(reading.name, fontsize=11, color=theme.ink, parse_math=False)
    return figure


def draw_entropies(readings: list[Reading], theme: Theme = PAPER) -> Figure:
    """A point for each head, layer by layer, each run in its colour."""
    figure, (axes,) = new_figure(theme, 8, 4)
    width = 0.7 / len(readings)
    for number, reading in enumerate(readings):
        layers, heads = reading.entropies.shape
        x = np.repeat(np.arange(layers), heads) + width * (number - (len(readings) - 1) / 2)
        axes.plot(x, reading.entropies.ravel(), "o", markersize=5, alpha=0.8, label=reading.name, **theme.style(number))
    layers = max(reading.entropies.shape[0] for reading in readings)
    axes.set_xticks(range(layers), [f"layer {layer}" for layer in range(layers)])
    axes.set_ylabel("entropy of a head's weights, nats")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, labelcolor=theme.ink, fontsize=9, ncols=2)
    return figure
