"""Each rule of ``tools/style.py`` fires on a bad example, and not on a good one."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "style.py"
_spec = importlib.util.spec_from_file_location("style", SCRIPT)
style = importlib.util.module_from_spec(_spec)
# A dataclass looks its module up by name.
sys.modules["style"] = style
_spec.loader.exec_module(style)

BODY = "    x = 1\n"
BRANCH = "    if x:\n        x = 2\n"

CASES = {
    "file-lines": ("x = 1\n" * 401, "x = 1\n" * 400),
    "class-lines": ("class A:\n" + BODY * 250, "class A:\n" + BODY * 249),
    "function-lines": ("def f():\n" + BODY * 50, "def f():\n" + BODY * 49),
    "complexity": (
        "def f():\n" + BODY + BRANCH * 12,
        "def f():\n" + BODY + BRANCH * 11,
    ),
    "nested-comprehension": (
        "rows = [x for y in z for x in y]\n",
        "rows = [x for x in z if x]\n",
    ),
    "function-word": (
        "def f(of):\n    return of\n",
        "def f(spec):\n    return spec\n",
    ),
    "summary": (f'"""{"x" * 73}"""\n', f'"""{"x" * 72}\n\n{"x" * 90}\n"""\n'),
}


def rules(tmp_path, text):
    """The rules that a file of this text breaks."""
    path = tmp_path / "example.py"
    path.write_text(text, "utf-8")
    return {rule for _, rule, _ in style.check(path)}


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_fires_on_the_bad_example_alone(tmp_path, rule):
    bad, good = CASES[rule]
    assert rules(tmp_path, bad) == {rule}
    assert rules(tmp_path, good) == set()


@pytest.mark.parametrize(
    "text",
    [
        "rows = [[y for y in x] for x in z]\n",
        "rows = {x: [y for y in x] for x in z}\n",
        "rows = [x for x in (y for y in z)]\n",
    ],
)
def test_a_comprehension_in_a_comprehension_is_found(tmp_path, text):
    assert rules(tmp_path, text) == {"nested-comprehension"}


@pytest.mark.parametrize(
    "text",
    ["_told = 1\n", "for first in x:\n    pass\n", "def kept():\n    pass\n"],
)
def test_every_kind_of_name_is_read(tmp_path, text):
    assert rules(tmp_path, text) == {"function-word"}


def test_a_field_may_have_the_name_of_a_key_of_files(tmp_path):
    assert rules(tmp_path, "class A:\n    keep: int = 0\n") == set()
    assert rules(tmp_path, "class A:\n    told: int = 0\n") == {"function-word"}
    assert rules(tmp_path, "def f(keep):\n    keep = 1\n") == {"function-word"}


def test_a_docstring_does_not_count_as_length(tmp_path):
    docstring = '    """Do it.\n' + "\n    More.\n" * 60 + '    """\n'
    assert rules(tmp_path, "def f():\n" + docstring + BODY * 49) == set()


def test_density_counts_code_without_docstrings():
    density = style.Density()
    density.add(
        '"""A docstring of code."""\n\n# Why.\nx = f(1)  # because\ny = 2\n'
    )
    assert density.tokens_per_line == (6 + 3) / 2
    assert density.comments_per_line == 2 / 2


@pytest.mark.parametrize(
    ("text", "complaints"),
    [
        ("# Why.\nx = 1\n" + "y = 2\n" * 11, 0),
        ("x = 1\n" * 20, 1),
        ("# Why.\n" + "x = (1, 2, 3, 4)\n" * 12, 1),
    ],
)
def test_code_too_dense_is_complained_of(tmp_path, text, complaints):
    (tmp_path / "a.py").write_text(text, "utf-8")
    assert len(style.measure([tmp_path])) == complaints


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with two offences, and a list that knows them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "a.py").write_text("of = 1\ntold = 2\n", "utf-8")
    (tmp_path / "known.txt").write_text("function-word 2\n", "utf-8")
    return tmp_path


def test_offences_end_with_code_1(project, capsys):
    assert style.main(["room"]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        "room/a.py:1: function-word of",
        "room/a.py:2: function-word told",
        "2 offences of style, 0 known",
    ]


def test_known_offences_pass_and_a_new_one_does_not(project):
    assert style.main(["room", "--known", "known.txt"]) == 0
    (project / "room" / "b.py").write_text("here = 1\n", "utf-8")
    assert style.main(["room", "--known", "known.txt"]) == 1


@pytest.mark.parametrize(
    ("text", "listed"),
    [
        ("of = 1\n", "function-word 1\n"),
        ("x = 1\n", ""),
        ("of = 1\ntold = 2\nhere = 3\n", "function-word 2\n"),
    ],
)
def test_the_list_of_known_offences_only_shrinks(project, text, listed):
    (project / "room" / "a.py").write_text(text, "utf-8")
    style.main(["room", "--known", "known.txt", "--write"])
    assert (project / "known.txt").read_text("utf-8") == listed
