"""curves.png: the losses of a run."""

import io
import warnings
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

LINES = {"uniform": "ln V", "unigram": "unigram", "bigram": "bigram"}


def draw_curves(
    metrics: list[dict[str, int | float | None]],
    baselines: dict[str, int | float],
    title: str,
    path: Path,
) -> None:
    """Training and validation loss against steps, with what counting characters alone would reach."""
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, label, style in (
        ("train/loss", "train", dict(color="#0072B2", linewidth=1.2)),
        ("val/loss", "validation", dict(color="#D55E00", linewidth=1.8, marker="o", markersize=4)),
    ):
        points = [
            (line["trainer/step"], line[name]) for line in metrics if line.get(name) is not None
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True), label=f"{label} (last {points[-1][1]:.3f})", **style
            )
    for name, value in baselines.items():
        axes.axhline(value, color="0.55", linewidth=0.8, linestyle="--")
        axes.annotate(
            f"{LINES[name]} {value:.2f}", (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom",
            fontsize=8, color="0.35", xytext=(-4, 2), textcoords="offset points",
        )  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per character)")
    title = "".join(character if character.isprintable() else " " for character in title)[:90]
    axes.set_title(title, fontsize=11, loc="left", parse_math=False)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="lower left")
    path.write_bytes(save(figure, format="png"))


def save(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # an arm's name may be in any script
        figure.savefig(buffer, **options)
    return buffer.getvalue()
