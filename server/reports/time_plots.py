"""Plots over virtual time: their axis, and the curve of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from fedknow.server.reports.measures import Scale, measure_named, scale_for
from fedknow.server.reports.summary import Summary

__all__ = [
    "begin_at_zero",
    "draw_over_time",
    "event_number",
    "has_virtual_time",
    "time_scale",
]


def event_number(event: Mapping[str, Any], key: str) -> float:
    """Return a number of an event; NaN where the event has none."""
    return math.nan if event.get(key) is None else float(event[key])


def time_scale(seconds: float) -> Scale:
    """Choose the unit of an axis of time."""
    return scale_for(seconds, measure_named("seconds").scales)


def draw_over_time(
    axes: Axes, run: Summary, scale: Scale, **style: Any
) -> tuple[list[float], list[float]]:
    """Draw a run's accuracy over its virtual time.

    Returns
    -------
    (list of float, list of float)
        The times, in units of ``scale``, and the accuracies in percent.
    """
    points = [
        event
        for event in run.evaluations
        if event.get("virtual_seconds") is not None
    ]
    times = [event["virtual_seconds"] / scale.size for event in points]
    accuracies = [100 * event_number(event, "accuracy") for event in points]
    axes.plot(times, accuracies, **style)
    return times, accuracies


def begin_at_zero(axes: Axes) -> None:
    """Let time begin at zero, once all is drawn."""
    # The end of the axis is settled by this call: later lines would be cut off.
    axes.set_xlim(left=0)
    axes.set_ylim(0, 100)


def has_virtual_time(run: Summary) -> bool:
    """Tell whether a run was scored on a virtual clock."""
    return any(
        event.get("virtual_seconds") is not None for event in run.evaluations
    )
