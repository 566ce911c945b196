"""Plots: fitting units and axes, marks in rows, names, no inline style."""

import math
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from fedknow.server.reports import plots
from fedknow.server.reports.comparison_plots import COMPARISON_PLOTS, draw_bars
from fedknow.server.reports.groups import Group, group
from fedknow.server.reports.plots import Plot, draw_plots, series_style
from fedknow.server.reports.run_plots import RUN_PLOTS
from fedknow.server.reports.summary import summarise
from fedknow.simulations.paper import variants
from fedknow.simulations.paper.plots import PAPER_PLOTS, draw_communication
from fedknow.simulations.paper.published import Result, published_values


def costly(label: str, key: str, values: list[float]) -> Group:
    """A group whose runs have but one measure."""
    return Group(
        label,
        [
            SimpleNamespace(measures=lambda value=value: {key: value})
            for value in values
        ],
    )


def drawn(plot: Plot) -> Figure:
    figure = Figure(figsize=(plot.shape.width, plot.shape.height))
    plot.draw(figure)
    return figure


def texts(figure: Figure) -> set[str]:
    return {text.get_text() for axes in figure.axes for text in axes.texts}


def test_what_a_client_keeps_is_labelled_in_a_unit_of_its_size() -> None:
    groups = [
        costly("small", "knowledge_bytes", [15_500]),
        costly("none", "knowledge_bytes", [0]),
    ]
    for others, unit in (
        ([], "kept (kB)"),
        ([costly("big", "knowledge_bytes", [7e6])], "kept (MB)"),
    ):
        figure = Figure()
        axes = draw_bars(figure, [*groups, *others], "knowledge_bytes", "kept")
        assert {"15.5 kB", "0 B"} <= texts(figure)
        assert axes.get_xlabel() == unit


@pytest.mark.parametrize(
    ("values", "whiskers", "dots"),
    [([10.0], 0, 0), ([10.0, 300.0], 0, 2), ([10.0, 300.0, 20.0], 1, 0)],
)
def test_bars_of_few_seeds_show_each_and_no_cost_falls_below_zero(
    values, whiskers: int, dots: int
) -> None:
    axes = draw_bars(
        Figure(), [costly("a", "seconds", values)], "seconds", "time"
    )
    lines = axes.get_lines()
    hollow = [line for line in lines if line.get_marker() == "o"]
    assert len(lines) - len(hollow) == whiskers
    assert sum(len(line.get_xdata()) for line in hollow) == dots
    assert axes.get_xlim()[0] == 0
    assert all(np.min(line.get_xdata()) >= 0 for line in lines)


def test_bands_begin_at_three_seeds_and_stay_between_0_and_100(
    make_run, tmp_path
) -> None:
    runs = [
        summarise(make_run(tmp_path / str(seed), {"seed": seed}, lost=lost))
        for seed, lost in enumerate((0.0, 0.4, 0.01))
    ]
    for count, bands, lines in ((1, 0, 1), (2, 0, 3), (3, 1, 1)):
        (plot,) = (
            plot
            for plot in draw_plots(COMPARISON_PLOTS, group(runs[:count]))
            if plot.name == "accuracy"
        )
        (axes,) = drawn(plot).axes
        assert len(axes.collections) == bands
        assert len(axes.get_lines()) == lines
        assert ("each seed" in plot.caption, "95 %" in plot.caption) == (
            count == 2,
            count == 3,
        )
    (heights,) = (path.vertices[:, 1] for path in axes.collections[0].get_paths())
    assert heights.min() >= 0
    assert heights.max() == 100


def test_time_begins_at_zero_and_the_longest_run_is_seen(
    make_run, tmp_path
) -> None:
    runs = [
        summarise(make_run(tmp_path / name, {"learner": name}, hours=hours))
        for name, hours in (("fedavg", 0.01), ("fedknow", 5.0))
    ]
    groups = group(runs)
    result = Result(
        "5.1",
        variants("5.1")[0],
        {members.label: members for members in groups},
        {},
    )
    shown = [
        plot
        for plot in draw_plots(COMPARISON_PLOTS, groups)
        if plot.name == "hours"
    ]
    shown += [
        plot for plot in draw_plots(RUN_PLOTS, runs[1]) if plot.name == "hours"
    ]
    shown += [
        plot for plot in draw_plots(PAPER_PLOTS, result) if plot.name == "time"
    ]
    assert len(shown) == 3
    for plot in shown:
        (axes,) = drawn(plot).axes
        assert axes.get_xlabel() == "virtual time (h)"
        assert axes.get_xlim()[0] == 0
        assert axes.get_xlim()[1] >= 15


@pytest.mark.parametrize("size", range(1, 29))
def test_no_two_of_many_methods_look_alike(size: int) -> None:
    looks = [str(series_style(index)) for index in range(size)]
    assert len(set(looks)) == size
    assert all(
        style["color"] != plots.GREY for style in map(series_style, range(size))
    )


def test_the_papers_marks_sit_on_the_bars_of_their_methods() -> None:
    (variant,) = variants("5.1")
    published = published_values("5.1", "cifar100")
    sent = {"gem": 1e9, "fedweit": 40e9, "ewc": 2e9, "fedknow": 30e9}
    groups = {
        method: Group(
            method,
            [
                SimpleNamespace(
                    config=variant.config,
                    rounds=[{"task": 0, "traffic": {}}],
                    bytes_of={"train": count, "train.end_task": 0.0}.__getitem__,
                )
            ],
        )
        for method, count in sent.items()
    }
    figure = Figure()
    axes = draw_communication(figure, Result("5.1", variant, groups, published))
    rows = dict(
        zip(
            (label.get_text() for label in axes.get_yticklabels()),
            axes.get_yticks(),
            strict=True,
        )
    )
    bars = {
        round(bar.get_y() + bar.get_height() / 2): bar.get_width()
        for bar in axes.patches
    }
    (marks,) = axes.get_lines()
    found = dict(zip(marks.get_ydata(), marks.get_xdata(), strict=True))
    for method, count in sent.items():
        assert bars[rows[method]] == pytest.approx(count / 20 / 1e6 / 3600)
        hours = published[method].get("communication_hours", math.nan)
        assert found[rows[method]] == pytest.approx(hours, nan_ok=True)
    assert axes.get_ylim() == (3.5, -0.5)
    assert any("paper 0.69" in text for text in texts(figure))


def test_a_plot_on_a_page_has_a_name_and_needs_no_permission(
    make_run, tmp_path
) -> None:
    for plot in draw_plots(
        RUN_PLOTS, summarise(make_run(tmp_path / "run", hours=1.0))
    ):
        root = ElementTree.fromstring(plot.svg())
        names = {
            child.get("id"): child.text
            for child in root
            if child.tag in ("title", "desc")
        }
        assert root.get("role") == "img"
        assert names[root.get("aria-labelledby")] == plot.title
        assert names[root.get("aria-describedby")] == plot.caption
        assert not [
            element
            for element in root.iter()
            if element.get("style") or element.tag in ("style", "script")
        ]


def test_counted_axes_have_whole_numbers_however_short(
    make_run, tmp_path
) -> None:
    run = summarise(make_run(tmp_path / "run", done=1))
    for plot in draw_plots(RUN_PLOTS, run):
        figure = drawn(plot)
        figure.draw_without_rendering()
        if figure.axes[0].get_xlabel() == "tasks learned":
            low, high = figure.axes[0].get_xlim()
            ticks = [
                tick
                for tick in figure.axes[0].get_xticks()
                if low <= tick <= high
            ]
            assert ticks == [1]


def test_pairs_of_colours_are_those_of_the_style_sheet() -> None:
    from importlib.resources import files

    style = (
        files("fedknow.server.reports") / "templates" / "page.css"
    ).read_text("utf-8")
    names = [f"--series-{place}:" for place in range(len(plots.COLOURS))]
    assert all(name in style for name in [*names, "--series-grey:"])
