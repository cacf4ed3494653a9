"""curves.png: the losses of a run."""

import io
import warnings
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

CURVES: dict[str, tuple[str, dict[str, Any]]] = {
    "train/loss": ("train", {"color": "#0072B2", "linewidth": 1.2}),
    "val/loss": ("validation", {"color": "#D55E00", "linewidth": 1.8, "marker": "o", "ms": 4}),
}
NAMES = {"uniform": "ln V", "unigram": "unigram", "bigram": "bigram"}
LABEL: dict[str, Any] = {"fontsize": 8, "color": "0.35", "ha": "right", "va": "bottom"}
LABEL |= {"xytext": (-4, 2), "textcoords": "offset points"}


def draw_curves(
    metrics: list[dict[str, Any]], baselines: dict[str, float], title: str, path: Path
) -> None:
    """Training and validation loss against steps, with what counting characters would reach."""
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for name, (label, style) in CURVES.items():
        known = [line for line in metrics if line.get(name) is not None]
        if known:
            steps, losses = ([line[key] for line in known] for key in ("trainer/step", name))
            axes.plot(steps, losses, label=f"{label} (last {losses[-1]:.3f})", **style)
    right_end = axes.get_yaxis_transform()
    for name, value in baselines.items():
        axes.axhline(value, color="0.55", linewidth=0.8, linestyle="--")
        axes.annotate(f"{NAMES[name]} {value:.2f}", (1, value), xycoords=right_end, **LABEL)
    axes.set(xlabel="step", ylabel="loss (nats per character)")
    title = "".join(character if character.isprintable() else " " for character in title)[:90]
    axes.set_title(title, fontsize=11, loc="left", parse_math=False)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="lower left")
    path.write_bytes(save(figure, format="png"))


def save(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name may be in any script
        figure.savefig(buffer, **options)
    return buffer.getvalue()
