"""What a person sees while an experiment runs and when it ends: a live bar on a terminal, plain lines in a log."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from fedknow.protocols.config import ExperimentConfig
from fedknow.server.arrivals import Arrivals
from fedknow.server.reports.groups import Group, interval_note, ranked
from fedknow.server.reports.measures import MEASURES, duration, known, size
from fedknow.server.reports.summary import Summary

if TYPE_CHECKING:
    from fedknow.simulations.search import Found

__all__ = ["RunProgress", "comparison_table", "found_table", "result_tables"]

WINDOW = 12
"""Rounds whose pace the time left is told from: later tasks are slower, so only the latest count."""


class RunProgress:
    """Observer of one run's events, to be used as a context manager.

    On a terminal a bar shows task, round, accuracy so far and the time left; elsewhere each round and each
    evaluation is one line without control characters.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment, for the number of rounds to come.
    console : rich.console.Console
        Where to write.
    title : str
        Put before everything, to tell the runs of a comparison apart.
    """

    def __init__(self, config: ExperimentConfig, console: Console, title: str = "") -> None:
        self._tasks, self._rounds = config.data.tasks, f"/{config.train.rounds}"
        self._whole, self._measure = float(config.data.tasks * config.train.rounds), "server_round"
        if (arrivals := Arrivals.of(config)) is not None:  # a task has as many rounds as go into its time
            self._rounds, self._whole = "", float(arrivals.ends.max())
            self._measure = "virtual_seconds" if arrivals.seconds else "server_round"
        self._console = console
        self._title = title
        self._started = math.nan
        self._pace: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._accuracy = ""
        self._bar: Progress | None = None
        self._row = TaskID(0)
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:.0f} % {task.fields[left]}"),
                console=console,
                transient=True,
                expand=True,
            )
            self._row = self._bar.add_task(self._prefix("starting"), total=self._whole, left="")

    def __enter__(self) -> RunProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show one event of the experiment (see :mod:`fedknow.server.experiment`)."""
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:  # an event that a later version adds is no reason to stop a run
            handler(event)

    def _on_start(self, event: Mapping[str, Any]) -> None:
        self._started = event["time"]
        if event.get("resumed_from"):
            self._say(event, f"resumed after round {event['resumed_from']}")

    def _on_round(self, event: Mapping[str, Any]) -> None:
        done = min(float(event[self._measure]), self._whole)
        self._pace.append((done, event["time"]))
        left = self._left(done)
        place = f"task {event['task'] + 1}/{self._tasks} round {event['round']}{self._rounds}"
        if self._bar is not None:
            self._bar.update(
                self._row, completed=done, description=self._prefix(f"{place} {self._accuracy}"), left=left
            )
            return
        parts = [f"{name} {_number(event.get(name))}" for name in ("loss", "accuracy") if event.get(name) is not None]
        parts += [f"{event['clients']} clients", f"{event['seconds']:.1f} s"]
        self._say(event, f"{place}: {', '.join(parts)}{f'; {left}' if left else ''}")

    def _on_evaluation(self, event: Mapping[str, Any]) -> None:
        self._accuracy = f"accuracy {100 * event['accuracy']:.1f} %"
        text = f"task {event['task'] + 1}/{self._tasks} after round {event['round']}{self._rounds}: {self._accuracy}"
        for key, name in (("accuracy_global", "global model"), ("forgetting", "forgetting")):
            value = event.get(key)
            if value is not None:
                text += f", {name} {100 * value:.1f} %"
        self._say(event, text)

    def _on_failure(self, event: Mapping[str, Any]) -> None:
        self._say(event, f"failed: {_details(event)}", "red")

    def _on_warning(self, event: Mapping[str, Any]) -> None:
        self._say(event, f"warning: {_details(event)}", "yellow")

    def _on_interrupted(self, event: Mapping[str, Any]) -> None:
        self._say(event, "interrupted", "yellow")

    def _left(self, done: float) -> str:
        """Time left from the pace of the latest rounds, evaluations between them included."""
        (first, since), (last, now) = self._pace[0], self._pace[-1]
        if last == first:
            return ""
        return f"about {duration((now - since) / (last - first) * (self._whole - done))} left"

    def _say(self, event: Mapping[str, Any], text: str, style: str = "") -> None:
        clock = event["time"] - self._started
        line = self._prefix(f"[{0.0 if math.isnan(clock) else clock:7.1f} s] {text}")
        if self._bar is not None:
            self._console.print(escape(line), style=style, highlight=False)
        else:  # a log line is one line, however narrow the log
            self._console.print(escape(line), style=style, highlight=False, soft_wrap=True)

    def _prefix(self, text: str) -> str:
        return f"{self._title}: {text}" if self._title else text


def result_tables(run: Summary) -> list[Table]:
    """A finished (or interrupted) run as two tables: task by task, and over all tasks."""
    tasks = Table(title=f"{_name(run)}, seed {run.config.seed}: accuracy on each task", title_justify="left")
    tasks.add_column("task", justify="right")
    scorings = [("personal", run.personal)] + ([("global", run.global_model)] if run.global_model else [])
    for scoring_name, _ in scorings:
        for name in ("learned", "now", "forgotten"):
            tasks.add_column(f"{scoring_name}\n{name}", justify="right")
    for task in range(run.tasks):
        cells = [str(task + 1)]
        for _, scoring in scorings:
            learned, now = scoring.learned[task], scoring.now[task]
            cells += [_percent(learned), _percent(now), _percent(learned - now) if task < run.tasks - 1 else "–"]
        tasks.add_row(*cells)

    overall = Table(
        title=f"After {run.tasks} of {run.config.data.tasks} tasks", show_header=False, title_justify="left"
    )
    overall.add_column()
    overall.add_column(justify="right")
    values = run.measures()
    for measure in known([values]):
        overall.add_row(measure.title, measure.text(values[measure.key]))
    for kind, count in sorted(run.traffic.items()):
        overall.add_row(f"Bytes, {kind}", f"{size(count['down'])} down, {size(count['up'])} up")
    return [tasks, overall]


def comparison_table(groups: list[Group]) -> Table:
    """One line a method, the most accurate first: mean and 95 % interval over seeds; 100 columns are enough."""
    fewest = min(len(group.runs) for group in groups)
    caption = interval_note(groups)
    measures = [m for m in known(run.measures() for group in groups for run in group.runs) if m.short]
    table = Table(title="Comparison", caption=caption, title_justify="left", box=SIMPLE_HEAD, padding=0)
    # Names are what a line is found by: they keep their width where numbers, which a page and a file have too, do not.
    longest = max((len(group.label) for group in groups), default=0)
    table.add_column("", overflow="fold", min_width=min(longest, 16))
    for measure in measures:
        table.add_column(f"{measure.short}\n{'%' if measure.percent else ''}", justify="right", no_wrap=True)
    for group in ranked(groups):
        cells = [
            point.text(measure, unit=False) if measure.percent else measure.text(point.mean)
            for measure, point in ((measure, group.estimate(measure.key)) for measure in measures)
        ]
        seeds = "" if len(group.runs) == fewest else f" ({len(group.runs)} seeds)"
        table.add_row(f"{group.label}{seeds}", *cells)
    return table


def found_table(found: Mapping[str, Found]) -> Table:
    """One line a learner: what a search of settings found."""
    table = Table(title="Best settings, on held-out training samples", title_justify="left", box=SIMPLE_HEAD)
    for name in ("", "accuracy\n%", "with defaults\n%", "forgotten\n%", "runs"):
        table.add_column(name, justify="right" if name else "left")
    table.add_column("settings")
    for name, best in found.items():
        numbers = [MEASURES[0].text(value, unit=False) for value in (best.accuracy, best.default, best.forgetting)]
        settings = ", ".join(f"{key}={value}" for key, value in best.settings.items()) or "–"
        table.add_row(name, *numbers, str(best.runs), settings)
    return table


def _name(run: Summary) -> str:
    return f"{run.config.name}, {run.config.learner.name} with {run.config.strategy.name}"


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f} %"


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _details(event: Mapping[str, Any]) -> str:
    """A failure's or warning's sentence, or all its fields where it has none."""
    for key in ("message", "reason"):
        if key in event:
            return str(event[key])
    return ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("event", "time"))
