import io
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedknow.cli.tables import (
    Column,
    FittingTable,
    comparison_table,
    print_table,
    result_tables,
    search_table,
)
from fedknow.protocols.config import read_config
from fedknow.server.reports.groups import Group, group
from fedknow.server.reports.summary import summarise
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.search import BestSettings

LONG = "fedknow (rho=0.2, k=5)"
WIDTHS = st.integers(40, 200)
NAMES = st.text("abdefg-_=, ()[]", min_size=1, max_size=60).map(
    lambda text: f"n{text.strip()}"
)


def lines(table: object, width: int) -> list[str]:
    stream = io.StringIO()
    print_table(Console(file=stream, width=width), table)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from fedknow.simulations.simulate import simulate

    config = read_config(
        {
            "data": {
                "tasks": 2,
                "clients": 2,
                "classes_max": 2,
                "share": "overlapping",
            },
            "train": {"rounds": 1, "epochs": 1},
            "engine": {"backend": "inline"},
        }
    )
    folder = tmp_path_factory.mktemp("tables") / "run"
    simulate(config, folder)
    return summarise(RunFolder.open(folder))


def a_table(
    names: list[str], columns: int, cell: str = "82.5 ± 14.0"
) -> FittingTable:
    return FittingTable(
        "Comparison",
        names,
        [
            Column(f"column{number}", [cell] * len(names), "%")
            for number in range(columns)
        ],
        ["column1"],
    )


@settings(deadline=None, max_examples=200)
@given(
    width=WIDTHS,
    columns=st.integers(1, 12),
    names=st.lists(NAMES, min_size=1, max_size=5),
    cell=st.sampled_from(
        ["1.2 MB", "82.5 ± 14.0", "97.5 (93.0 to 100.0)", "82.5, 97.5", "–"]
    ),
)
def test_names_and_numbers_are_whole_at_every_width(width, columns, names, cell):
    shown = lines(a_table(names, columns, cell), width)
    text = "\n".join(shown)
    left_out = (
        text.partition("left out for lack of width: ")[2]
        .replace("\n", " ")
        .split(", ")
    )
    kept = [
        f"column{number}"
        for number in range(columns)
        if f"column{number}" not in left_out
    ]
    assert kept
    for name in names:
        beside = [
            line
            for line in shown
            if line.strip().startswith(name) and cell in line
        ]
        assert (
            name in shown or beside
        )  # in a line of its own, or with all its numbers
        for line in beside:
            assert line.count(cell) >= len(kept)
            assert len(line) <= width
    assert text.count(cell) == len(kept) * len(names)
    assert "…" not in text


def test_columns_go_one_by_one_and_are_named():
    table = a_table(["fedknow", "gem"], 3)
    assert not any("left out" in line for line in lines(table, 80))
    assert "left out for lack of width: column1" in lines(table, 44)
    assert any(
        line.split()[:2] == ["column0", "column2"] for line in lines(table, 44)
    )


def test_a_name_that_fills_the_terminal_has_a_line_of_its_own():
    name = "fedknow (rho=0.2, k=5, temperature=2.0, post_aggregation=extra-epoch)"
    assert lines(a_table([name], 2), 40) == [
        "Comparison",
        name,
        "  column0  82.5 ± 14.0 %",
        "  column1  82.5 ± 14.0 %",
    ]


def test_the_tables_of_a_run(run):
    text = "\n".join(
        line for table in result_tables(run) for line in lines(table, 100)
    )
    assert f"{100 * run.personal.average[-1]:.1f} %" in text
    assert "train.end_task" in text


@settings(deadline=None, max_examples=40)
@given(width=WIDTHS)
def test_the_tables_of_a_run_fit_every_width(run, width):
    for table in result_tables(run):
        shown = lines(table, width)
        assert max(map(len, shown)) <= width
        assert "…" not in "".join(shown)
    words = " ".join(lines(result_tables(run)[1], width)).split()
    assert {"accuracy", "Forgetting,", "evaluate", "train.end_task"} <= set(words)
    tasks = lines(result_tables(run)[0], width)
    assert {"task 1", "task 2"} <= {" ".join(line.split()[:2]) for line in tasks}


@settings(deadline=None, max_examples=40)
@given(width=WIDTHS)
def test_a_comparison_shows_its_learners_at_every_width(run, width):
    shown = lines(
        comparison_table([Group("fedavg", [run]), Group(LONG, [run])]), width
    )
    assert any(line.strip().startswith("fedavg") for line in shown)
    assert any(line.strip().startswith(LONG) for line in shown)
    assert any("accuracy" in line for line in shown)
    assert "…" not in "".join(shown)


def test_one_seed_has_no_interval_and_two_are_shown_one_by_one(run):
    assert "one seed: no interval" in lines(comparison_table(group([run])), 100)
    other = replace(run, config=run.config.model_copy(update={"seed": 1}))
    text = "\n".join(lines(comparison_table(group([run, other])), 200))
    accuracy = f"{100 * run.personal.average[-1]:.1f}"
    assert f"{accuracy}, {accuracy}" in text
    assert "±" not in text


def test_what_a_search_found_has_its_settings_in_full():
    found = {
        "online-ewc": BestSettings(
            {"strength": 40000.0, "gamma": 0.95}, 0.8125, 0.02, 0.75, 8, {}
        )
    }
    for width in range(40, 121):
        shown = lines(search_table(found), width)
        assert any(
            line.strip().startswith("online-ewc") and "81.2" in line
            for line in shown
        )
        assert "online-ewc: strength=40000.0, gamma=0.95" in " ".join(shown)
