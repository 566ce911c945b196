"""The progress of an experiment: a live bar on a terminal, lines in a log."""

from __future__ import annotations

import math
from collections import deque
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.texts import counted
from fedknow.server.reports.measures import duration
from fedknow.server.run.events import (
    ClientBegunAnew,
    ClientFailed,
    Evaluated,
    Event,
    RoundEnded,
    RunInterrupted,
    RunStarted,
    Warned,
)
from fedknow.server.run.task_times import TaskTimes, has_task_times

__all__ = ["RunProgress"]

WINDOW = 12
"""Rounds whose pace predicts the remaining time.

Later tasks are slower, so only the latest rounds count.
"""


class RunProgress:
    """Subscriber to one run's events, to be used as a context manager.

    On a terminal a bar shows task, round, accuracy and the remaining time. Elsewhere each
    round and each evaluation is one line without control characters.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment, for the number of rounds to come.
    console : rich.console.Console
        The terminal or file to write to.
    title : str
        Stands before every text; it names one of several runs.
    """

    def __init__(
        self, config: ExperimentConfig, console: Console, title: str = ""
    ) -> None:
        self._tasks = config.data.tasks
        self._rounds = f"/{config.train.rounds}"
        self._total = float(config.data.tasks * config.train.rounds)
        self._is_timed = False
        if has_task_times(config):
            # A task lasts a time, so its number of rounds is not known before.
            times = TaskTimes.plan(config)
            self._rounds = ""
            self._total = float(times.ends.max())
            self._is_timed = times.is_in_seconds
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
                TextColumn("{task.percentage:.0f} % {task.fields[remaining]}"),
                console=console,
                # The bar vanishes at the end; the lines above it stay.
                transient=True,
                expand=True,
            )
            self._row = self._bar.add_task(
                self._prefix("starting"), total=self._total, remaining=""
            )

    def __enter__(self) -> RunProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Show one event of the experiment."""
        match event:
            case RunStarted():
                self._show_start(event)
            case RoundEnded():
                self._show_round(event)
            case Evaluated():
                self._show_evaluation(event)
            case ClientFailed():
                self._say(event, f"failed: {event.reason}", "red")
            case ClientBegunAnew():
                self._say(event, event.reason, "yellow")
            case Warned():
                self._say(event, f"warning: {event.reason}", "yellow")
            case RunInterrupted():
                self._say(event, "interrupted", "yellow")

    def _show_start(self, event: RunStarted) -> None:
        self._started = event.time
        if event.resumed_from:
            self._say(event, f"resumed after round {event.resumed_from}")

    def _show_round(self, event: RoundEnded) -> None:
        # With tasks of a certain time the last round may end after the end of the run.
        position = min(self._position(event), self._total)
        self._pace.append((position, event.time))
        remaining = self._remaining(position)
        place = f"task {event.task + 1}/{self._tasks} round {event.round}{self._rounds}"
        if self._bar is not None:
            self._bar.update(
                self._row,
                completed=position,
                description=self._prefix(f"{place} {self._accuracy}"),
                remaining=remaining,
            )
            return
        parts = []
        # Strategies need not aggregate a loss.
        if not math.isnan(event.loss):
            parts.append(f"loss {event.loss:.3f}")
        # On the training samples; evaluations show the accuracy on test samples.
        if not math.isnan(event.accuracy):
            parts.append(f"training accuracy {100 * event.accuracy:.1f} %")
        parts.append(counted(event.clients, "client"))
        parts.append(f"{event.seconds:.1f} s")
        if remaining:
            parts[-1] += f"; {remaining}"
        self._say(event, f"{place}: {', '.join(parts)}")

    def _show_evaluation(self, event: Evaluated) -> None:
        self._accuracy = f"accuracy {100 * event.accuracy:.1f} %"
        place = f"task {event.task + 1}/{self._tasks}"
        text = f"{place} after round {event.round}{self._rounds}: {self._accuracy}"
        for name, value in (
            ("global model", event.accuracy_global),
            ("forgetting", event.forgetting),
        ):
            if not math.isnan(value):
                text += f", {name} {100 * value:.1f} %"
        self._say(event, text)

    def _position(self, event: RoundEnded) -> float:
        """Return how far the run is, in rounds or in virtual seconds."""
        if not self._is_timed or event.elapsed is None:
            return float(event.server_round)
        return event.elapsed.virtual_seconds

    def _remaining(self, position: float) -> str:
        """Estimate the time left from the pace of the latest rounds."""
        start, start_time = self._pace[0]
        end, end_time = self._pace[-1]
        if end == start:
            return ""
        # Evaluations between these rounds count too, as they will between later ones.
        pace = (end_time - start_time) / (end - start)
        return f"about {duration(pace * (self._total - position))} left"

    def _say(self, event: Event, text: str, style: str = "") -> None:
        seconds = event.time - self._started
        # An event before the start has no time to count from.
        if math.isnan(seconds):
            seconds = 0.0
        line = self._prefix(f"[{seconds:7.1f} s] {text}")
        # In a log an event stays one line, however narrow the log.
        is_log = self._bar is None
        self._console.print(
            escape(line), style=style, highlight=False, soft_wrap=is_log
        )

    def _prefix(self, text: str) -> str:
        return f"{self._title}: {text}" if self._title else text
