"""Curves of several methods side by side, and the names of their lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedknow.server.reports.groups import Group
from fedknow.server.reports.measures import SEEDS_FOR_INTERVAL, measure_named
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
from fedknow.server.reports.summary import Array, Summary

__all__ = [
    "LINE",
    "Curves",
    "End",
    "Groups",
    "label_lines",
    "shape_of_curves",
    "spread",
]

Groups = Sequence[Group]

FIELDS = {
    "average": "accuracy",
    "forgetting": "forgetting",
    "relative": "forgetting_relative",
}
"""The measure of each field of a scoring that is drawn."""
LINE = 0.2
"""Height of a line of text, inches."""


def _is_crowded(groups: Groups) -> bool:
    """Tell whether there are more methods than colours.

    Their names then stand at the ends of lines.
    """
    return len(groups) > len(COLOURS)


def shape_of_curves(groups: Groups) -> Shape:
    """Give the size of a plot of curves, with room for all names."""
    labels = [group.label for group in groups]
    if not _is_crowded(groups):
        return Shape(height=2.9 + LINE * legend_rows(labels))
    lines = sum(wrapped(label).count("\n") + 1 for label in labels)
    return Shape(width=11, height=max(3.8, LINE * lines + 1), is_wide=True)


def _spread_of_curves(groups: Groups) -> str:
    """Name the marks that show several seeds beside their mean."""
    if _is_crowded(groups):
        return ""
    return spread(
        groups, "Bands: 95 % intervals over seeds.", "Thin lines: each seed."
    )


def spread(groups: Groups, intervals: str, seeds: str) -> str:
    """Explain the marks of several seeds, as far as a plot has them.

    Parameters
    ----------
    groups : sequence of Group
        The methods.
    intervals, seeds : str
        Sentences about the marks of intervals, and about those of single seeds.
    """
    counts = [len(group.runs) for group in groups]
    parts = []
    if any(count >= SEEDS_FOR_INTERVAL for count in counts):
        parts.append(intervals)
    if any(1 < count < SEEDS_FOR_INTERVAL for count in counts):
        parts.append(seeds)
    return " ".join(parts)


def _runs(groups: Groups) -> list[Summary]:
    return list(chain.from_iterable(group.runs for group in groups))


def _has_tasks(groups: Groups) -> bool:
    return any(run.tasks for run in _runs(groups))


def _has_global(groups: Groups) -> bool:
    return any(run.global_model for run in _runs(groups))


End = tuple[float, float, str, str]
"""Height and place of a line's end, its name and its colour."""


@dataclass(frozen=True)
class Curves:
    """Curves over tasks, a line for each method.

    Attributes
    ----------
    pick : str
        A field of a scoring, one of :data:`FIELDS`.
    label : str
        Of the vertical axis.
    is_global : bool
        Whether the global model's scores are drawn, not the clients' own.
    """

    pick: str
    label: str
    is_global: bool = False

    def spec(self, name: str, title: str, caption: str) -> PlotSpec[Groups]:
        """Specify a plot of these curves."""
        return PlotSpec(
            name,
            title,
            caption,
            self.draw,
            _has_global if self.is_global else _has_tasks,
            _spread_of_curves,
            shape_of_curves,
        )

    def draw(self, figure: Figure, groups: Groups) -> None:
        """Draw the curves of all methods."""
        axes = axes_with(figure, "tasks learned", self.label)
        is_crowded = _is_crowded(groups)
        ends = []
        # Backwards, so that the best method's line lies on top.
        for index, group in reversed(list(enumerate(groups))):
            self._draw_mean(axes, group, index)
            if not is_crowded:
                self._draw_spread(axes, group, index)
            end = self._end(group, index)
            if end is not None:
                ends.append(end)
        if self.pick != "average":
            # Nothing can be forgotten after the first task. The axis begins there all the
            # same, like those of the other plots.
            axes.axhline(0, color=INK, lw=0.8)
            axes.set_xlim(0.8, max(run.tasks for run in _runs(groups)) + 0.2)
        elif not is_crowded:
            axes.set_ylim(0, 100)
        label_lines(figure, axes, groups, ends)

    def _mean(self, group: Group) -> Array:
        return 100 * group.curve(self.pick, self.is_global)

    def _draw_mean(self, axes: Axes, group: Group, index: int) -> None:
        mean = self._mean(group)
        tasks = np.arange(1, len(mean) + 1)
        style = series_style(index)
        axes.plot(tasks, mean, label=group.label, linewidth=1.6, **style)

    def _draw_spread(self, axes: Axes, group: Group, index: int) -> None:
        """Draw a band, or each seed where there are too few for one."""
        colour = series_style(index)["color"]
        band = group.band(
            self.pick, measure_named(FIELDS[self.pick]), self.is_global
        )
        if band is not None:
            low, high = (100 * bound for bound in band)
            tasks = np.arange(1, len(low) + 1)
            axes.fill_between(tasks, low, high, color=colour, alpha=0.15, lw=0)
        elif len(group.runs) > 1:
            for values in group.seed_curves(self.pick, self.is_global):
                tasks = np.arange(1, len(values) + 1)
                axes.plot(tasks, 100 * values, color=colour, lw=0.7, alpha=0.6)

    def _end(self, group: Group, index: int) -> End | None:
        """Find where a method's line ends; None if it has no point."""
        mean = self._mean(group)
        measured = np.flatnonzero(np.isfinite(mean))
        if measured.size == 0:
            return None
        task = measured[-1]
        colour = series_style(index)["color"]
        return float(mean[task]), float(task + 1), wrapped(group.label), colour


def _heights(axes: Axes, ends: Sequence[End], gap: float) -> list[float]:
    """Give names heights at which they do not touch.

    Parameters
    ----------
    axes : Axes
        With all lines drawn.
    ends : sequence of End
        The highest comes in front.
    gap : float
        Between two names, as a share of the axes.

    Returns
    -------
    list of float
        Shares of the axes.
    """
    low, high = axes.get_ylim()
    places: list[float] = []
    for value, *_ in ends:
        above = [place - gap for place in places[-1:]]
        places.append(min([(value - low) / (high - low), *above]))
    # Names that were pushed out at the bottom push the others back up.
    floor = 0.0
    for index in reversed(range(len(places))):
        places[index] = max(places[index], floor)
        floor = places[index] + gap
    return places


def _name_lines(figure: Figure, axes: Axes, ends: Sequence[End]) -> None:
    """Write names beside the ends of lines, apart from each other."""
    if not ends:
        return
    # From the top, so that each name only has to stay below the one before it.
    ordered = sorted(ends, reverse=True)
    lines = max(name.count("\n") + 1 for _, _, name, _ in ordered)
    # A name's height as a share of the axes, which are an inch lower than the figure; less
    # where many names need room.
    gap = min(0.175 * lines / (figure.get_figheight() - 1), 1 / len(ordered))
    heights = _heights(axes, ordered, gap)
    for (value, end, name, colour), height in zip(ordered, heights, strict=True):
        axes.annotate(
            name,
            (end, value),
            (1.04, height),
            xycoords="data",
            textcoords="axes fraction",
            color=INK,
            va="center",
            annotation_clip=False,
            # A name may stand far from its line, so that a thin line in its colour leads there.
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "lw": 0.8,
                "shrinkA": 1,
                "shrinkB": 4,
                "relpos": (0.0, 0.5),
            },
        )


def label_lines(
    figure: Figure,
    axes: Axes,
    groups: Groups,
    ends: Sequence[End],
) -> None:
    """Name lines at their ends where there are many, else below the plot."""
    if _is_crowded(groups):
        _name_lines(figure, axes, ends)
    else:
        # Lines were drawn backwards.
        legend_below(figure, axes, is_reversed=True)
