"""Differences from the method named in front, on a page and in a file."""

import json

import pytest
from matplotlib.figure import Figure

from fedknow.cli.tables import contrast_lines
from fedknow.server.reports.contrasts import contrast_table, p_text
from fedknow.server.reports.groups import group
from fedknow.server.reports.memory_plot import MEMORY_PLOT, draw_memory
from fedknow.server.reports.page import write_report
from fedknow.server.reports.rank_plot import draw_ranks
from fedknow.server.reports.statistics import rank
from fedknow.server.reports.summary import summarise
from fedknow.simulations.records import write_numbers

LOST = {"fedavg": (0.20, 0.22, 0.21), "fedknow": (0.0, 0.01, 0.02)}


@pytest.fixture
def runs(make_run, tmp_path):
    return [
        make_run(
            tmp_path / f"{learner}-{seed}",
            {"learner": learner, "seed": seed},
            lost=lost,
        )
        for learner, each in LOST.items()
        for seed, lost in enumerate(each)
    ]


def test_each_method_is_shown_less_the_one_in_front(runs, tmp_path) -> None:
    groups = group(map(summarise, runs))
    table = contrast_table(groups, "fedavg")
    # Accuracy after three tasks is 0.9 - lost, so the differences are 20, 21 and 19 points.
    ((name, seeds, *cells),) = table.texts()
    assert (name, seeds) == ("fedknow", "3")
    assert cells[:2] == ["+20.0 ± 2.5 points", "< 0.001"]
    assert cells[2:] == ["-30.0 ± 3.7 points", "< 0.001"]
    page = write_report(runs, tmp_path / "out").read_text("utf-8")
    assert "Differences from fedavg" in page
    assert "+20.0 ± 2.5 points" in page


def test_two_seeds_say_nothing_about_chance(runs, tmp_path) -> None:
    few = [run for run in runs if not run.path.name.endswith("2")]
    groups = group(map(summarise, few))
    assert contrast_table(groups, "fedavg") is None
    assert contrast_lines(groups) is None
    assert "Differences from" not in write_report(few, tmp_path / "o").read_text()


def test_the_file_has_the_differences(runs, tmp_path) -> None:
    write_numbers(runs, tmp_path)
    numbers = json.loads((tmp_path / "compare.json").read_text())["differences"]
    assert numbers["reference"] == "fedavg"
    difference = numbers["accuracy"]["fedknow"]
    assert difference["mean"] == pytest.approx(0.2)
    assert difference["p"] == difference["p_holm"] < 0.001
    assert difference["seeds"] == 3


def test_a_p_value_is_short() -> None:
    assert [p_text(p) for p in (0.0001, 0.01234, 1.0, float("nan"))] == [
        "< 0.001",
        "0.012",
        "1",
        "–",
    ]


def test_memory_has_a_place_for_methods_without_any() -> None:
    axes = draw_memory(
        Figure(),
        {"er": [(1e5, 0.7, 0.01), (1e6, 0.8, 0.01)], "fedrep": [(0.0, 0.5, 0.1)]},
    )
    low, high = axes.get_xlim()
    assert low < 0 < 1 < high
    assert axes.get_xlabel() == "kept by a client (MB)"


def test_memory_is_drawn_where_something_is_kept(runs) -> None:
    groups = group(map(summarise, runs))
    assert not MEMORY_PLOT.has_data(groups)
    for run in runs:
        event = {"event": "task_end", "task": 0, "time": 2e9, "seconds": 1.0}
        run.append(event | {"knowledge_bytes": 100.0})
    assert MEMORY_PLOT.has_data(group(map(summarise, runs)))


def test_bars_join_what_is_alike() -> None:
    scores = {name: [float(-ord(name))] * 12 for name in "abcd"}
    axes = draw_ranks(Figure(), rank(scores))
    bars = [line for line in axes.get_lines() if line.get_linewidth() == 3]
    assert [tuple(bar.get_xdata()) for bar in bars] == [(1, 2), (2, 3), (3, 4)]
    assert axes.get_yticklabels()[0].get_text() == "a (1.00)"
