"""The figure of a run: it is drawn from whatever the run has recorded."""

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from chargpt.run.curves import draw_curves

BASELINES = {"uniform": math.log(65), "unigram": 3.3, "bigram": 2.5}
TRAIN, VALIDATION, GREY = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (140, 140, 140)
LINES = [{"trainer/step": step, "train/loss": 4 - step / 50} for step in range(0, 101, 10)]
EVALUATED = [
    line | ({"val/loss": line["train/loss"] + 0.3} if line["trainer/step"] % 50 == 0 else {})
    for line in LINES
]


TITLE = "standard: 800,000 parameters"
TITLES = [
    "$x",
    "a$b$c",
    "$\\frac$ 5",
    "x^{2",
    "日本 \N{GRINNING FACE}",
    "a\nb",
    "x" * 300,
    "",
    "\x1b[31m",
]


def draw(
    folder: Path, metrics: list, baselines: dict = BASELINES, title: str = TITLE
) -> np.ndarray:
    """The pixels of the figure, 0 … 255."""
    path = folder / "curves.png"
    draw_curves(metrics, baselines, title, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [file.name for file in folder.iterdir()] == ["curves.png"]
    return (imread(path)[..., :3] * 255).round().astype(int)


def count(pixels: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((np.abs(pixels - colour).max(axis=-1) <= 2).sum())


def test_a_run_is_drawn_with_both_losses_and_the_baselines(tmp_path):
    pixels = draw(tmp_path, EVALUATED)
    assert pixels.shape == (600, 960, 3)
    assert all(count(pixels, colour) > 300 for colour in (TRAIN, VALIDATION, GREY))
    assert 5_000 < (tmp_path / "curves.png").stat().st_size < 200_000


def test_without_validation_points_only_training_is_drawn(tmp_path):
    pixels = draw(tmp_path, LINES)
    assert count(pixels, TRAIN) > 300 and count(pixels, VALIDATION) == 0


@pytest.mark.parametrize("missing", [None, math.nan])
def test_values_that_are_missing_are_left_out(tmp_path, missing):
    metrics = [dict(line) for line in EVALUATED]
    metrics[3]["train/loss"] = missing
    for line in metrics:
        line.setdefault("val/loss", missing)
    pixels = draw(tmp_path, metrics)
    assert count(pixels, TRAIN) > 300 and count(pixels, VALIDATION) > 50


def test_missing_values_are_drawn_like_lines_without_them(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with_none = [{"val/loss": None} | line for line in EVALUATED]
    with_none += [{"trainer/step": 100, "train/loss": None}]
    np.testing.assert_array_equal(draw(tmp_path / "a", with_none), draw(tmp_path / "b", EVALUATED))


@pytest.mark.parametrize("metrics", [[], [{"trainer/step": 5, "train/loss": None}], EVALUATED[:1]])
@pytest.mark.parametrize("baselines", [{}, BASELINES])
def test_a_run_with_at_most_one_point_is_drawn(tmp_path, metrics, baselines):
    assert draw(tmp_path, metrics, baselines).shape == (600, 960, 3)


@pytest.mark.parametrize("title", TITLES)
def test_any_name_can_be_a_title(tmp_path, title):
    assert draw(tmp_path, EVALUATED, title=title).shape == (600, 960, 3)


def test_an_old_figure_is_replaced(tmp_path):
    first = draw(tmp_path, LINES)
    assert (draw(tmp_path, EVALUATED) != first).any()
