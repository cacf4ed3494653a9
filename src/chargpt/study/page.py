"""One self-contained HTML page: text, tables and figures, light and dark, without a network."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure

from chargpt.study.figures import DARK, LIGHT, to_svg

TEMPLATE = Path(__file__).with_name("page.html")


def write_page(path: Path, title: str, subtitle: str, blocks: Iterable[str]) -> None:
    """The page of some blocks of HTML, each made by a function below."""

    def variables(colours: Sequence[str]) -> str:
        return " ".join(f"--arm{number}: {colour};" for number, colour in enumerate(colours))

    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        body="\n".join(blocks),
        light=variables(LIGHT),
        dark=variables(DARK),
    )
    path.write_text(page, encoding="utf-8")


def heading(text: str, explanation: str = "") -> str:
    return f"<h2>{escape(text)}</h2>" + (
        f"\n<p class='quiet'>{escape(explanation)}</p>" if explanation else ""
    )


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def key(number: int) -> str:
    """The little square in an arm's colour."""
    return f"<span class='key' style='background: var(--arm{number % len(LIGHT)})'></span>"


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[tuple[str, Any]]],
    best: int | None,
    keys: bool = True,
) -> str:
    """A row of cells (text, value to sort by) for each arm, its name first; `best` is marked."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = []
    for number, row in enumerate(rows):
        cells = "".join(
            f"<td data-value='{'' if value is None else escape(str(value), quote=True)}'>"
            f"{key(number) if keys and column == 0 else ''}{escape(text)}</td>"
            for column, (text, value) in enumerate(row)
        )
        marked = " best" if number == best else ""
        classes = (
            f" class='row arm{number}{marked}' data-arm='arm{number}'"
            if keys
            else f" class='{marked.strip()}'"
        )
        body.append(f"<tr{classes}>{cells}</tr>")
    content = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f"<div class='wide'><table class='sortable'>{content}</table></div>"


def drawing(figure: Figure, name: str) -> str:
    """A figure made with figures.PAGE; `name` is one of its own on the page."""
    return f"<figure class='drawing {name}'>{to_svg(figure, name)}</figure>"


def image(png: bytes, alternative: str) -> str:
    encoded = base64.b64encode(png).decode()
    alt = escape(alternative, quote=True)
    return f"<figure><img alt='{alt}' src='data:image/png;base64,{encoded}'></figure>"


def tabs(name: str, figures: Mapping[str, str]) -> str:
    """Drawings of which one is seen at a time, chosen by its label; works without scripts."""
    inputs, style = [], []
    for number, label in enumerate(figures):
        identity = f"{name}-{number}"
        checked = " checked" if number == 0 else ""
        inputs.append(
            f"<input type='radio' name='{name}' id='{identity}'{checked}>"
            f"<label for='{identity}'>{escape(label)}</label>"
        )
        style.append(
            f"#{identity}:checked ~ figure:nth-of-type({number + 1}) {{ display: block; }}"
        )
    content = "".join([*inputs, *figures.values()])
    return f"<style>{' '.join(style)}</style><div class='tabs'>{content}</div>"


def texts(entries: Sequence[tuple[int, str, str]]) -> str:
    """Samples side by side: (arm, its name, text)."""
    sections = "".join(
        f"<section><h3>{key(number)}{escape(name)}</h3><pre>{escape(text)}</pre></section>"
        for number, name, text in entries
    )
    return f"<div class='texts'>{sections}</div>"


def details(summary: str, text: str) -> str:
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
