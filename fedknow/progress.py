"""The progress of an experiment: a live bar on a terminal, lines in a log."""

from __future__ import annotations

import math
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.texts import counted
from fedknow.server.reports.measures import duration
from fedknow.server.run.events import (
    BoundaryFound,
    ClientBegunAnew,
    ClientFailed,
    Evaluated,
    Event,
    MembershipChanged,
    PeopleScored,
    RoundEnded,
    RunInterrupted,
    RunStarted,
    Warned,
)
from fedknow.server.run.pace import Pace

__all__ = ["RunProgress"]


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
        self,
        config: ExperimentConfig,
        console: Console,
        title: str = "",
    ) -> None:
        self._tasks = config.data.tasks
        self._pace = Pace(config)
        self._rounds = f"/{self._pace.rounds}" if self._pace.rounds else ""
        self._console = console
        self._title = title
        self._started = math.nan
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
                self._prefix("starting"), total=self._pace.total, remaining=""
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
            case BoundaryFound():
                self._say(
                    event,
                    f"client {event.client} found boundary {event.boundaries} "
                    f"in task {event.task + 1}, round {event.round}",
                )
            case PeopleScored():
                self._say(event, _people_text(event))
            case ClientFailed():
                self._say(event, f"failed: {event.reason}", "red")
            case ClientBegunAnew() | MembershipChanged():
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
        virtual = None if event.elapsed is None else event.elapsed.virtual_seconds
        self._pace.add(event.server_round, virtual, event.time)
        remaining = self._remaining()
        place = f"task {event.task + 1}/{self._tasks} round {event.round}{self._rounds}"
        if self._bar is not None:
            self._bar.update(
                self._row,
                completed=self._pace.position,
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
        text = (
            f"{place} after round {event.round}{self._rounds}: {self._accuracy}"
        )
        for name, value in (
            ("global model", event.accuracy_global),
            ("forgetting", event.forgetting),
        ):
            if not math.isnan(value):
                text += f", {name} {100 * value:.1f} %"
        if event.is_claimed and event.accuracy_median is not None:
            # One client's claim moves a mean as far as it likes, and the median hardly.
            text += (
                f", median {100 * event.accuracy_median:.1f} % (as clients claim)"
            )
        self._say(event, text)

    def _remaining(self) -> str:
        """Say how much time is left, where there is a pace to tell it by."""
        seconds = self._pace.seconds_left()
        return "" if math.isnan(seconds) else f"about {duration(seconds)} left"

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


def _people_text(event: PeopleScored) -> str:
    people = counted(len(event.people), "person held out", "people held out")
    return f"{people}: accuracy {100 * event.accuracy:.1f} % of the global model"
