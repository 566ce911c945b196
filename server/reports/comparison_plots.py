"""The plots of several methods side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedknow.server.reports.groups import Group
from fedknow.server.reports.measures import SEEDS_FOR_INTERVAL, measure_named, scale_for
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
from fedknow.server.reports.run_plots import begin_at_zero, draw_over_time, time_scale

__all__ = ["COMPARISON_PLOTS", "draw_bars"]

Groups = Sequence[Group]

FIELDS = {
    "average": "accuracy",
    "forgetting": "forgetting",
    "relative": "forgetting_relative",
}
"""The measure of each field of a scoring that is drawn."""
LINE = 0.2
"""Height of a line of text, inches."""
BAR_LABEL = 22
"""Letters of a method's name beside its bar, in one line."""


def _is_crowded(groups: Groups) -> bool:
    """Whether names stand at the ends of lines, as there are more of them than colours."""
    return len(groups) > len(COLOURS)


def _shape_of_curves(groups: Groups) -> Shape:
    labels = [group.label for group in groups]
    if not _is_crowded(groups):
        return Shape(height=2.9 + LINE * legend_rows(labels))
    lines = sum(wrapped(label).count("\n") + 1 for label in labels)
    return Shape(width=11, height=max(3.8, LINE * lines + 1), is_wide=True)


def _shape_of_bars(groups: Groups) -> Shape:
    lines = sum(wrapped(group.label, BAR_LABEL).count("\n") + 1 for group in groups)
    return Shape(height=max(2.9, 0.28 * len(groups) + 1, LINE * lines + 1))


def _spread_of_curves(groups: Groups) -> str:
    """Say what is drawn of several seeds beside their mean."""
    if _is_crowded(groups):
        return ""
    return _spread(
        groups, "Bands: 95 % intervals over seeds.", "Thin lines: each seed."
    )


def _spread_of_bars(groups: Groups) -> str:
    return _spread(
        groups, "Whiskers: 95 % intervals over seeds.", "Circles: each seed."
    )


def _spread(groups: Groups, intervals: str, seeds: str) -> str:
    counts = [len(group.runs) for group in groups]
    parts = []
    if any(count >= SEEDS_FOR_INTERVAL for count in counts):
        parts.append(intervals)
    if any(1 < count < SEEDS_FOR_INTERVAL for count in counts):
        parts.append(seeds)
    return " ".join(parts)


def _curves(
    figure: Figure, groups: Groups, pick: str, label: str, is_global: bool
) -> None:
    axes = axes_with(figure, "tasks learned", label)
    ends = []
    for index, group in reversed(list(enumerate(groups))):  # the first on top
        end = _curve(axes, group, index, pick, is_global, not _is_crowded(groups))
        if end is not None:
            ends.append(end)
    if pick == "average":
        if not _is_crowded(groups):
            axes.set_ylim(0, 100)
    else:  # nothing can be forgotten after the first task: the axis has its place all the same
        axes.axhline(0, color=INK, lw=0.8)
        axes.set_xlim(
            0.8, max(run.tasks for group in groups for run in group.runs) + 0.2
        )
    if _is_crowded(groups):
        _name_lines(figure, axes, ends)
    else:
        legend_below(figure, axes, is_reversed=True)


End = tuple[float, float, str, str]
"""Height and place of a line's end, its name and its colour."""


def _curve(
    axes: Axes,
    group: Group,
    index: int,
    pick: str,
    is_global: bool,
    has_spread: bool,
) -> End | None:
    """Draw a method's mean, and its band or each of its seeds; say where the line ends."""
    mean = 100 * group.curve(pick, is_global)
    tasks = np.arange(1, len(mean) + 1)
    style = series_style(index)
    axes.plot(tasks, mean, label=group.label, linewidth=1.6, **style)
    band = group.band(pick, measure_named(FIELDS[pick]), is_global)
    if has_spread and band is not None:
        low, high = (100 * ends for ends in band)
        axes.fill_between(tasks, low, high, color=style["color"], alpha=0.15, lw=0)
    elif has_spread and len(group.runs) > 1:
        for values in group.seed_curves(pick, is_global):
            places = np.arange(1, len(values) + 1)
            axes.plot(places, 100 * values, color=style["color"], lw=0.7, alpha=0.6)
    measured = np.flatnonzero(np.isfinite(mean))
    if measured.size == 0:
        return None
    last = measured[-1]
    return float(mean[last]), float(last + 1), wrapped(group.label), style["color"]


def _heights(axes: Axes, ends: Sequence[End], gap: float) -> list[float]:
    """Give names heights, as shares of the axes, at which they do not touch; highest first."""
    low, high = axes.get_ylim()
    places: list[float] = []
    for value, *_ in ends:
        above = [place - gap for place in places[-1:]]
        places.append(min([(value - low) / (high - low), *above]))
    floor = 0.0
    for index in reversed(
        range(len(places))
    ):  # those pushed out at the bottom push back
        places[index] = max(places[index], floor)
        floor = places[index] + gap
    return places


def _name_lines(figure: Figure, axes: Axes, ends: Sequence[End]) -> None:
    """Write names beside the ends of lines, moved apart where they would touch."""
    if not ends:
        return
    ordered = sorted(ends, reverse=True)
    lines = max(name.count("\n") + 1 for _, _, name, _ in ordered)
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
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "lw": 0.8,
                "shrinkA": 1,
                "shrinkB": 4,
                "relpos": (0.0, 0.5),
            },
        )


def _over_time(figure: Figure, groups: Groups) -> None:
    firsts = [(group.label, group.runs[0]) for group in groups]
    scale = time_scale(
        max(_or_zero(run.elapsed("virtual_seconds")) for _, run in firsts)
    )
    axes = axes_with(
        figure, f"virtual time ({scale.name})", "average accuracy (%)", False
    )
    ends = []
    for index, (label, run) in reversed(list(enumerate(firsts))):
        style = series_style(index)
        times, accuracies = draw_over_time(axes, run, scale, label=label, **style)
        if times:
            ends.append((accuracies[-1], times[-1], wrapped(label), style["color"]))
    begin_at_zero(axes)
    if _is_crowded(groups):
        _name_lines(figure, axes, ends)
    else:
        legend_below(figure, axes, is_reversed=True)


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def draw_bars(figure: Figure, groups: Groups, key: str, label: str) -> Axes:
    """Draw a bar a method, with a number in a unit of its size, in the order given from the top."""
    measure = measure_named(key)
    estimates = [group.estimate(key) for group in groups]
    means = [point.mean for point in estimates]
    scale = scale_for(max(map(_or_zero, means)), measure.scales)
    unit = f" ({scale.name})" if scale.name else ""
    axes = axes_with(figure, f"{label}{unit}", "", is_counted=False)
    rows = np.arange(len(groups))
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(groups))]
    widths = [_or_zero(mean) / scale.size for mean in means]
    axes.barh(rows, widths, color=colours, height=0.55)
    ends = list(widths)
    for row, point in enumerate(estimates):
        low, high = (end / scale.size for end in point.interval(measure))
        if point.has_interval:
            axes.plot([low, high], [row, row], color=INK, lw=1.2)
            ends[row] = high
        elif point.count > 1:
            seeds = np.array(point.values) / scale.size
            axes.plot(
                seeds, np.full(point.count, row), "o", color=INK, ms=3.5, mfc="none"
            )
            ends[row] = float(seeds.max())
    for row, (end, mean) in enumerate(zip(ends, means, strict=True)):
        text = measure.text(mean)
        axes.annotate(
            text, (end, row), (5, 0), textcoords="offset points", va="center", size=9
        )
    axes.set_yticks(rows, [wrapped(group.label, BAR_LABEL) for group in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlim(0, 1.35 * max(ends) or 1)
    axes.grid(False, axis="y")
    return axes


def _has_tasks(groups: Groups) -> bool:
    return any(run.tasks for group in groups for run in group.runs)


def _has_global(groups: Groups) -> bool:
    return any(run.global_model for group in groups for run in group.runs)


def _has_virtual_time(groups: Groups) -> bool:
    events = (event for group in groups for event in group.runs[0].evaluations)
    return any(event.get("virtual_seconds") is not None for event in events)


def _curve_spec(
    name: str, title: str, caption: str, pick: str, label: str, is_global: bool = False
) -> PlotSpec[Groups]:
    return PlotSpec(
        name,
        title,
        caption,
        partial(_curves, pick=pick, label=label, is_global=is_global),
        _has_global if is_global else _has_tasks,
        _spread_of_curves,
        _shape_of_curves,
    )


def _bar_spec(key: str, title: str, caption: str, label: str) -> PlotSpec[Groups]:
    return PlotSpec(
        key,
        title,
        f"{caption} Mean over seeds.",
        partial(draw_bars, key=key, label=label),
        lambda groups: any(
            not math.isnan(group.estimate(key).mean) for group in groups
        ),
        _spread_of_bars,
        _shape_of_bars,
    )


COMPARISON_PLOTS: tuple[PlotSpec[Groups], ...] = (
    _curve_spec(
        "accuracy",
        "Average accuracy",
        "Each client with all it keeps to itself: mean over the tasks learned so far.",
        "average",
        "average accuracy (%)",
    ),
    _curve_spec(
        "forgetting",
        "Forgetting",
        "Accuracy lost since a task was learned, mean over earlier tasks.",
        "forgetting",
        "forgetting (points)",
    ),
    _curve_spec(
        "accuracy-global",
        "Average accuracy of the global model",
        "One model for everyone, heads averaged: what a client without a past would get.",
        "average",
        "average accuracy (%)",
        is_global=True,
    ),
    _curve_spec(
        "relative",
        "Relative forgetting",
        "Share of the accuracy when learned that was lost, mean over earlier tasks.",
        "relative",
        "relative forgetting (%)",
    ),
    PlotSpec(
        "hours",
        "Accuracy over virtual time",
        "Average accuracy against the time that the run would have taken on its fleet; the first seed of each.",
        _over_time,
        _has_virtual_time,
        shape=_shape_of_curves,
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
