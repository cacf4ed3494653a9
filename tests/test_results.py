"""The tables of docs/results.md are those of the runs whose records are in docs/evidence."""

import re

import pytest
from conftest import ROOT

from chargpt.study.compare import COLUMNS, read_comparison, rows

SECTIONS = re.split(
    "^##+ ", (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), flags=re.MULTILINE
)
EVIDENCE = ROOT / "docs" / "evidence"
QUOTED = ("best val loss", "last val loss", "minus first", "agree")
# A link to records says that their table is in this section; so does a choice among records.
LINK = re.compile(r"\]\(evidence/(\w+)\.jsonl\)")
CHOICE = re.compile(r"    chargpt compare ((?:docs/evidence/\w+\.jsonl[\s\\]+)+)best_of=(\S+)")
LINKS = [(section, name) for section in SECTIONS for name in LINK.findall(section)]
TABLES: list[tuple[str, list[str], str | None]] = [
    *((section, [name], None) for section, name in LINKS),
    *(
        (section, re.findall(r"(\w+)\.jsonl", files), best_of)
        for section in SECTIONS
        for files, best_of in CHOICE.findall(section)
    ),
]


def test_all_records_have_a_table() -> None:
    assert sorted(name for _, name in LINKS) == sorted(
        path.stem for path in EVIDENCE.glob("*.jsonl")
    )


@pytest.mark.parametrize(
    ("section", "names", "best_of"), TABLES, ids=["-".join(names) for _, names, _ in TABLES]
)
def test_every_arm_of_the_records_is_a_row_of_a_table(
    section: str, names: list[str], best_of: str | None
) -> None:
    lines = [[cell.strip() for cell in line.split("|")] for line in section.splitlines()]
    result = read_comparison([str(EVIDENCE / f"{name}.jsonl") for name in names], best_of)
    for arm, row in zip(result.arms, rows(result.arms), strict=True):
        cells = dict(zip(COLUMNS, row, strict=True))
        quoted = [cells[name][0] for name in QUOTED]
        wanted = [arm.name, f"{cells['params'][1]:,.0f}", f"{cells['cache B/token'][1]:,.0f}"]
        found = [line for line in lines if line[1:4] == wanted and line[5:9] == quoted]
        assert len(found) == 1, [*wanted, *quoted]
