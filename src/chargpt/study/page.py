"""One self-contained HTML page: text, tables and figures, light and dark, without a network."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from matplotlib.figure import Figure

from chargpt.errors import require
from chargpt.study.figures import DARK, LIGHT, to_svg

TEMPLATE = Path(__file__).with_name("page.html")
Cell = tuple[str, float | str | None]  # what a person reads, and the value that it is sorted by


def render(title: str, subtitle: str, blocks: Iterable[str]) -> bytes:
    """The page of some blocks of HTML, each made by a function below."""
    arms = [
        " ".join(f"--arm{number}: {colour};" for number, colour in enumerate(colours))
        for colours in (LIGHT, DARK)
    ]
    parts = {"title": escape(title), "subtitle": escape(subtitle), "body": "\n".join(blocks)}
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(parts, light=arms[0], dark=arms[1]).encode()


def check_stem(out: str) -> None:
    """ConfigError unless `out` can be the name of files, without their endings."""
    require(Path(out).name not in ("", ".."), f"out={out}: is a folder; write out=FOLDER/NAME")


def write_files(stem: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write a file for each ending, whose name is `stem` with that ending; their paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = {stem.with_name(stem.name + ending): data for ending, data in contents.items()}
    for path, data in paths.items():
        path.write_bytes(data)
    return list(paths)


def heading(text: str, explanation: str = "") -> str:
    quiet = f"\n<p class='quiet'>{escape(explanation)}</p>" if explanation else ""
    return f"<h2>{escape(text)}</h2>{quiet}"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def key(number: int) -> str:
    """The small square in an arm's colour."""
    return f"<span class='key' style='background: var(--arm{number % len(LIGHT)})'></span>"


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], best: int, arms: bool) -> str:
    """A table that sorts by column, its row `best` marked; if its rows are arms, with their keys.

    Pointing at the row of an arm highlights the arm in every figure.
    """
    body = ""
    for number, row in enumerate(rows):
        classes = [f"row arm{number}"] * arms + ["best"] * (number == best)
        data = f" data-arm='arm{number}'" * arms
        cells = [
            f"<td data-value='{'' if value is None else escape(str(value))}'>"
            f"{key(number) * (arms and column == 0)}{escape(text)}</td>"
            for column, (text, value) in enumerate(row)
        ]
        body += f"<tr class='{' '.join(classes)}'{data}>{''.join(cells)}</tr>"
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    content = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f"<div class='wide'><table class='sortable'>{content}</table></div>"


def drawing(figure: Figure, name: str) -> str:
    """A figure made with figures.PAGE; `name` is unique on the page."""
    return f"<figure class='drawing {name}'>{to_svg(figure, name)}</figure>"


def image(png: bytes, alternative: str) -> str:
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f"<figure><img alt='{escape(alternative)}' src='{source}'></figure>"


def tabs(name: str, figures: Mapping[str, str]) -> str:
    """Figures of which one is visible at a time, chosen by its label; works without scripts."""
    content = ""
    for number, (label, figure) in enumerate(figures.items()):
        identity, checked = f"{name}-{number}", " checked" * (number == 0)
        content += f"<input type='radio' name='{name}' id='{identity}'{checked}>"
        content += f"<label for='{identity}'>{escape(label)}</label>{figure}"
    return f"<div class='tabs'>{content}</div>"


def texts(entries: Sequence[tuple[int, str, str]]) -> str:
    """Samples side by side: (arm, its name, text)."""
    sections = [
        f"<section><h3>{key(number)}{escape(name)}</h3><pre>{escape(text)}</pre></section>"
        for number, name, text in entries
    ]
    return f"<div class='texts'>{''.join(sections)}</div>"


def details(summary: str, text: str) -> str:
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
