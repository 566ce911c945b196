"""The plots of several methods side by side."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedknow.server.reports.curves import (
    LINE,
    Curves,
    End,
    Groups,
    label_lines,
    shape_of_curves,
    spread,
)
from fedknow.server.reports.measures import (
    Estimate,
    Measure,
    Scale,
    measure_named,
    scale_for,
)
from fedknow.server.reports.memory_plot import MEMORY_PLOT
from fedknow.server.reports.plots import (
    COLOURS,
    INK,
    PlotSpec,
    Shape,
    axes_with,
    series_style,
    wrapped,
)
from fedknow.server.reports.time_plots import (
    begin_at_zero,
    draw_over_time,
    has_virtual_time,
    time_scale,
)

__all__ = ["COMPARISON_PLOTS", "draw_bars"]

BAR_LABEL = 22
"""Letters of a method's name beside its bar, in one line."""


def _shape_of_bars(groups: Groups) -> Shape:
    lines = sum(
        wrapped(group.label, BAR_LABEL).count("\n") + 1 for group in groups
    )
    return Shape(height=max(2.9, 0.28 * len(groups) + 1, LINE * lines + 1))


def _spread_of_bars(groups: Groups) -> str:
    return spread(
        groups, "Whiskers: 95 % intervals over seeds.", "Circles: each seed."
    )


def _over_time(figure: Figure, groups: Groups) -> None:
    # One seed each: runs of one method need not share their points of time.
    runs = [group.runs[0] for group in groups]
    # One unit of time for all curves.
    longest = max(_or_zero(run.elapsed("virtual_seconds")) for run in runs)
    scale = time_scale(longest)
    label = f"virtual time ({scale.name})"
    axes = axes_with(figure, label, "average accuracy (%)", is_counted=False)
    ends: list[End] = []
    # Backwards, so that the best method's line lies on top.
    for index, run in reversed(list(enumerate(runs))):
        name = groups[index].label
        style = series_style(index)
        times, accuracies = draw_over_time(axes, run, scale, label=name, **style)
        # A method may have no evaluation in virtual time.
        if times:
            end = (accuracies[-1], times[-1], wrapped(name), style["color"])
            ends.append(end)
    begin_at_zero(axes)
    label_lines(figure, axes, groups, ends)


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def draw_bars(figure: Figure, groups: Groups, key: str, label: str) -> Axes:
    """Draw a bar for each method, in the order given from the top.

    Its number stands beside it, in a unit of its size.

    Parameters
    ----------
    figure : Figure
        Gets the axes.
    groups : sequence of Group
        The methods.
    key : str
        A measure.
    label : str
        Of the horizontal axis.
    """
    measure = measure_named(key)
    estimates = [group.estimate(key) for group in groups]
    means = [_or_zero(point.mean) for point in estimates]
    scale = scale_for(max(means), measure.scales)
    unit = f" ({scale.name})" if scale.name else ""
    axes = axes_with(figure, f"{label}{unit}", "", is_counted=False)
    rows = np.arange(len(groups))
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(groups))]
    # In one unit for all bars, that of the largest.
    widths = [mean / scale.size for mean in means]
    axes.barh(rows, widths, color=colours, height=0.55)
    ends = []
    for row, point in enumerate(estimates):
        end = _draw_seeds(axes, row, point, measure, scale)
        ends.append(widths[row] if end is None else end)
        axes.annotate(
            measure.text(point.mean),
            (ends[row], row),
            (5, 0),
            textcoords="offset points",
            va="center",
            size=9,
        )
    axes.set_yticks(rows, [wrapped(group.label, BAR_LABEL) for group in groups])
    # From the bottom to the top, so that the row in front comes highest.
    axes.set_ylim(len(groups) - 0.5, -0.5)
    # Room for the number beside the longest bar; an axis of zeros has a length too.
    axes.set_xlim(0, 1.35 * max(ends) or 1)
    axes.grid(False, axis="y")
    return axes


def _draw_seeds(
    axes: Axes,
    row: int,
    point: Estimate,
    measure: Measure,
    scale: Scale,
) -> float | None:
    """Draw an interval or the single seeds over a bar; return where they end."""
    if point.has_interval:
        low, high = (end / scale.size for end in point.interval(measure))
        axes.plot([low, high], [row, row], color=INK, lw=1.2)
        # The number stands behind the whisker, not on it.
        return high
    # Too few seeds for an interval: each is shown instead.
    if point.count > 1:
        seeds = np.array(point.values) / scale.size
        places = np.full(point.count, row)
        axes.plot(seeds, places, "o", color=INK, ms=3.5, mfc="none")
        return float(seeds.max())
    return None


def _has_virtual_time(groups: Groups) -> bool:
    return any(has_virtual_time(group.runs[0]) for group in groups)


def _bar_spec(key: str, title: str, caption: str, label: str) -> PlotSpec[Groups]:
    def has_data(groups: Groups) -> bool:
        return not all(math.isnan(group.estimate(key).mean) for group in groups)

    return PlotSpec(
        key,
        title,
        f"{caption} Mean over seeds.",
        partial(draw_bars, key=key, label=label),
        has_data,
        _spread_of_bars,
        _shape_of_bars,
    )


COMPARISON_PLOTS: tuple[PlotSpec[Groups], ...] = (
    Curves("average", "average accuracy (%)").spec(
        "accuracy",
        "Average accuracy",
        "Each client with all it keeps to itself: mean over the tasks learned so far.",
    ),
    Curves("forgetting", "forgetting (points)").spec(
        "forgetting",
        "Forgetting",
        "Accuracy lost since a task was learned, mean over earlier tasks.",
    ),
    Curves("average", "average accuracy (%)", is_global=True).spec(
        "accuracy-global",
        "Average accuracy of the global model",
        "One model for everyone, heads averaged: what a client without a past would get.",
    ),
    Curves("relative", "relative forgetting (%)").spec(
        "relative",
        "Relative forgetting",
        "Share of the accuracy when learned that was lost, mean over earlier tasks.",
    ),
    PlotSpec(
        "hours",
        "Accuracy over virtual time",
        "Average accuracy against the time that the run would have taken on its fleet; "
        "the first seed of each.",
        _over_time,
        _has_virtual_time,
        shape=shape_of_curves,
    ),
    _bar_spec(
        "bytes",
        "Training traffic",
        "Bytes down and up for training, whole run.",
        "training traffic",
    ),
    _bar_spec(
        "knowledge_bytes",
        "What a client keeps about past tasks",
        "After the last task, mean over clients: knowledge, importances, stored samples.",
        "kept by a client",
    ),
    MEMORY_PLOT,
    _bar_spec(
        "samples",
        "Samples learned from",
        "Samples that went forward to be learned from: extra epochs and replayed samples count.",
        "samples",
    ),
    _bar_spec(
        "seconds", "Time", "Real time of the whole run, scoring included.", "time"
    ),
    _bar_spec(
        "peak_memory_mb",
        "Peak memory",
        "Largest resident memory of each process during the run, added up.",
        "peak memory",
    ),
    _bar_spec(
        "virtual_seconds",
        "Virtual time",
        "What the run would have taken on its fleet.",
        "virtual time",
    ),
)
