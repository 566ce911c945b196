"""The plots of one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedknow.server.reports.fleet import clients_by_device
from fedknow.server.reports.measures import (
    BYTES,
    Scale,
    scale_for,
    size,
)
from fedknow.server.reports.plots import (
    COLOURS,
    GREY,
    INK,
    PlotSpec,
    Shape,
    axes_with,
    legend_below,
)
from fedknow.server.reports.summary import Summary
from fedknow.server.reports.time_plots import (
    begin_at_zero,
    draw_over_time,
    event_number,
    has_virtual_time,
    time_scale,
)

__all__ = ["RUN_PLOTS"]

MOST_NUMBERED = 10
"""Tasks of which a matrix has the numbers too; more would not be legible."""
MOST_DEVICES = 20


def _accuracy(figure: Figure, run: Summary) -> None:
    axes = axes_with(figure, "tasks learned", "average accuracy (%)")
    tasks = np.arange(1, run.tasks + 1)
    # An unfinished run has values for the tasks that it has ended.
    personal = 100 * run.personal.average[: run.tasks]
    axes.plot(tasks, personal, "o-", color=COLOURS[0], label="personal")
    if run.global_model:
        shared = 100 * run.global_model.average[: run.tasks]
        axes.plot(tasks, shared, "s--", color=COLOURS[1], label="global")
    axes.set_ylim(0, 100)
    axes.legend()


def _forgetting(figure: Figure, run: Summary) -> None:
    axes = axes_with(figure, "tasks learned", "forgetting (points or %)")
    tasks = np.arange(1, run.tasks + 1)
    curves = [
        ("absolute", run.personal.forgetting, "o-", COLOURS[0]),
        ("relative", run.personal.relative, "D--", COLOURS[2]),
    ]
    if run.global_model:
        curves.append(
            (
                "absolute, global model",
                run.global_model.forgetting,
                "s:",
                COLOURS[1],
            )
        )
    for label, values, style, colour in curves:
        axes.plot(
            tasks, 100 * values[: run.tasks], style, color=colour, label=label
        )
    # Below the line old tasks got better.
    axes.axhline(0, color=INK, lw=0.8)
    # From the first task, where nothing can be forgotten, so that all plots have one axis.
    axes.set_xlim(0.8, run.tasks + 0.2)
    legend_below(figure, axes)


def _matrix(figure: Figure, run: Summary) -> None:
    axes = axes_with(figure, "after learning task", "accuracy on task")
    axes.grid(False)
    values = 100 * run.personal.matrix[: run.tasks, : run.tasks]
    # Edges between whole numbers, so that each task stands in the middle of its cell.
    edges = np.arange(run.tasks + 1) + 0.5
    # Cividis reads the same with and without colour vision.
    mesh = axes.pcolormesh(edges, edges, values, cmap="cividis", vmin=0, vmax=100)
    axes.invert_yaxis()
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if run.tasks <= MOST_NUMBERED:
        for seen, trained in np.argwhere(~np.isnan(values)):
            value = values[seen, trained]
            # Legible on the dark and on the bright half of the scale.
            colour = "#ffffff" if value < 55 else "#000000"
            place = (trained + 1, seen + 1)
            axes.text(
                *place,
                f"{value:.0f}",
                ha="center",
                va="center",
                color=colour,
                size=9,
            )
    figure.colorbar(mesh, label="accuracy (%)").outline.set_visible(False)


def _each_task(figure: Figure, run: Summary) -> None:
    axes = axes_with(figure, "tasks learned", "accuracy (%)")
    # Without the ends of the scale, which vanish on a dark or a bright page.
    colours = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.8, run.tasks))
    for task, colour in enumerate(colours):
        # A task has no accuracy before it was learned.
        steps = np.arange(task, run.tasks)
        values = 100 * run.personal.matrix[task, steps]
        axes.plot(steps + 1, values, marker=".", color=colour)
        end = (steps[-1] + 1, values[-1])
        axes.annotate(
            str(task + 1),
            end,
            (5, 0),
            textcoords="offset points",
            va="center",
            size=9,
        )
    axes.set_ylim(0, 100)


def _traffic(figure: Figure, run: Summary) -> None:
    kinds = sorted(run.traffic, reverse=True)
    largest = max(
        max(counts["down"], counts["up"]) for counts in run.traffic.values()
    )
    # One unit for all bars, so that their lengths can be compared.
    scale = scale_for(largest, BYTES)
    axes = axes_with(figure, f"bytes ({scale.name})", "", is_counted=False)
    places = np.arange(len(kinds))
    directions = (("down", 0.19, COLOURS[0]), ("up", -0.19, COLOURS[1]))
    for direction, shift, colour in directions:
        counts = [run.traffic[kind][direction] for kind in kinds]
        widths = [count / scale.size for count in counts]
        bars = axes.barh(
            places + shift, widths, height=0.36, color=colour, label=direction
        )
        axes.bar_label(
            bars, [size(count) for count in counts], padding=3, color=INK, size=9
        )
    axes.set_yticks(places, kinds)
    # Room for the number at the end of the longest bar.
    axes.set_xlim(0, 1.3 * max(largest, 1) / scale.size)
    axes.grid(False, axis="y")
    legend_below(figure, axes)


def _tasks_begin(axes: Axes, run: Summary) -> None:
    for event in run.rounds:
        # The first task begins at the axis, where no line is needed.
        if event["round"] == 1 and event["server_round"] > 1:
            axes.axvline(
                event["server_round"] - 0.5, color=INK, lw=0.8, ls=":", alpha=0.5
            )


def _by_round(
    figure: Figure,
    run: Summary,
    key: str,
    label: str,
    scaled: Callable[[float], Scale] | None,
) -> None:
    rounds = [event["server_round"] for event in run.rounds]
    # A round in which nobody answered has no loss.
    values = np.array([event_number(event, key) for event in run.rounds])
    if scaled is not None:
        # A maximum of nothing but NaN warns, and is NaN.
        largest = float(np.nanmax(values)) if np.isfinite(values).any() else 0.0
        scale = scaled(largest)
        values = values / scale.size
        label = f"{label} ({scale.name})"
    axes = axes_with(figure, "round", label)
    # Many markers would hide the line.
    axes.plot(
        rounds, values, color=COLOURS[0], marker="." if len(rounds) < 40 else ""
    )
    _tasks_begin(axes, run)
    axes.set_ylim(bottom=0)


def _over_rounds(figure: Figure, run: Summary) -> None:
    axes = axes_with(figure, "round", "average accuracy (%)")
    length = run.config.train.rounds
    # An evaluation has task and round, and not the server's count of rounds.
    places = [
        event["task"] * length + event["round"] for event in run.evaluations
    ]
    curves = (
        ("accuracy", "personal", "o-", COLOURS[0]),
        ("accuracy_global", "global", "s--", COLOURS[1]),
    )
    for key, label, style, colour in curves:
        values = [100 * event_number(event, key) for event in run.evaluations]
        # The global model may not be scored, and its legend would have no line.
        if not all(map(math.isnan, values)):
            axes.plot(
                places, values, style, color=colour, markersize=4, label=label
            )
    for task in range(1, run.config.data.tasks):
        axes.axvline(task * length + 0.5, color=INK, lw=0.8, ls=":", alpha=0.5)
    axes.set_ylim(0, 100)
    axes.legend()


def _over_time(figure: Figure, run: Summary) -> None:
    scale = time_scale(run.elapsed("virtual_seconds"))
    axes = axes_with(
        figure, f"virtual time ({scale.name})", "average accuracy (%)", False
    )
    draw_over_time(axes, run, scale, marker=".", color=COLOURS[0])
    begin_at_zero(axes)


def _by_device(run: Summary) -> dict[str, list[Mapping[str, Any]]]:
    # More rows would be no picture any more; the table has them all.
    return dict(islice(clients_by_device(run).items(), MOST_DEVICES))


def _devices(figure: Figure, run: Summary) -> None:
    axes = axes_with(
        figure, "share of the virtual time (%)", "", is_counted=False
    )
    kinds = _by_device(run)
    names = [f"{kind} ({len(clients)})" for kind, clients in kinds.items()]
    # A run whose work took no virtual time has shares of zero.
    total = max(run.fleet["virtual_seconds"], 1e-12)
    starts = np.zeros(len(kinds))
    parts = (
        ("computing", "computing", COLOURS[0]),
        ("transfer", "messages", COLOURS[1]),
        ("idle", "idle", GREY),
        ("away", "away", "none"),
    )
    for key, label, colour in parts:
        means = [_mean(clients, key) for clients in kinds.values()]
        shares = [100 * mean / total for mean in means]
        axes.barh(
            names, shares, left=starts, color=colour, edgecolor=GREY, label=label
        )
        starts += shares
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    legend_below(figure, axes)


def _mean(clients: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(sum(client[key] for client in clients)) / len(clients)


def _has_tasks(run: Summary) -> bool:
    return run.tasks > 0


def _shape_of_devices(run: Summary) -> Shape:
    return Shape(height=max(3.2, 0.3 * len(_by_device(run)) + 1.4))


def _shape_of_traffic(run: Summary) -> Shape:
    return Shape(height=max(3.2, 0.42 * len(run.traffic) + 1.2))


RUN_PLOTS: tuple[PlotSpec[Summary], ...] = (
    PlotSpec(
        name="accuracy",
        title="Average accuracy",
        caption="Mean over the tasks learned so far, after each task. Personal: the shared "
        "body with each client's own head. Global: one model for everyone.",
        draw=_accuracy,
        has_data=_has_tasks,
    ),
    PlotSpec(
        name="forgetting",
        title="Forgetting",
        caption="Accuracy lost since a task was learned, mean over earlier tasks; "
        "relative: as a share of what was learned. Below zero, old tasks got better.",
        draw=_forgetting,
        has_data=_has_tasks,
    ),
    PlotSpec(
        name="matrix",
        title="Accuracy on each task after each task (%)",
        caption="Read along a row: what becomes of one task as later ones are learned. "
        "The diagonal is the accuracy when learned.",
        draw=_matrix,
        has_data=_has_tasks,
    ),
    PlotSpec(
        name="tasks",
        title="Each task over time",
        caption="Accuracy of each task (its number at the end of its line) after it and "
        "every later task.",
        draw=_each_task,
        has_data=_has_tasks,
    ),
    PlotSpec(
        name="rounds",
        title="Accuracy over rounds",
        caption="Mean over the tasks begun so far, whenever clients were scored. "
        "Dotted lines begin a new task.",
        draw=_over_rounds,
        # With one evaluation a task, it would show the first plot again.
        has_data=lambda run: len(run.evaluations) > run.tasks,
    ),
    PlotSpec(
        name="hours",
        title="Accuracy over virtual time",
        caption="Average accuracy against the time that the run would have taken on its "
        "fleet.",
        draw=_over_time,
        has_data=has_virtual_time,
    ),
    PlotSpec(
        name="devices",
        title="Where the devices' time went",
        caption="Mean over the clients with a device. Idle: there, but not chosen or "
        "waiting for others.",
        draw=_devices,
        has_data=lambda run: bool(run.fleet),
        shape=_shape_of_devices,
    ),
    PlotSpec(
        name="traffic",
        title="Bytes by kind of message",
        caption="Down: from the server to clients. Up: from clients to the server. "
        "Scoring is measurement, not part of the method.",
        draw=_traffic,
        has_data=lambda run: bool(run.traffic),
        shape=_shape_of_traffic,
    ),
    PlotSpec(
        name="loss",
        title="Training loss",
        caption="Mean loss the clients report for a round. Dotted lines begin a new task.",
        draw=partial(_by_round, key="loss", label="training loss", scaled=None),
        has_data=lambda run: bool(run.rounds),
    ),
    PlotSpec(
        name="seconds",
        title="Time of a round",
        caption="Real time of each round of training, aggregation included. "
        "Dotted lines begin a new task.",
        draw=partial(
            _by_round, key="seconds", label="time of a round", scaled=time_scale
        ),
        has_data=lambda run: bool(run.rounds),
    ),
)
