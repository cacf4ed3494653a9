"""Several runs side by side: the table, Markdown, CSV, the figures, and the page in a browser."""

import csv
import functools
import io
import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from fake_runs import CORPUS, make_record, make_run
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.image import imread
from pages import CHROMIUM, type_sizes
from rich.console import Console

from chargpt import cli
from chargpt.errors import ConfigError
from chargpt.study import figures, page
from chargpt.study.arms import MAX_NAME, Arm
from chargpt.study.compare import (
    COLUMNS,
    CompareOptions,
    Comparison,
    Drawing,
    default_place,
    doubts,
    read_comparison,
    rows,
    short,
    show,
    subtitle,
    to_csv,
    to_markdown,
    write,
)

TYPES = ["standard", "selective", "mqa", "gqa", "mla", "equinox"]
SEEDS = [0, 1, 2]
RNG = np.random.default_rng(0)
# Of each type and seed. A seed changes all types alike, by more than the types differ.
LOSSES = np.round(RNG.normal([1.9, 1.84, 1.98], 0.01, (6, 3)), 9)
SPEEDS = np.round(RNG.uniform(900, 20_000, (6, 3)), 3)
CACHES = [4096, 4096, 1024, 2048, 192, 4096]
BEST = TYPES[LOSSES.mean(axis=1).argmin()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of all types and seeds, and one job of it that did not finish."""
    folder = tmp_path_factory.mktemp("runs") / "sweep"
    for kind, name in enumerate(TYPES):
        for seed in SEEDS:
            run = folder / f"{3 * kind + seed}_{name} seed={seed}"
            losses = [float(LOSSES[kind, seed]) + more for more in (1.0, 0.3, 0.0)]
            cache, speed = CACHES[kind], SPEEDS[kind, seed]
            summary = {"tokens_per_second": speed, "kv_cache_bytes_per_token": cache}
            settings = [f"model.mha_type={name}", f"seed={seed}"]
            sample = f"{name} {seed}\n<i>wrote</i> & this"
            make_run(run, *settings, val_losses=losses, summary=summary, sample=sample)
    make_run(folder / "18_mqa seed=3", "model.mha_type=mqa", "seed=3", summary={"final/step": 400})
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> Comparison:
    return read_comparison([str(folder)])


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"


def paired(kind: int) -> list[str]:
    """The cells that compare a type with the first, as words of the table."""
    if kind == 0:
        return ["-", "-"]
    values = LOSSES[kind] - LOSSES[0]
    half = scipy.stats.t.interval(0.95, len(values) - 1, scale=scipy.stats.sem(values))[1]
    agreeing = (np.sign(values) == np.sign(values.mean())).sum()
    return f"{values.mean():+.4f} ± {half:.4f} {agreeing}/{len(values)}".split()


def table(result: Comparison, width: int = 100, colours: bool = False, **options: Any) -> list[str]:
    """The lines that are printed."""
    file = io.StringIO()
    colour = dict(force_terminal=True, color_system="standard") if colours else {}
    show(result, Console(file=file, width=width, highlight=False, **colour), **options)
    return file.getvalue().splitlines()


# ---- the table


def test_the_table_fits_a_hundred_columns_and_leaves_no_number_out(result: Comparison) -> None:
    lines = table(result)
    *body, note = lines
    assert max(map(len, body)) <= 100 and "…" not in "".join(body)
    assert " ".join(body[:2]).split() == [
        *["best", "minus", "cache", "train", "decode"],
        *["arm", "seeds", "val", "loss", "first", "agree", "params", "B/token", "tok/s", "tok/s"],
        *["memory", "time"],
    ]
    caches = {4096: "4.1k", 1024: "1.02k", 2048: "2.05k", 192: "192"}
    for kind, line in enumerate(body[2:]):
        loss = spread(LOSSES[kind]).split()
        speed = short(float(SPEEDS[kind].mean()))
        costs = ["809k", caches[CACHES[kind]], speed, "3.1k", "69.7MB", "39.8s"]
        assert line.split() == [TYPES[kind], "3", *loss, *paired(kind), *costs]
    assert note.startswith("note: left out, not finished: ")
    assert note.endswith("18_mqa seed=3 (step 400 of 1600)")


def test_a_name_too_long_for_its_column_is_broken_before_an_equals_sign(result: Comparison) -> None:
    arm = Arm("mla kv_lora_rank=16", result.arms[-1].runs)
    lines = table(Comparison([*result.arms, arm], []))
    assert [line[:15].strip() for line in lines[-3:]] == ["mla", "kv_lora_rank", "=16"]
    assert "mla kv_lora_rank=16" in table(Comparison([*result.arms, arm], []), width=120)[-1]


def test_the_seed_by_seed_difference_has_the_smaller_spread_here(result: Comparison) -> None:
    paired = [np.std(LOSSES[kind] - LOSSES[0], ddof=1) for kind in range(1, 6)]
    assert max(paired) < np.std(LOSSES, axis=1, ddof=1).min()
    column = COLUMNS.index("minus first")
    shown = [cells[column][1] for cells in rows(result.arms)]
    assert shown[1:] == pytest.approx((LOSSES - LOSSES[0]).mean(axis=1)[1:])


def test_only_the_best_arm_is_bold(result: Comparison) -> None:
    bold = [line for line in table(result, colours=True) if "\x1b[1m" in line]
    assert [name for line in bold for name in TYPES if re.search(rf"m{name}\b", line)] == [BEST]


def test_a_single_arm_is_not_the_best_of_anything(result: Comparison) -> None:
    single = Comparison(result.arms[:1], [])
    assert not any("\x1b[1m" in line and "standard" in line for line in table(single, colours=True))


def test_ranked_arms_are_in_the_order_of_their_losses_and_the_best_run_is_named(
    result: Comparison,
) -> None:
    lines = table(result, ranked=True)
    order = [TYPES[kind] for kind in LOSSES.mean(axis=1).argsort()]
    assert [line.split()[0] for line in lines[2:8]] == order
    kind = TYPES.index(BEST)
    seed = LOSSES[kind].argmin()
    assert lines[8].endswith(f"{3 * kind + seed}_{BEST} seed={seed}")
    (mqa,) = (line.split() for line in lines[2:8] if line.startswith("mqa"))
    assert mqa[2:5] == spread(LOSSES[2]).split()


@pytest.mark.parametrize(
    "name", ["x" * MAX_NAME, "mqa " * 10, "mqa match=params learning_rate=0.001"]
)
def test_long_names_fold_and_truncate_no_number(result: Comparison, name: str) -> None:
    arms = [Arm(name, result.arms[0].runs), *result.arms[1:]]
    lines = table(Comparison(arms, []))
    assert max(map(len, lines)) <= 100 and "…" not in "".join(lines)
    numbers = r"(?:809k|69\.7MB|39\.8s|\d\.\d{4} ± \d\.\d{4})"
    assert len(re.findall(numbers, "\n".join(lines))) == 6 * 3 + 6 + 5
    end = next(number for number, line in enumerate(lines) if line.startswith("selective"))
    folded = "".join(line[: lines[1].index(" seeds")] for line in lines[2:end])
    unbroken = re.sub(" +=", "=", folded)  # a line may begin with an equals sign
    assert unbroken.split() == name.split() or folded.strip() == name


@pytest.mark.parametrize("evil", ["\x1b[31m", "\x9b31m", "\u202e", "\x00"])
def test_nothing_sends_control_characters_to_the_terminal(result: Comparison, evil: str) -> None:
    runs = {seed: make_record(f"seed={seed}", path=Path(f"a{evil}b")) for seed in SEEDS}
    odd = Comparison([Arm("arm", runs), *result.arms], [f"left out: a{evil}b"])
    lines = table(odd, ranked=True)
    assert all(line.isprintable() for line in lines)


@given(st.floats(0, 9.99e11))
@example(99.94)
@example(99.96)
@example(999.49)
@example(999.5)
@example(999.51)
@example(1000.0)
@example(999_499.0)
@example(999_500.0)
@example(1e6)
@example(999_499_999.0)
@example(999_500_000.0)
@example(1e9)
def test_a_short_number_is_correct_to_three_digits(value: float) -> None:
    text = short(value, "B")
    found = re.fullmatch(r"([\d.]+(?:e-\d+)?)([kMG]?)B", text)
    assert found is not None, text
    number, size = float(found[1]), {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}[found[2]]
    assert number * size == pytest.approx(value, rel=0.006)
    assert number < 1000 and (not found[2] or number >= 1)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(None, "-"), (0.0, "0"), (64, "64"), (999, "999"), (999.6, "1k"), (1024, "1.02k")],
        *[(808_576, "809k"), (69_707_352, "69.7M"), (999_600, "1M"), (1.5e9, "1.5G")],
        (39.75, "39.8"),
    ],
)
def test_short_numbers(value: float | None, text: str) -> None:
    assert short(value) == text


# ---- doubts


def arm(name: str, *overrides: str, seeds: Sequence[int] = SEEDS, **summary: Any) -> Arm:
    runs = {seed: make_record(*overrides, f"seed={seed}", summary=summary) for seed in seeds}
    return Arm(name, runs)


def test_runs_that_are_alike_raise_no_doubts(result: Comparison) -> None:
    assert doubts(result.arms) == [] and doubts([arm("a"), arm("b")]) == []


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (
            arm("b", corpus_sha256="0" * 64),
            f"texts differ ({CORPUS[:12]}, 000000000000): their losses cannot be compared",
        ),
        (
            arm("b", device="NVIDIA H100"),
            "devices differ (cpu (2 cores), NVIDIA H100): their speeds cannot be compared",
        ),
        (
            arm("b", versions={"jax": "0.11.0"}),
            "versions of jax differ (0.10.2, 0.11.0): compare their speeds with care",
        ),
        (
            arm("b", "trainer.num_steps=800", **{"final/step": 800}),
            "training tokens differ (1,638,400, 819,200): their losses come from different budgets",
        ),
        (
            arm("b", population=8),
            "* of a program that trains several runs: not those of a run alone",
        ),
        (arm("b", seeds=[1]), "only one seed, so no spread: b; add seed=0,1,2"),
        (arm("b", seeds=[3, 4]), "no seed in common with a, so no paired difference: b"),
    ],
    ids=["texts", "devices", "versions", "tokens", "population", "one seed", "other seeds"],
)
def test_what_makes_numbers_less_comparable_is_mentioned(other: Arm, expected: str) -> None:
    assert doubts([arm("a"), other, arm("c")]) == [expected]


def test_numbers_of_a_program_that_several_runs_shared_are_marked() -> None:
    alone, shared = rows([arm("a"), arm("b", population=8)])
    marked = [name for name, (text, _) in zip(COLUMNS, shared, strict=True) if text.endswith("*")]
    assert marked == ["train tok/s", "decode tok/s", "memory", "time"]
    assert not any(text.endswith("*") for text, _ in alone)


def test_doubts_count_within_an_arm_too_and_a_single_arm_needs_no_seeds() -> None:
    runs = {0: make_record(), 1: make_record("seed=1", summary={"device": "other"})}
    assert doubts([Arm("a", runs)]) == [
        "devices differ (cpu (2 cores), other): their speeds cannot be compared"
    ]
    assert doubts([arm("a", seeds=[0])]) == []


def compared_or_refused(folder: Path) -> None:
    """Do all that reads a run's files, except drawing them; a refusal must be one line."""
    try:
        arms = read_comparison([str(folder)]).arms
        assert subtitle(arms).startswith("1 runs of 1 arms")
        for against in figures.AXES:
            figures.evaluations_by_step(arms[0], against)
    except ConfigError as error:
        assert str(error).isprintable() and str(folder) in str(error)


@pytest.mark.parametrize(
    "summary",
    [{"versions": None}, {"versions": [1]}, {"corpus_sha256": None}, {"corpus_sha256": 5}],
)
def test_summaries_of_other_programs_are_compared_or_refused(
    tmp_path: Path, summary: dict[str, Any]
) -> None:
    make_run(tmp_path / "a", summary=summary)
    compared_or_refused(tmp_path)


@pytest.mark.parametrize(
    ("line", "finished"),
    [
        ({"a": 1}, False),
        ({"val/loss": 2.0}, True),
        ({"val/loss": 2.0}, False),
        ({"trainer/step": 5, "val/loss": "2"}, True),
    ],
)
def test_metrics_of_other_programs_are_compared_or_refused(
    tmp_path: Path, line: dict[str, Any], finished: bool
) -> None:
    run = make_run(tmp_path / "a", summary={} if finished else {"final/step": None})
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    compared_or_refused(tmp_path)


# ---- Markdown and CSV


def cells(line: str) -> list[str]:
    """The cells of a line of a Markdown table, as GitHub splits it: an escaped bar is text."""
    assert line.startswith("| ") and line.endswith(" |")
    found = re.findall(r"(?:\\.|[^|\\])+", line[1:-1])
    return [re.sub(r"\\([\\|])", r"\1", cell.strip()) for cell in found]


def test_markdown_holds_the_same_cells_as_the_table(result: Comparison) -> None:
    head, rule, *body = to_markdown(result.arms).splitlines()
    assert cells(head) == list(COLUMNS) and cells(rule) == ["---"] * len(COLUMNS)
    texts = [[text for text, _ in row] for row in rows(result.arms)]
    assert [cells(line) for line in body] == texts
    assert [cells(line)[2] for line in body] == [spread(losses) for losses in LOSSES]
    assert [cells(line)[3] for line in body] == [f"{np.mean(losses):.4f}" for losses in LOSSES]


@pytest.mark.parametrize("name", ["a|b", "|", "a||b|", "a=\\x", "a\\|b", "a\\"])
def test_markdown_keeps_its_columns_whatever_an_arm_is_called(name: str) -> None:
    lines = to_markdown([arm(name), arm("other")]).splitlines()
    assert [len(cells(line)) for line in lines] == [len(COLUMNS)] * 4
    assert cells(lines[2])[0] == name


def test_csv_has_a_row_for_each_run_with_all_digits_of_its_numbers(result: Comparison) -> None:
    lines = list(csv.DictReader(io.StringIO(to_csv(result.arms))))
    assert [(line["arm"], int(line["seed"])) for line in lines] == [
        (name, seed) for name in TYPES for seed in SEEDS
    ]
    texts = ("arm", "seed", "compile_cached", "path")
    for line, (kind, seed) in zip(lines, np.ndindex(6, 3), strict=True):
        assert float(line["best/val_loss"]) == LOSSES[kind, seed]
        assert float(line["tokens_per_second"]) == SPEEDS[kind, seed]
        summary = json.loads((Path(line["path"]) / "summary.json").read_text())
        numbers = {name: float(text) for name, text in line.items() if name not in texts}
        assert numbers == {name: summary[name] for name in numbers} and len(numbers) == 11


def test_csv_leaves_missing_numbers_empty_and_quotes_what_it_must() -> None:
    summary = {"num_params": None, "peak_memory_bytes": float("nan")}
    run = make_record(path=Path('a, "b"\nc'), summary=summary)
    (line,) = csv.DictReader(io.StringIO(to_csv([Arm('x, "y"', {0: run})])))
    assert (line["arm"], line["path"]) == ('x, "y"', 'a, "b"\nc')
    assert line["num_params"] == line["peak_memory_bytes"] == ""
    assert line["flops_per_token"] == "5194752.0"


# ---- the files


def test_the_files_are_written_side_by_side(written: list[Path], result: Comparison) -> None:
    endings = (".html", ".md", ".csv", ".png", ".jsonl")
    assert [path.name for path in written] == [f"comparison{ending}" for ending in endings]
    assert sorted(written[0].parent.iterdir()) == sorted(written)
    _, markdown, table, figure, records = written
    note = f"Note: {result.remarks[0]}"
    text = f"# Types & <seeds>\n\n{subtitle(result.arms)}\n\n{to_markdown(result.arms)}\n{note}\n"
    assert markdown.read_text().startswith(text)
    assert table.read_text() == to_csv(result.arms)
    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert imread(figure).shape == (832, 1430, 4)
    assert records.read_text().count("\n") == 18


def test_the_subtitle_says_what_was_compared(result: Comparison) -> None:
    assert re.fullmatch(
        r"18 runs of 6 arms on shakespeare, 1,600 steps of 16 x 64 characters; "
        r"cpu \(2 cores\), jax 0\.10\.2; \d{4}-\d\d-\d\d",
        subtitle(result.arms),
    )


def test_the_subtitle_names_every_batch_size() -> None:
    arms = [arm("a"), arm("b", "trainer.batch_size=32"), arm("c", "dataset.seq_len=128")]
    assert "1,600 steps of 16 x 64, 32 x 64, 16 x 128 characters" in subtitle(arms)


def test_the_files_of_one_folder_go_there_and_all_others_to_the_current_one(folder: Path) -> None:
    assert default_place([str(folder)]) == folder / "comparison"
    file = f"{folder}/0_standard seed=0/metrics.jsonl"
    for paths in ([str(folder), str(folder)], [f"{folder}/*"], [file]):
        assert default_place(paths) == Path("comparison")


def test_the_drawings_of_many_arms_use_each_colour_of_the_page() -> None:
    arms = [arm(f"arm {number}", seeds=[0, 1]) for number in range(9)]
    svg = figures.to_svg(figures.paired_differences(arms, figures.PAGE), "many")
    used = set(re.findall(r"var\(--arm(\d+)\)", svg))
    assert used == {str(number) for number in range(len(figures.LIGHT))}
    assert len(figures.DARK) == len(figures.LIGHT)
    assert set(re.findall(r'class="arm arm(\d+)"', svg)) == {str(number) for number in range(1, 9)}
    assert page.key(8).endswith("var(--arm1)'></span>")


@pytest.mark.parametrize("length", [9, MAX_NAME])
def test_the_legend_fits_the_figure(length: int) -> None:
    names = [f"{number} selective match=params learning_rate=1e-3"[:length] for number in range(6)]
    figure = figures.tradeoffs([arm(name, seeds=[0]) for name in names])
    figures.to_png(figure)
    (legend,) = figure.legends
    extent = legend.get_window_extent()
    assert extent.x0 >= 0 and extent.x1 <= figure.bbox.x1 and len(legend.get_texts()) == 6


def test_texts_in_drawings_have_the_font_of_the_page() -> None:
    svg = figures.to_svg(figures.paired_differences([arm("a"), arm("b")], figures.PAGE), "font")
    assert "<text" in svg and not re.search(r"font-family|font:", svg)


@pytest.mark.parametrize("name", ["<b>&amp;", "$title", "$\\frac$", "日本"])
def test_any_name_of_an_arm_can_stand_in_the_figures(name: str) -> None:
    arms = [arm("first", seeds=[0, 1]), arm(name, seeds=[0, 1])]
    for draw in (functools.partial(figures.curves, against="steps"), figures.paired_differences):
        assert f">{escape(name)}</text>" in figures.to_svg(draw(arms, theme=figures.PAGE), "name")


def test_the_frontier_has_a_line_for_each_type_through_its_best_at_each_size() -> None:
    losses = {"2048 a": 1.7, "512": 1.8, "2048 b": 1.6}
    arms = [arm("standard", seeds=[0, 1])]
    for name, loss in losses.items():
        size = {"kv_cache_bytes_per_token": int(name.split()[0]), "best/val_loss": loss}
        run = make_record("model.mha_type=mla", summary=size)
        arms.append(Arm(name, {0: run}))
    figure = figures.frontier(arms)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["standard"].get_xydata().tolist() == [[1024, 2.0]]
    assert lines["mla"].get_xydata().tolist() == [[512, 1.8], [2048, 1.6]]
    svg = figures.to_svg(figures.frontier(arms, figures.PAGE), "frontier")
    assert set(re.findall(r'class="arm arm(\d+)"', svg)) == {"0", "1", "2", "3"}


@pytest.mark.parametrize("drawing", Drawing)
def test_the_figure_for_documents_is_the_one_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, drawing: Drawing
) -> None:
    make_run(tmp_path / "a", "model.mha_type=mla", summary={"kv_cache_bytes_per_token": 768})
    make_run(tmp_path / "b", "model.mha_type=mla", "model.mla.kv_lora_rank=16")
    assert run_tool(capsys, str(tmp_path), f"figure={drawing}")[0] == 0
    height, _, _ = imread(tmp_path / "comparison.png").shape
    assert height == {"costs": 832, "cache": 676, "paired": 171}[drawing]
    assert "What the cache buys" in (tmp_path / "comparison.html").read_text()


# ---- the command


def run_tool(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.run_tool(["compare", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_without_paths_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    needs = "error: compare: needs runs; write chargpt compare outputs/… multirun/…\n"
    assert run_tool(capsys) == (2, "", needs) == run_tool(capsys, "title=x")


def test_a_folder_without_runs_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    problem = f"{tmp_path}: holds no run (a folder with config.yaml and metrics.jsonl)"
    line = f"error: {problem}; train one with main.py\n"
    assert run_tool(capsys, str(tmp_path)) == (2, "", line)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_finished_runs_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_run(tmp_path / "a", summary={"final/step": 3})
    problem = f"left out, not finished: {tmp_path}/a (step 3 of 1600)"
    line = f"error: {tmp_path}: no run there is finished; {problem}\n"
    assert run_tool(capsys, str(tmp_path)) == (2, "", line)


@pytest.mark.parametrize(
    ("argument", "start"),
    [
        ("titel=x", "titel: there is no such option; did you mean title? (write "),
        ("out", "out: has no value; write out=…"),
        ("verbose=1", "verbose: there is no such option (write "),
    ],
)
def test_a_misspelt_option_is_one_line(
    capsys: pytest.CaptureFixture[str], folder: Path, argument: str, start: str
) -> None:
    code, out, err = run_tool(capsys, str(folder), argument)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {start}")


def test_a_run_with_an_equals_sign_in_its_name_is_a_path(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "lr=1e-3" / "0_mqa,seed=0", "seed=0")
    make_run(tmp_path / "lr=1e-3" / "1_mqa,seed=1", "seed=1")
    monkeypatch.chdir(tmp_path)
    code, out, err = run_tool(capsys, "lr=1e-3", "out=results/both", "title=A title")
    assert (code, err) == (0, "")
    files = [f"results/both{ending}" for ending in (".html", ".md", ".csv", ".png", ".jsonl")]
    assert out.splitlines()[-5:] == files
    assert "2 2.0000 ± 0.0000" in out
    assert "<h1>A title</h1>" in Path("results/both.html").read_text()


def test_each_type_is_compared_at_the_option_that_suits_it_best(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    losses = {("standard", "3e-3"): 2.1, ("standard", "1e-2"): 2.2}
    losses |= {("mqa", "3e-3"): 2.4, ("mqa", "1e-2"): 2.0, ("mqa", "3e-2"): 2.5}
    for number, ((kind, rate), loss) in enumerate(losses.items()):
        settings = f"model.mha_type={kind}", f"optimizer.learning_rate={rate}"
        make_run(tmp_path / str(number), *settings, val_losses=[loss])
    code, out, err = run_tool(capsys, str(tmp_path), "best_of=optimizer.learning_rate,model.d_ff")
    assert (code, err) == (0, "")
    assert re.findall(r"^\S.* 1 +([\d.]+) ", out, re.MULTILINE) == ["2.1000", "2.0000"]
    tried = (
        "note: each arm is the best of 2 to 3 that differ in optimizer.learning_rate, model.d_ff"
    )
    assert tried in out
    kept = read_comparison([str(tmp_path / "comparison.jsonl")])
    assert [arm.name for arm in kept.arms] == [
        "standard learning_rate=0.003",
        "mqa learning_rate=0.01",
    ]
    code, _, err = run_tool(capsys, str(tmp_path), "best_of=learning_rate")
    hint = "there is no such option; did you mean optimizer.learning_rate?"
    assert (code, err) == (2, f"error: best_of: learning_rate: {hint}\n")


def test_a_pattern_with_an_equals_sign_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lr=1e-3").mkdir()
    monkeypatch.chdir(tmp_path)
    assert cli.parse_options(CompareOptions, ["lr=*", "lr=1e-3"]).paths == ("lr=*", "lr=1e-3")
    with pytest.raises(ConfigError):
        cli.parse_options(CompareOptions, ["lx=*"])


@pytest.mark.parametrize("out", [".", "/", "..", "/proc/no/comparison", "file/comparison"])
def test_a_place_that_cannot_be_written_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    code, _, err = run_tool(capsys, "run", f"out={out}")
    assert (code, err.count("\n"), err[:7]) == (2, 1, "error: ")


# ---- the page


class Page(HTMLParser):
    """What a page holds, as a browser would parse it."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        # The text of all elements of that name
        self.inside: dict[str, str] = {"script": "", "style": ""}
        self._open: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attributes}))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = None

    def handle_data(self, data: str) -> None:
        if self._open in self.inside:
            self.inside[self._open] += data

    def attributes(self) -> Iterator[tuple[str, str]]:
        for _, found in self.tags:
            yield from found.items()


@pytest.fixture(scope="module")
def written(result: Comparison, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write(result, tmp_path_factory.mktemp("page") / "new" / "comparison", "Types & <seeds>")


@pytest.fixture(scope="module")
def html(written: list[Path]) -> str:
    return written[0].read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def parsed(html: str) -> Page:
    return Page(html)


def test_ids_on_the_page_are_unique_and_references_lead_to_them(parsed: Page) -> None:
    ids = [value for name, value in parsed.attributes() if name == "id"]
    assert len(ids) > 100 and len(set(ids)) == len(ids)
    references = []
    for name, value in parsed.attributes():
        references += re.findall(r"url\(#([^)]*)\)", value)
        if name in ("href", "xlink:href", "for"):
            references.append(value.removeprefix("#"))
    assert len(references) > 100 and set(references) <= set(ids)


def test_the_page_loads_nothing_from_anywhere(parsed: Page) -> None:
    outside = {(name, value) for name, value in parsed.attributes() if "//" in value}
    assert {name for name, _ in outside} == {"xmlns", "xmlns:xlink"}
    assert not {"link", "iframe", "img", "object", "base"} & {tag for tag, _ in parsed.tags}
    assert all("src" not in found for _, found in parsed.tags)
    assert not re.search(r"//\w|@import|url\((?!#)", parsed.inside["style"])
    policy = next(found["content"] for _, found in parsed.tags if "http-equiv" in found)
    assert policy.startswith("default-src 'none'; ")


def test_every_colour_is_defined_in_both_themes_and_no_stand_in_is_left(
    html: str, parsed: Page
) -> None:
    blocks = re.findall(r"\{([^{}]*--paper:[^{}]*)\}", parsed.inside["style"])
    defined = [set(re.findall(r"(--\w+):", block)) for block in blocks]
    assert len(defined) == 3 and defined[0] == defined[1] == defined[2]
    used = set(re.findall(r"var\((--\w+)\)", html))
    assert {f"--arm{number}" for number in range(6)} <= used <= defined[0]
    assert not re.search(r"#01020[0-9a-f]|#0a0b", html, re.IGNORECASE)
    assert blocks[1] == blocks[2] != blocks[0]


def test_the_page_shows_every_number_sample_and_run(
    html: str, result: Comparison, folder: Path
) -> None:
    for row in rows(result.arms):
        for text, _ in row:
            assert f">{text}</td>" in html
    section = r"<section><h3>.*?</span>(\w+)</h3><pre>(.*?)</pre></section>"
    samples = re.findall(section, html, re.DOTALL)
    assert samples == [(name, f"{name} 0\n&lt;i&gt;wrote&lt;/i&gt; &amp; this") for name in TYPES]
    for kind, seed in np.ndindex(6, 3):
        run = folder / f"{3 * kind + seed}_{TYPES[kind]} seed={seed}"
        assert f"seed {seed}: {LOSSES[kind, seed]:.4f}  {run}\n" in html
    assert html.count("best&#x27;") == 0
    assert re.findall(r"class='row arm(\d) best'", html) == [str(TYPES.index(BEST))]
    assert f"<p>{result.remarks[0]}</p>" in html
    title = "Types &amp; &lt;seeds&gt;"
    assert f"<title>{title}</title>" in html and f"<h1>{title}</h1>" in html


def test_type_has_one_size_in_all_drawings(html: str) -> None:
    assert html.count("<svg") == 6 and len(type_sizes(html)) == 1


SCRIPT = "<script>alert(1)</script>"
EVIL = f"{SCRIPT}\"'> $title"


def evil_run(path: Path, name: str = EVIL, **settings: Any) -> Path:
    """A stranger's run: every text that it can choose is markup."""
    sample = f"</pre>{EVIL}\x00\x07\x1b[31m</title></style><!-- " + "x" * 20_000
    named = f"wandb.name={json.dumps(name)}"
    run = make_run(path / SCRIPT / "run '\"", named, **settings, sample=sample)
    summary = json.loads((run / "summary.json").read_text())
    changed = {"device": EVIL, "versions": {"jax": EVIL}, "corpus_sha256": EVIL}
    (run / "summary.json").write_text(json.dumps(summary | changed))
    return run


def test_a_strangers_texts_stay_texts(tmp_path: Path, parsed: Page) -> None:
    settings = ["optimizer.learning_rate=1e-3", "optimizer.warmup_steps=7"]
    evil_run(tmp_path)
    make_run(tmp_path / "other", *settings)
    result = read_comparison([str(tmp_path)])
    assert result.arms[0].name == EVIL[:MAX_NAME]
    (path, *_) = write(result, tmp_path / "out", EVIL)
    text = path.read_text(encoding="utf-8")
    assert SCRIPT not in text and text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 10
    found = Page(text)
    assert found.inside["script"] == parsed.inside["script"]
    assert not [name for name, _ in found.attributes() if name.startswith("on")]
    assert {tag for tag, _ in found.tags} <= {tag for tag, _ in parsed.tags}
    assert text.count("$title") > 3


# ---- in a browser

LISTEN = """<head><script>
window.errors = [];
window.onerror = message => { errors.push(message); };
console.error = (...parts) => { errors.push(parts.join(" ")); };
document.addEventListener("securitypolicyviolation", event => errors.push(event.violatedDirective));
</script><style>.arm { transition: none !important; }</style>"""
EXERCISE = """<script>
(async () => {
  const all = selector => [...document.querySelectorAll(selector)];
  const colour = () => getComputedStyle(document.body).backgroundColor;
  const order = () => all("tbody tr").map(row => row.dataset.arm);
  const style = element => getComputedStyle(element);
  const unique = list => [...new Set(list)];
  const shown = () => all(".tabs > figure").map(figure => style(figure).display !== "none");
  const opacity = arm => unique(all("svg ." + arm).map(part => style(part).opacity));
  const done = {theme: [], colours: [colour()], sorted: [], marked: [], shown: [shown()]};
  for (let click = 0; click < 2; click++) {
    document.getElementById("theme").click();
    done.theme.push(document.documentElement.dataset.theme);
    done.colours.push(colour());
  }
  for (const heading of all("th")) {
    const orders = [];
    for (let click = 0; click < 2; click++) { heading.click(); orders.push(order()); }
    done.sorted.push(orders);
    done.marked.push(all("th[aria-sort]").map(marked => marked.cellIndex));
  }
  for (const label of all(".tabs label")) { label.click(); done.shown.push(shown()); }
  const row = document.querySelector("tr.arm1");
  row.dispatchEvent(new MouseEvent("mouseenter"));
  await new Promise(resolve => setTimeout(resolve, 500));
  const arms = part => [...part.classList].filter(name => /^arm\\d/.test(name));
  done.picked = unique(all(".picked").flatMap(arms));
  done.drawings = all("figure").map(figure => figure.querySelectorAll(".picked").length);
  done.opacity = [opacity("arm1"), opacity("arm2"), style(row).opacity];
  row.dispatchEvent(new MouseEvent("mouseleave"));
  await new Promise(resolve => setTimeout(resolve, 500));
  done.unpicked = [all(".picked").length, document.body.className, opacity("arm2")];
  done.wide = document.documentElement.scrollWidth <= innerWidth;
  done.errors = errors;
  document.body.dataset.done = JSON.stringify(done);
})();
</script></body>"""


def in_browser(text: str, folder: Path, *options: str) -> dict[str, Any]:
    """What the page did when it was exercised."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    path = folder / "page.html"
    exercised = text.replace("<head>", LISTEN, 1).replace("</body>", EXERCISE)
    path.write_text(exercised, encoding="utf-8")
    fixed = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
    fixed.append("--dump-dom")
    command = [CHROMIUM, *fixed, f"--user-data-dir={folder}/profile", *options, path.as_uri()]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.search(r'data-done="([^"]*)"', dumped)
    assert found is not None, dumped[-2000:]
    return json.loads(unescape(found[1]))


@pytest.fixture(scope="module")
def light(html: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_browser(html, tmp_path_factory.mktemp("light"))


WHITE, BLACK = "rgb(255, 255, 255)", "rgb(20, 23, 26)"


def test_the_page_runs_without_errors(light: dict[str, Any]) -> None:
    assert light["errors"] == [] and light["wide"]


def test_the_theme_follows_the_system_and_then_the_button(
    light: dict[str, Any], html: str, tmp_path: Path
) -> None:
    assert (light["theme"], light["colours"]) == (["dark", "light"], [WHITE, BLACK, WHITE])
    dark = in_browser(html, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert (dark["theme"], dark["colours"]) == (["light", "dark"], [BLACK, WHITE, BLACK])
    assert dark["errors"] == []


def test_every_column_sorts_both_ways(light: dict[str, Any], result: Comparison) -> None:
    columns = list(zip(*rows(result.arms), strict=True))
    assert len(light["sorted"]) == len(columns) == len(COLUMNS)
    before = [f"arm{number}" for number in range(6)]
    for number, (column, (up, down)) in enumerate(zip(columns, light["sorted"], strict=True)):
        value = {f"arm{arm}": column[arm][1] for arm in range(6)}
        missing = [name for name in before if value[name] is None]
        known = [name for name in before if value[name] is not None]
        ascending = sorted(known, key=functools.partial(value.get))
        assert up == ascending + missing, number
        known = [name for name in up if value[name] is not None]
        descending = sorted(known, key=functools.partial(value.get), reverse=True)
        assert [name for name in down if value[name] is not None] == descending, number
        assert light["marked"][number] == [number]
        before = down


def test_numbers_that_are_missing_are_last_whichever_way_it_is_sorted(
    light: dict[str, Any],
) -> None:
    up, down = light["sorted"][list(COLUMNS).index("minus first")]
    assert up[-1] == "arm0" and down[-1] == "arm0"


def test_one_drawing_of_the_tabs_is_visible_at_a_time(light: dict[str, Any]) -> None:
    first, *chosen = light["shown"]
    assert first == [True, False, False, False]
    assert chosen == [[here == label for here in range(4)] for label in range(4)]


def test_pointing_at_a_row_picks_its_arm_in_every_drawing(light: dict[str, Any]) -> None:
    assert light["picked"] == ["arm1"]
    assert len(light["drawings"]) == 6 and min(light["drawings"]) > 0
    assert light["opacity"] == [["1"], ["0.15"], "1"]
    assert light["unpicked"] == [0, "", ["1"]]
