"""Accuracy against what a client keeps about past tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedknow.server.reports.groups import Group
from fedknow.server.reports.measures import measure_named, scale_for
from fedknow.server.reports.plots import (
    PlotSpec,
    Shape,
    axes_with,
    legend_below,
    legend_rows,
    series_style,
)

__all__ = ["MEMORY_PLOT", "Point", "draw_memory"]

Groups = Sequence[Group]
Point = tuple[float, float, float]
"""Bytes kept, accuracy and half of its interval; NaN where there is none."""


def _points(groups: Groups) -> dict[str, list[Point]]:
    """Collect the points of each learner, those that keep least in front."""
    points: dict[str, list[Point]] = {}
    for group in groups:
        size = group.estimate("knowledge_bytes").mean
        accuracy = group.estimate("accuracy")
        if math.isnan(size) or math.isnan(accuracy.mean):
            continue
        half = accuracy.half if accuracy.has_interval else math.nan
        name = group.runs[0].config.learner.name
        points.setdefault(name, []).append((size, accuracy.mean, half))
    return {name: sorted(each) for name, each in points.items()}


def draw_memory(figure: Figure, points: dict[str, list[Point]]) -> Axes:
    """Draw accuracy against bytes, with the points of a learner joined.

    Parameters
    ----------
    figure : Figure
        Gets the axes.
    points : dict of str to list of Point
        By learner.
    """
    sizes = [point[0] for point in chain.from_iterable(points.values())]
    smallest = min((each for each in sizes if each > 0), default=1.0)
    scale = scale_for(max(sizes), measure_named("knowledge_bytes").scales)
    label = f"kept by a client ({scale.name})"
    axes = axes_with(figure, label, "average accuracy (%)", is_counted=False)
    for index, (name, each) in enumerate(points.items()):
        bytes_kept = [point[0] / scale.size for point in each]
        accuracy = [100 * point[1] for point in each]
        errors = [_or_zero(100 * point[2]) for point in each]
        style = series_style(index)
        axes.errorbar(
            bytes_kept, accuracy, errors, label=name, capsize=2, lw=1.4, **style
        )
    # Linear up to the smallest memory, so that methods without one have a place.
    axes.set_xscale("symlog", linthresh=smallest / scale.size)
    axes.set_xlim(left=-0.2 * smallest / scale.size)
    legend_below(figure, axes)
    return axes


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _draw(figure: Figure, groups: Groups) -> None:
    draw_memory(figure, _points(groups))


def _has_data(groups: Groups) -> bool:
    points = _points(groups)
    # A single method has nothing to be compared with.
    return sum(map(len, points.values())) > 1 and _keeps_any(points)


def _keeps_any(points: dict[str, list[Point]]) -> bool:
    return any(each[-1][0] > 0 for each in points.values())


def _shape(groups: Groups) -> Shape:
    return Shape(height=3.1 + 0.2 * legend_rows(list(_points(groups))))


MEMORY_PLOT: PlotSpec[Groups] = PlotSpec(
    "memory",
    "Accuracy against memory",
    "Average accuracy after the last task, and what a client then keeps about past tasks; "
    "settings of one learner are joined. Whiskers: 95 % intervals from three seeds on.",
    _draw,
    _has_data,
    shape=_shape,
)
