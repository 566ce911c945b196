"""The plots of a report: each is one figure, drawn without a display, saved as PNG or put inline as SVG."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedknow.server.reports.groups import Group
from fedknow.server.reports.measures import measure_named
from fedknow.server.reports.summary import Array, Scoring, Summary

__all__ = ["Plot", "comparison_plots", "run_plots"]

INK = "#1c2127"
"""Text and lines. In an inline SVG it becomes the page's own text colour, so that plots follow light and dark."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b4c9a")
"""Okabe and Ito's palette: told apart by colour-blind readers too."""
GREY = "#b4b9bf"
"""Methods beyond the colours."""
MARKERS = "osD^vP*"
FIELDS = {"average": "accuracy", "forgetting": "forgetting", "relative": "forgetting_relative"}
"""The measure of each field of a scoring that is drawn."""
STYLE = {
    "svg.fonttype": "none",  # text stays text: the reader's own font, and it can be searched
    "svg.hashsalt": "fedknow",  # the same run gives the same file
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


@dataclass(frozen=True)
class Plot:
    """One figure: its file name without ending, a title, a sentence that says what is seen, and how to draw it."""

    name: str
    title: str
    caption: str
    draw: Callable[[Figure], None]
    wide: bool = False
    height: float = 3.6

    def png(self) -> bytes:
        """The figure as a PNG file: white background, 160 dots an inch."""
        buffer = io.BytesIO()
        with self._drawn() as figure:
            figure.suptitle(self.title)
            figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
        return buffer.getvalue()

    def svg(self) -> str:
        """The figure as an ``<svg>`` element without ids or colours of text that could clash with a page."""
        buffer = io.StringIO()
        with self._drawn() as figure:
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
        text = buffer.getvalue()
        text = text[text.index("<svg") :].replace(INK, "currentColor")
        return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.name}-", text)

    @contextmanager
    def _drawn(self) -> Iterator[Figure]:
        with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
            figure = Figure(figsize=(9.6 if self.wide else 5.6, self.height), layout="constrained")
            self.draw(figure)
            yield figure


def run_plots(run: Summary) -> list[Plot]:
    """The plots of one run; those of which it has no numbers yet are left out."""
    plots = []
    if run.tasks:
        tasks = np.arange(1.0, run.tasks + 1)
        plots += [
            Plot(
                "accuracy",
                "Average accuracy",
                "Mean over the tasks learned so far, after each task. Personal: the shared body with each client's "
                "own head. Global: one model for everyone.",
                lambda figure: _scorings(figure, run, tasks, lambda scoring: scoring.average, "average accuracy (%)"),
            ),
            Plot(
                "forgetting",
                "Forgetting",
                "Accuracy lost since a task was learned, mean over earlier tasks; relative: as a share of what was "
                "learned. Below zero, old tasks got better.",
                lambda figure: _forgetting(figure, run, tasks),
            ),
            Plot(
                "matrix",
                "Accuracy on each task after each task (%)",
                "Read along a row: what becomes of one task as later ones are learned. The diagonal is the accuracy "
                "when learned.",
                lambda figure: _matrix(figure, run),
            ),
            Plot(
                "tasks",
                "Each task over time",
                "Accuracy of each task (its number at the end of its line) after it and every later task.",
                lambda figure: _tasks(figure, run),
            ),
        ]
    if len(run.evaluations) > run.tasks:
        plots.append(
            Plot(
                "rounds",
                "Accuracy over rounds",
                "Mean over the tasks begun so far, whenever clients were scored; dotted lines begin a new task.",
                lambda figure: _over_rounds(figure, run),
            )
        )
    if any("virtual_seconds" in event for event in run.evaluations):
        plots.append(
            Plot(
                "hours",
                "Accuracy over virtual time",
                "Average accuracy against the time that the run would have taken on its fleet.",
                lambda figure: _over_hours(figure, [(run.config.learner.name, run)]),
            )
        )
    if run.fleet:
        plots.append(
            Plot(
                "devices",
                "Where the devices' time went",
                "Mean over the clients with a device. Idle: there, but not chosen or waiting for others.",
                lambda figure: _devices(figure, run),
            )
        )
    if run.traffic:
        plots.append(
            Plot(
                "traffic",
                "Bytes by kind of message",
                "Down: from the server to clients. Up: from clients to the server. Scoring is measurement, not part "
                "of the method.",
                lambda figure: _traffic(figure, run),
            )
        )
    if run.rounds:
        plots += [
            Plot(
                "loss",
                "Training loss",
                "Mean loss the clients report for a round; dotted lines begin a new task.",
                lambda figure: _by_round(figure, run, "loss", "training loss"),
            ),
            Plot(
                "seconds",
                "Seconds a round",
                "Real time of each round of training, aggregation included; dotted lines begin a new task.",
                lambda figure: _by_round(figure, run, "seconds", "time of a round (s)"),
            ),
        ]
    return plots


def comparison_plots(groups: Sequence[Group]) -> list[Plot]:
    """The plots of several methods side by side; bands and whiskers are 95 % intervals over seeds.

    With more methods than there are colours, the first ones have them, so put the best first; the others are grey,
    every line has its name at its end, and the intervals are left to the table.
    """
    many = len(groups) > len(COLOURS)
    lines = sum(_wrapped(group.label).count("\n") + 1 for group in groups)
    curves = max(3.6, 0.19 * lines + 1) if many else 3.4 + 0.2 * _legend_rows(groups)
    bars = max(3.6, 0.26 * len(groups) + 1, 0.2 * lines + 1)

    def curve(name: str, title: str, caption: str, pick: str, label: str, global_model: bool = False) -> Plot:
        def draw(figure: Figure) -> None:
            _curves(figure, groups, pick, global_model, label)

        return Plot(name, title, caption, draw, wide=many, height=curves)

    def bar(name: str, title: str, caption: str, unit: float, label: str) -> Plot:
        return Plot(name, title, caption, lambda figure: _bars(figure, groups, name, unit, label), height=bars)

    plots = [
        curve(
            "accuracy",
            "Average accuracy",
            "Each client with all it keeps to itself: mean over the tasks learned so far.",
            "average",
            "average accuracy (%)",
        ),
        curve(
            "forgetting",
            "Forgetting",
            "Accuracy lost since a task was learned, mean over earlier tasks.",
            "forgetting",
            "forgetting (points)",
        ),
    ]
    if any(run.global_model for group in groups for run in group.runs):
        plots.append(
            curve(
                "accuracy-global",
                "Average accuracy of the global model",
                "One model for everyone, heads averaged: what a client without a past would get.",
                "average",
                "average accuracy (%)",
                global_model=True,
            )
        )
    plots.append(
        curve(
            "relative",
            "Relative forgetting",
            "Share of the accuracy when learned that was lost, mean over earlier tasks.",
            "relative",
            "relative forgetting (%)",
        )
    )
    if any("virtual_seconds" in event for group in groups for run in group.runs for event in run.evaluations):
        plots.append(
            Plot(
                "hours",
                "Accuracy over virtual time",
                "Average accuracy against the time that the run would have taken on its fleet; the first seed of each.",
                lambda figure: _over_hours(figure, [(group.label, group.runs[0]) for group in groups]),
                wide=many,
                height=curves,
            )
        )
    costs = [
        ("bytes", "Training traffic", "Bytes down and up for training, whole run.", 1e6, "training traffic (MB)"),
        (
            "knowledge_bytes",
            "What a client keeps about past tasks",
            "After the last task, mean over clients: knowledge, importances, stored samples.",
            1e6,
            "kept by a client (MB)",
        ),
        (
            "samples",
            "Samples learned from",
            "Samples that went forward to be learned from: extra epochs and replayed samples count.",
            1e3,
            "samples (thousands)",
        ),
        ("seconds", "Time", "Real time of the whole run, scoring included.", 1.0, "time (s)"),
        (
            "peak_memory_mb",
            "Peak memory",
            "Largest resident memory of each process during the run, added up.",
            1.0,
            "peak memory (MB)",
        ),
        (
            "virtual_seconds",
            "Virtual time",
            "What the run would have taken on its fleet.",
            3600.0,
            "virtual time (h)",
        ),
    ]
    return plots + [
        bar(name, title, f"{caption} Mean over seeds.", unit, label)
        for name, title, caption, unit, label in costs
        if any(not math.isnan(group.estimate(name).mean) for group in groups)
    ]


def _scorings(figure: Figure, run: Summary, tasks: Array, pick: Callable[[Scoring], Array], label: str) -> None:
    axes = _axes(figure, "tasks learned", label)
    axes.plot(tasks, 100 * pick(run.personal)[: run.tasks], marker="o", color=COLOURS[0], label="personal")
    if run.global_model:
        values = 100 * pick(run.global_model)[: run.tasks]
        axes.plot(tasks, values, marker="s", ls="--", color=COLOURS[1], label="global")
    axes.set_ylim(0, 100)
    axes.legend()


def _forgetting(figure: Figure, run: Summary, tasks: Array) -> None:
    axes = _axes(figure, "tasks learned", "forgetting (points, % if relative)")
    scoring = run.personal
    axes.plot(tasks, 100 * scoring.forgetting[: run.tasks], marker="o", color=COLOURS[0], label="absolute")
    axes.plot(tasks, 100 * scoring.relative[: run.tasks], marker="D", ls="--", color=COLOURS[2], label="relative")
    if run.global_model:
        values = 100 * run.global_model.forgetting[: run.tasks]
        axes.plot(tasks, values, marker="s", ls=":", color=COLOURS[1], label="absolute, global model")
    axes.axhline(0, color=INK, lw=0.8)
    axes.set_xlim(0.8, run.tasks + 0.2)
    axes.legend()


def _matrix(figure: Figure, run: Summary) -> None:
    axes = _axes(figure, "after learning task", "accuracy on task")
    axes.grid(False)
    values = 100 * run.personal.matrix[: run.tasks, : run.tasks]
    mesh = axes.pcolormesh(
        np.arange(run.tasks + 1) + 0.5, np.arange(run.tasks + 1) + 0.5, values, cmap="cividis", vmin=0, vmax=100
    )
    axes.invert_yaxis()
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if run.tasks <= 12:  # more numbers would not be legible
        for seen, trained in np.argwhere(~np.isnan(values)):
            value = values[seen, trained]
            colour = "#ffffff" if value < 55 else "#000000"
            axes.text(trained + 1, seen + 1, f"{value:.0f}", ha="center", va="center", color=colour, size=8)
    figure.colorbar(mesh, label="accuracy (%)").outline.set_visible(False)


def _tasks(figure: Figure, run: Summary) -> None:
    axes = _axes(figure, "tasks learned", "accuracy (%)")
    colours = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.8, run.tasks))
    for task, colour in enumerate(colours):
        steps = np.arange(task, run.tasks)
        values = 100 * run.personal.matrix[task, steps]
        axes.plot(steps + 1, values, marker=".", color=colour)
        axes.annotate(
            str(task + 1), (steps[-1] + 1, values[-1]), (5, 0), textcoords="offset points", color=colour, va="center"
        )
    axes.set_ylim(0, 100)


def _traffic(figure: Figure, run: Summary) -> None:
    axes = _axes(figure, "bytes (MB)", "", whole=False)
    kinds = sorted(run.traffic, reverse=True)
    places = np.arange(len(kinds))
    for shift, way, colour in ((0.19, "down", COLOURS[0]), (-0.19, "up", COLOURS[1])):
        values = [run.traffic[kind][way] / 1e6 for kind in kinds]
        bars = axes.barh(places + shift, values, height=0.36, color=colour, label=way)
        axes.bar_label(bars, fmt="{:,.1f}", padding=3, color=INK, size=8)
    axes.set_yticks(places, kinds)
    axes.margins(x=0.15)
    axes.grid(False, axis="y")
    axes.legend()


def _by_round(figure: Figure, run: Summary, key: str, label: str) -> None:
    axes = _axes(figure, "round", label)
    rounds = [event["server_round"] for event in run.rounds]
    values = [math.nan if event.get(key) is None else event[key] for event in run.rounds]
    axes.plot(rounds, values, color=COLOURS[0], marker="." if len(rounds) < 40 else "")
    for event in run.rounds:
        if event["round"] == 1 and event["server_round"] > 1:
            axes.axvline(event["server_round"] - 0.5, color=INK, lw=0.8, ls=":", alpha=0.5)
    axes.set_ylim(bottom=0)


def _over_rounds(figure: Figure, run: Summary) -> None:
    axes = _axes(figure, "round", "average accuracy (%)")
    length = run.config.train.rounds
    places = [event["task"] * length + event["round"] for event in run.evaluations]
    for key, style, colour in (("accuracy", "o-", COLOURS[0]), ("accuracy_global", "s--", COLOURS[1])):
        values = [math.nan if event.get(key) is None else 100 * event[key] for event in run.evaluations]
        if not all(map(math.isnan, values)):
            label = "global" if key == "accuracy_global" else "personal"
            axes.plot(places, values, style, color=colour, ms=4, label=label)
    for task in range(1, run.config.data.tasks):
        axes.axvline(task * length + 0.5, color=INK, lw=0.8, ls=":", alpha=0.5)
    axes.set_ylim(0, 100)
    axes.legend()


def _curves(figure: Figure, groups: Sequence[Group], pick: str, global_model: bool, label: str) -> None:
    axes = _axes(figure, "tasks learned", label)
    many = len(groups) > len(COLOURS)
    ends = []
    for index, group in reversed(list(enumerate(groups))):  # the first on top
        mean = 100 * group.curve(pick, global_model)
        band = group.band(pick, measure_named(FIELDS[pick]), global_model)
        colour, tasks = _colour(index), np.arange(1, len(mean) + 1)
        grey = index >= len(COLOURS)
        axes.plot(
            tasks,
            mean,
            marker="" if grey else MARKERS[index],
            color=colour,
            label=group.label,
            ms=5,
            lw=0.9 if grey else 1.6,
        )
        if band is not None and not many:
            low, high = (100 * ends for ends in band)
            axes.fill_between(tasks, low, high, color=colour, alpha=0.15, lw=0)
        if np.isfinite(mean).any():
            last = np.flatnonzero(np.isfinite(mean))[-1]
            ends.append((float(mean[last]), float(last + 1), _wrapped(group.label), colour))
    if pick == "average" and not many:
        axes.set_ylim(0, 100)
    elif pick != "average":  # nothing can be forgotten after the first task: the axis has its place all the same
        axes.axhline(0, color=INK, lw=0.8)
        axes.set_xlim(0.8, max(run.tasks for group in groups for run in group.runs) + 0.2)
    if many:
        _name_lines(figure, axes, ends)
    else:
        handles, labels = axes.get_legend_handles_labels()
        columns = math.ceil(len(groups) / _legend_rows(groups))
        figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=columns)


def _legend_rows(groups: Sequence[Group]) -> int:
    """Rows of the names under a plot of normal width."""
    longest = max(len(group.label) for group in groups)
    return math.ceil(len(groups) / max(1, 60 // (longest + 5)))


def _wrapped(label: str) -> str:
    """A name of settings in lines that leave room for the plot beside it."""
    return "\n".join(textwrap.wrap(label, 30, break_long_words=False))


def _name_lines(figure: Figure, axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names beside the ends of lines (height, place, name, colour), moved apart where they would touch."""
    low, high = axes.get_ylim()
    ordered = sorted(ends, reverse=True)
    lines = max(name.count("\n") + 1 for _, _, name, _ in ordered)
    gap, places = min(0.15 * lines / (figure.get_figheight() - 1), 1 / len(ordered)), list[float]()
    for value, *_ in ordered:
        places.append(min([(value - low) / (high - low), *(place - gap for place in places[-1:])]))
    floor = 0.0
    for index in reversed(range(len(places))):  # those that were pushed out at the bottom push back
        places[index] = max(places[index], floor)
        floor = places[index] + gap
    for (value, end, name, colour), place in zip(ordered, places, strict=True):
        axes.annotate(
            name,
            (end, value),
            (1.04, place),
            xycoords="data",
            textcoords="axes fraction",
            color=INK,
            size=8,
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


def _colour(index: int) -> str:
    return COLOURS[index] if index < len(COLOURS) else GREY


def _over_hours(figure: Figure, runs: Sequence[tuple[str, Summary]]) -> None:
    last = max(event.get("virtual_seconds", 0.0) for _, run in runs for event in run.evaluations)
    unit, name = (3600.0, "h") if last > 7200 else (60.0, "min") if last > 120 else (1.0, "s")
    axes = _axes(figure, f"virtual time ({name})", "average accuracy (%)", whole=False)
    for index, (label, run) in reversed(list(enumerate(runs))):
        points = [event for event in run.evaluations if "virtual_seconds" in event]
        times = [event["virtual_seconds"] / unit for event in points]
        values = [math.nan if event["accuracy"] is None else 100 * event["accuracy"] for event in points]
        axes.plot(times, values, marker=".", color=_colour(index), label=label)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 100)
    if len(runs) > 1:
        handles, labels = axes.get_legend_handles_labels()
        columns = max(1, 60 // (max(map(len, labels)) + 5))
        figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=columns, fontsize=8)


def _devices(figure: Figure, run: Summary) -> None:
    axes = _axes(figure, "share of the virtual time (%)", "", whole=False)
    kinds: dict[str, list[dict[str, float]]] = {}
    for client in run.fleet["clients"]:
        kinds.setdefault(client["device"], []).append(client)
    shown = list(kinds)[:20]
    total, left = max(run.fleet["virtual_seconds"], 1e-12), np.zeros(len(shown))
    parts = (
        ("computing", "computing", COLOURS[0]),
        ("transfer", "messages", COLOURS[1]),
        ("idle", "idle", GREY),
        ("away", "away", "none"),
    )
    for key, label, colour in parts:
        means = [100 * sum(client[key] for client in kinds[kind]) / len(kinds[kind]) / total for kind in shown]
        names = [f"{kind} ({len(kinds[kind])})" for kind in shown]
        axes.barh(names, means, left=left, color=colour, edgecolor=GREY, label=label)
        left += means
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.legend(ncols=len(parts), loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _bars(figure: Figure, groups: Sequence[Group], key: str, unit: float, label: str) -> None:
    axes = _axes(figure, label, "", whole=False)
    estimates = [group.estimate(key) for group in groups]
    means = [point.mean / unit for point in estimates]
    halves = [point.half / unit if point.has_interval else 0.0 for point in estimates]
    colours = [_colour(index) for index in range(len(groups))]
    names = [_wrapped(group.label) for group in groups]
    bars = axes.barh(names, means, xerr=halves, color=colours, height=0.5, ecolor=INK)
    axes.bar_label(bars, [f"{mean:,.1f}" for mean in means], padding=4, color=INK)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.grid(False, axis="y")


def _axes(figure: Figure, x: str, y: str, whole: bool = True) -> Axes:
    axes: Axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if whole:  # tasks and rounds are counted: no ticks between them
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return axes
