"""Figures of a comparison.

In the SVG for a page, colours are the page's CSS variables, so that one figure is light and dark. A
page scales its figures to its own width, so they share one width and one type size.
"""

import dataclasses
import re
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

from chargpt.run.curves import save
from chargpt.study.arms import Arm, Difference

matplotlib.rcParams["text.parse_math"] = False  # the name of an arm is not a formula

WIDTH = 11  # inches
TYPE = 10  # points
LINE = 135  # characters that fit the width

# Okabe and Ito's colours, distinct with every common colour blindness: on white, and lightened, on
# near-black.
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07c00", "#3f9fd6", "#5b5b5b")
DARK = ("#4aa9e9", "#ff8a4c", "#2dc99a", "#e6a0c8", "#f0b93a", "#8fd0f7", "#b5b5b5")
MARKERS = "os^vDPX"

# What it took to reach a loss: the metric, and what it is
AXES: dict[str, tuple[str, str]] = {
    "steps": ("trainer/step", "optimizer steps"),
    "tokens": ("trainer/tokens", "training tokens"),
    "seconds": ("trainer/seconds", "seconds of wall time, compilation and evaluation included"),
    "FLOPs": ("trainer/tokens", "floating-point operations"),  # times those of a token
}
# Name in summary.json: what it is, and its unit
COSTS: dict[str, tuple[str, str]] = {
    "num_params": ("parameters", ""),
    "kv_cache_bytes_per_token": ("KV cache per token", "B"),
    "peak_memory_bytes": ("memory of a training step", "B"),
    "tokens_per_second": ("training, tokens/s", ""),
    "decode_tokens_per_second": ("decoding, tokens/s", ""),
    "train_seconds": ("wall time of the run", "s"),
}


@dataclasses.dataclass(frozen=True)
class Theme:
    """The colours of a figure: text and lines, the grid, and arms, which share them if many."""

    ink: str
    grid: str
    arms: tuple[str, ...]

    def style(self, number: int) -> dict[str, Any]:
        """The style of the arm of that number; a page finds what belongs to it by its `gid`."""
        return dict(color=self.arms[number % len(self.arms)], gid=f"arm-{number}")

    def points(self, number: int) -> dict[str, Any]:
        """The style of points without a line."""
        return self.style(number) | dict(marker=marker(number), linestyle="none")

    @property
    def legend(self) -> dict[str, Any]:
        return dict(frameon=False, labelcolor=self.ink, fontsize=TYPE)


PAPER = Theme("#333333", "#dddddd", LIGHT)
# Stand-ins, which to_svg replaces
PAGE = Theme("#010203", "#010204", tuple(f"#0a0b{number:02x}" for number in range(len(LIGHT))))


def marker(number: int) -> str:
    return MARKERS[number % len(MARKERS)]


def new_figure(
    theme: Theme, height: float, rows: int = 1, columns: int = 1, width: float = WIDTH
) -> tuple[Figure, list[Axes]]:
    """A figure of that size in inches, and its axes row by row."""
    figure = Figure((width, height), layout="constrained", frameon=theme is not PAGE)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.set(facecolor="none", axisbelow=True)
        axis.grid(color=theme.grid, linewidth=0.8)
        axis.tick_params(colors=theme.ink, labelsize=TYPE, length=0)
        axis.spines[:].set_visible(False)
        for label in (axis.xaxis.label, axis.yaxis.label):
            label.set(color=theme.ink, fontsize=TYPE)
    return figure, axes


def curves(arms: Sequence[Arm], against: str, theme: Theme = PAPER) -> Figure:
    """Validation loss against one of AXES: the mean over seeds, shaded from lowest to highest."""
    figure, (axes,) = new_figure(theme, 4.8)
    for number, arm in enumerate(arms):
        evaluations = evaluations_by_step(arm, against)
        if not evaluations:
            continue
        x, losses = zip(*evaluations, strict=True)
        style = theme.style(number)
        line = style | dict(marker=marker(number), markersize=4.5, linewidth=1.8, label=arm.name)
        axes.plot(x, np.mean(losses, axis=1), **line)
        if len(arm.runs) > 1:
            ends = np.min(losses, axis=1), np.max(losses, axis=1)
            axes.fill_between(x, *ends, alpha=0.18, linewidth=0, **style)
    axes.set(xlabel=AXES[against][1], ylabel="validation loss, nats per character")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(7))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(ncols=2, **theme.legend)
    return figure


def evaluations_by_step(arm: Arm, against: str) -> list[tuple[float, list[float]]]:
    """[(place on the x axis, the seeds' losses)] of every step that all seeds evaluated."""
    by_step: dict[int, list[tuple[float, float]]] = {}
    for run in arm.runs.values():
        scale = (run.number("flops_per_token") or 0) if against == "FLOPs" else 1
        for line in run.evaluations:
            point = line[AXES[against][0]] * scale, line["val/loss"]
            by_step.setdefault(line["trainer/step"], []).append(point)
    shared = [points for _, points in sorted(by_step.items()) if len(points) == len(arm.runs)]
    columns = [list(zip(*points, strict=True)) for points in shared]
    return [(statistics.fmean(places), list(losses)) for places, losses in columns]


def tradeoffs(arms: Sequence[Arm], theme: Theme = PAPER) -> Figure:
    """Best validation loss against each cost; bars are the spread over seeds.

    Down is better, and so is the side that is named.
    """
    figure, axes = new_figure(theme, 6.4, 2, 3)
    for axis, (name, (title, unit)) in zip(axes, COSTS.items(), strict=True):
        for number, arm in enumerate(arms):
            cost, loss = arm.estimate(name), arm.estimate("best/val_loss")
            if cost is None or loss is None:
                continue
            style = theme.points(number) | dict(markersize=8, elinewidth=1.2, label=arm.name)
            axis.errorbar(cost.mean, loss.mean, xerr=cost.spread, yerr=loss.spread, **style)
        better = "right" if name.endswith("tokens_per_second") else "left"
        axis.set_title(title, loc="left", color=theme.ink, fontsize=TYPE)
        axis.set_xlabel(f"better: {better}")
        axis.margins(0.15)
        axis.xaxis.set_major_formatter(EngFormatter(unit, sep="\N{NO-BREAK SPACE}" if unit else ""))
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.yaxis.set_major_locator(MaxNLocator(5))
    for axis in axes[::3]:
        axis.set_ylabel("best validation loss")
    handles, labels = axes[0].get_legend_handles_labels()
    fitting = LINE // (10 + max(map(len, labels), default=0))
    columns = max(1, min(len(arms), 6, fitting))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, **theme.legend)
    return figure


def by_cache(arms: Sequence[Arm]) -> dict[str, list[tuple[float, int, Arm]]]:
    """{attention type: arms as (bytes of cache per token, number, arm), smallest first}."""
    found: dict[str, list[tuple[float, int, Arm]]] = {}
    for number, arm in enumerate(arms):
        if (cache := arm.estimate("kv_cache_bytes_per_token")) is not None:
            kind = arm.first_run.config.model.mha_type.name
            found.setdefault(kind, []).append((cache.mean, number, arm))
    return {kind: sorted(points, key=lambda point: point[:2]) for kind, points in found.items()}


def frontier(arms: Sequence[Arm], theme: Theme = PAPER) -> Figure:
    """Best validation loss against the size of the KV cache, a line for each attention type.

    The line runs through the lowest mean at each size; bars are the spread over seeds.
    """
    figure, (axes,) = new_figure(theme, 5.2)
    for kind, points in by_cache(arms).items():
        first = points[0][1]  # all arms of a type look like this one
        lowest: dict[float, float] = {}
        for size, number, arm in points:
            loss = arm.estimate("best/val_loss")
            assert loss is not None  # of a finished run
            lowest[size] = min(loss.mean, lowest.get(size, loss.mean))
            style = theme.points(first) | dict(gid=f"arm-{number}", markersize=7)
            axes.errorbar(size, loss.mean, yerr=loss.spread, elinewidth=1.2, **style)
        line = theme.style(first) | dict(gid=None, marker=marker(first), markersize=7)
        axes.plot(list(lowest), list(lowest.values()), linewidth=1.8, label=kind, **line)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set(xlabel="bytes of KV cache per token (better: left)", ylabel="best validation loss")
    axes.margins(0.08)
    axes.legend(ncols=2, **theme.legend)
    return figure


def paired_differences(arms: Sequence[Arm], theme: Theme = PAPER) -> Figure:
    """Loss minus the first arm's, seed by seed.

    Hollow points are seeds, the filled one with its bar is their mean and its 95 % interval.
    """
    figure, (axes,) = new_figure(theme, 0.9 + 0.42 * max(1, len(arms) - 1))
    axes.axvline(0, color=theme.ink, linewidth=1)
    for number, arm in enumerate(arms[1:], 1):
        values = list(arm.difference(arms[0]).values())
        if (found := Difference.of(values)) is None:
            continue
        style = theme.points(number)
        axes.plot(values, [number] * len(values), markerfacecolor="none", markersize=6, **style)
        bar = dict(xerr=found.interval, markersize=9, elinewidth=2, **style)
        axes.errorbar(found.mean, number, **bar)
    axes.set_yticks(range(1, len(arms)), [arm.name for arm in arms[1:]])
    axes.set_ylim(len(arms) - 0.4, 0.4)
    first = arms[0].name
    axes.set_xlabel(f"best validation loss minus that of {first} (left of the line is better)")
    axes.margins(x=0.1)
    return figure


def to_svg(figure: Figure, name: str) -> str:
    """SVG to stand inside a page; `name` keeps its ids apart from those of other figures there."""
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}
    with matplotlib.rc_context(options):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        svg = save(figure, format="svg", metadata=nothing).decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'id="arm-(\d+)"', r'class="arm arm\1"', svg)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    # The page's own font; up to 3.10, Matplotlib wrote it together with the size.
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    svg = svg.replace(PAGE.ink, "var(--ink)").replace(PAGE.grid, "var(--grid)")
    svg = re.sub(r"#0a0b([0-9a-f]{2})", lambda match: f"var(--arm{int(match[1], 16)})", svg)
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)


def to_png(figure: Figure) -> bytes:
    return save(figure, format="png", dpi=130)
