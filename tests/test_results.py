"""The tables of docs/results.md are those of the runs whose records are in docs/evidence."""

from pathlib import Path

import pytest
from conftest import ROOT

from chargpt.study.compare import COLUMNS, read_comparison, rows

TEXT = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
RECORDS = sorted((ROOT / "docs" / "evidence").glob("*.jsonl"))
QUOTED = ("best val loss", "last val loss", "minus first", "agree")


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_arm_of_the_records_is_a_row_of_a_table(path: Path) -> None:
    assert f"evidence/{path.name}" in TEXT
    lines = [[cell.strip() for cell in line.split("|")] for line in TEXT.splitlines()]
    result = read_comparison([str(path)])
    for arm, row in zip(result.arms, rows(result.arms), strict=True):
        cells = dict(zip(COLUMNS, row, strict=True))
        quoted = [cells[name][0] for name in QUOTED]
        wanted = [arm.name, f"{cells['params'][1]:,.0f}", f"{cells['cache B/token'][1]:,.0f}"]
        found = [line for line in lines if line[1:4] == wanted and line[5:9] == quoted]
        assert found, [*wanted, *quoted]
