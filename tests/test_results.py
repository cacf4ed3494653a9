"""The tables of docs/results.md are those of the runs whose records are in docs/evidence."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

from chargpt.study.compare import COLUMNS, read_comparison, rows

SECTIONS = re.split(
    "^##+ ", (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), flags=re.MULTILINE
)
RECORDS = sorted((ROOT / "docs" / "evidence").glob("*.jsonl"))
QUOTED = ("best val loss", "last val loss", "minus first", "agree")


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_arm_of_the_records_is_a_row_of_a_table(path: Path) -> None:
    (section,) = (text for text in SECTIONS if f"evidence/{path.name}" in text)
    lines = [[cell.strip() for cell in line.split("|")] for line in section.splitlines()]
    result = read_comparison([str(path)])
    for arm, row in zip(result.arms, rows(result.arms), strict=True):
        cells = dict(zip(COLUMNS, row, strict=True))
        quoted = [cells[name][0] for name in QUOTED]
        wanted = [arm.name, f"{cells['params'][1]:,.0f}", f"{cells['cache B/token'][1]:,.0f}"]
        found = [line for line in lines if line[1:4] == wanted and line[5:9] == quoted]
        assert len(found) == 1, [*wanted, *quoted]
