"""The plots of an experiment: our runs beside the paper's values."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedknow.server.reports.plots import (
    COLOURS,
    INK,
    PlotSpec,
    Shape,
    axes_with,
    legend_below,
    legend_rows,
    series_style,
    wrapped,
)
from fedknow.server.reports.time_plots import (
    begin_at_zero,
    draw_over_time,
    time_scale,
)
from fedknow.simulations.paper.effort import communication_hours
from fedknow.simulations.paper.published import Published, Result, by_task

__all__ = ["PAPER_PLOTS", "draw_communication"]

PAPER = "paper"
LINE = 0.2
"""Height of a line of text, inches."""


def _curves(
    figure: Figure,
    result: Result,
    pick: str,
    key: str,
    label: str,
) -> None:
    axes = axes_with(figure, "tasks learned", label)
    for index, (method, group) in enumerate(result.groups.items()):
        style = series_style(index)
        mean = 100 * group.curve(pick)
        axes.plot(np.arange(1, len(mean) + 1), mean, label=method, **style)
        _published_curve(axes, result.published_for(method), key, style["color"])
    if _has_published(result, key):
        # One entry of the legend for all of the paper's curves.
        axes.plot([], [], "o:", color=INK, mfc="none", ms=6, label=PAPER)
    if pick == "average":
        axes.set_ylim(0, 100)
    else:
        # Forgetting may be negative: an old task can improve.
        axes.axhline(0, color=INK, lw=0.8)
    legend_below(figure, axes)


def _published_curve(
    axes: Axes,
    published: Published,
    key: str,
    colour: str,
) -> None:
    """Draw the paper's values: hollow marks, a dotted line."""
    # Only some tasks were published: points at those, and a line between.
    values = by_task(published, key)
    if values:
        percents = [100 * value for value in values.values()]
        axes.plot(
            list(values), percents, "o:", color=colour, mfc="none", ms=6, lw=1
        )


def _over_time(figure: Figure, result: Result) -> None:
    scale = time_scale(max(_virtual_seconds(result)))
    axes = axes_with(
        figure, f"virtual time ({scale.name})", "average accuracy (%)", False
    )
    for index, (method, group) in enumerate(result.groups.items()):
        draw_over_time(
            axes, group.runs[0], scale, label=method, **series_style(index)
        )
    begin_at_zero(axes)
    legend_below(figure, axes)


def draw_communication(figure: Figure, result: Result) -> Axes:
    """Draw hours of communication: a bar a method, and the paper's mark."""
    axes = axes_with(
        figure, "hours of communication at 1 MB/s", "", is_counted=False
    )
    rows = np.arange(len(result.groups))
    # In the order of the rows.
    measured = [
        communication_hours(group, 1000, result.variant)
        for group in result.groups.values()
    ]
    published = [
        result.published_for(method).get("communication_hours", math.nan)
        for method in result.groups
    ]
    axes.barh(rows, measured, 0.55, color=COLOURS[0])
    if _has_hours(result):
        axes.plot(
            published, rows, "D", color=COLOURS[1], ms=6, label=PAPER, zorder=3
        )
        legend_below(figure, axes)
    ends = [
        _annotate(axes, row, *hours)
        for row, hours in enumerate(zip(measured, published, strict=True))
    ]
    axes.set_yticks(rows, [wrapped(method, 22) for method in result.groups])
    # Rows count downwards, so that the first method is on top.
    axes.set_ylim(len(rows) - 0.5, -0.5)
    # Room for the texts behind the bars; without any traffic an axis must still have a width.
    axes.set_xlim(0, 1.6 * max(ends) or 1)
    axes.grid(False, axis="y")
    return axes


def _annotate(axes: Axes, row: int, measured: float, published: float) -> float:
    """Write a row's hours behind its bar and mark; return where these end."""
    end = measured
    text = f"{measured:,.2g}"
    if not math.isnan(published):
        end = max(measured, published)
        text += f", paper {published:,.2g}"
    axes.annotate(
        text, (end, row), (8, 0), textcoords="offset points", va="center", size=9
    )
    return end


def _has_hours(result: Result) -> bool:
    return any(
        "communication_hours" in result.published_for(method)
        for method in result.groups
    )


def _has_published(result: Result, key: str) -> bool:
    return any(
        by_task(result.published_for(method), key) for method in result.groups
    )


def _virtual_seconds(result: Result) -> list[float]:
    """Return the virtual seconds of the methods that have any."""
    seconds = [
        group.estimate("virtual_seconds").mean for group in result.groups.values()
    ]
    # NaN: without a fleet.
    return [value for value in seconds if not math.isnan(value)]


def _has_virtual_time(result: Result) -> bool:
    # Without virtual time there is nothing to draw.
    return bool(_virtual_seconds(result))


def _shape_of_curves(result: Result) -> Shape:
    return Shape(height=2.9 + LINE * legend_rows([*result.groups, PAPER]))


def _shape_of_bars(result: Result) -> Shape:
    return Shape(height=max(3.2, 0.3 * len(result.groups) + 1.2))


PAPER_PLOTS: tuple[PlotSpec[Result], ...] = (
    PlotSpec(
        "accuracy",
        "Accuracy over tasks",
        "Filled marks: these runs, mean over seeds. Hollow marks, dotted: the paper's.",
        partial(
            _curves, pick="average", key="accuracy", label="average accuracy (%)"
        ),
        shape=_shape_of_curves,
    ),
    PlotSpec(
        "time",
        "Accuracy over virtual time",
        "On this fleet; first seed.",
        _over_time,
        _has_virtual_time,
        shape=_shape_of_curves,
    ),
    PlotSpec(
        "forgetting",
        "Relative forgetting over tasks",
        "Share of what was learned that was lost. Hollow marks, dotted: the paper's.",
        partial(
            _curves,
            pick="relative",
            key="forgetting",
            label="relative forgetting (%)",
        ),
        shape=_shape_of_curves,
    ),
    PlotSpec(
        "hours",
        "Communication",
        "Training traffic of the mean client, for as much training as the paper's.",
        draw_communication,
        shape=_shape_of_bars,
    ),
)
