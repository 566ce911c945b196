"""docs/evidence/verified.md names every learner, and only tests that there are."""

import re
from pathlib import Path

import pytest

from fedknow.client.learners import list_learners

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "evidence" / "verified.md").read_text("utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.startswith("| `")
]


def quoted(text):
    return re.findall(r"`([^`]+)`", text)


def checks_in(path):
    return re.findall(r"^def (test_\w+)", (ROOT / path).read_text("utf-8"), re.M)


def test_every_learner_has_a_row():
    names = [name for row in ROWS for name in quoted(row[0])]
    assert sorted(names) == sorted(list_learners())


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_what_a_row_names_is_there(row):
    name, files, *cells = row
    there = {test for path in quoted(files) for test in checks_in(path)}
    named = [
        test
        for cell in cells
        for test in quoted(cell)
        if test.startswith("test_")
    ]
    assert set(named) <= there, f"{name}: no such test"
    assert all(cell for cell in cells)  # a test, a comparison or an honest cross


def test_the_matrix_is_as_told():
    path = "tests/integration/test_learners_matrix.py"
    assert path in TEXT
    told = re.findall(r"^- `(test_\w+)`", TEXT, re.M)
    assert told == checks_in(path)
