import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedknow.protocols.texts import counted, printable

ROOT = Path(__file__).parents[2]
ROOMS = ("protocols", "client", "strategies", "server", "simulations", "fedknow")
PLURALS = re.compile(
    r"^ (?:(?:training|test|natural|virtual|empty|more|other|finished|past) )?"
    r"(?:batches|bits|bytes|cells|classes|clients|cores|devices|dimensions|elements|epochs|"
    r"files|hours|images|learners|messages|methods|minutes|names|numbers|parameters|replies|rounds|"
    r"runs|samples|seconds|seeds|settings|shares|steps|strategies|tasks|tensors|threads|times|"
    r"values|workers)\b"
)
ALWAYS_SEVERAL = {
    "client/data/partition.py: part",  # a kind of samples, no number
    "client/data/arrays.py: self.classes",  # of them one was missing
    "client/models/__init__.py: count",  # too many to fit
    "client/data/parquet.py: column",  # it runs from one number to another
    "protocols/values.py: value.bit_length()",  # hundreds
    "strategies/population.py: minimum",  # three at least
    "server/run/task_times.py: setting",  # a setting's name
    "server/run/incidents.py: clients",  # the client has words of its own
    "server/reports/page.py: len(labels)",  # only above MOST_NAMED
    "server/reports/tables.py: len(events)",  # only above one
    "simulations/engine/batches.py: job.deaths",  # only from DEATHS on
    "client/data/cells.py: 8 * form[1]",  # eight at least
    "client/data/speech.py: 8 * form[1]",
    "client/data/cells.py: sorted(rates)",  # a list of rates
    "client/data/sounds.py: sorted(rates)",
    "client/data/sound_cache.py: sorted(self._rates)",
    "client/data/columns.py: part",  # a kind of samples, no number
    "client/data/pools.py: part",
    "client/data/published.py: part",
    "client/data/people.py: config.client_column",  # a column's name
    "protocols/config/data.py: data.name",  # which names, a verb
    "client/data/skews.py: dataset.name",  # which names, a verb
    "client/secure_requests.py: name",
    "protocols/secure/fixed.py: clients",  # two at least
    "server/run/secure_waves.py: clients",
    "server/run/incidents.py: claimed",  # far more than there are
    "server/run/incidents.py: self._config.engine.max_weight",  # a factor
}


@pytest.mark.parametrize(
    ("number", "words", "text"),
    [
        (1, ("client",), "1 client"),
        (0, ("client",), "0 clients"),
        (2, ("client",), "2 clients"),
        (1, ("class", "classes"), "1 class"),
        (3, ("class", "classes"), "3 classes"),
    ],
)
def test_counted(number, words, text):
    assert counted(number, *words) == text


def plurals_after_numbers(code: str) -> Iterator[str]:
    """Give the expressions that an f-string puts before a plural, but for constants."""
    for node in ast.walk(ast.parse(code)):
        parts = node.values if isinstance(node, ast.JoinedStr) else []
        for value, text in itertools.pairwise(parts):
            if isinstance(value, ast.FormattedValue) and isinstance(
                text, ast.Constant
            ):
                name = ast.unparse(value.value)
                if (
                    PLURALS.match(text.value)
                    and not name.rpartition(".")[2].isupper()
                    and "if" not in name
                ):
                    yield name


def test_a_number_without_the_right_noun_is_found():
    assert list(plurals_after_numbers("f'{clients} clients'")) == ["clients"]
    assert list(
        plurals_after_numbers("f'{len(a)} natural tasks, {SEEDS} seeds'")
    ) == ["len(a)"]
    assert (
        list(plurals_after_numbers("""f'{counted(3, "client")} are here'"""))
        == []
    )


def test_no_text_says_1_clients():
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        for name in plurals_after_numbers(path.read_text("utf-8"))
    }
    assert found <= ALWAYS_SEVERAL, (
        "write it with fedknow.protocols.texts.counted"
    )


@pytest.mark.parametrize(
    ("text", "longest", "shown"),
    [
        ("all well", 100, "all well"),
        ("\x1b[2J\x1b[31mroot", 100, r"\x1b[2J\x1b[31mroot"),
        ("a\n2026-01-01 INFO forged", 100, r"a\n2026-01-01 INFO forged"),
        ("\u202egnp.exe", 100, r"\u202egnp.exe"),
        ("abcdef", 4, "abcd... (2 characters more)"),
        ("grün", 4, "grün"),
    ],
)
def test_texts_of_the_other_side_are_shown_as_they_are_spelled(
    text, longest, shown
):
    assert printable(text, longest) == shown


@given(st.text(), st.integers(0, 50))
def test_no_text_reaches_a_terminal_unescaped(text, longest):
    shown = printable(text, longest)
    assert shown.isprintable()
    assert len(shown) <= 10 * longest + 40
