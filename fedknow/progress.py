"""What a person sees while an experiment runs: a live bar on a terminal, plain lines in a log."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.texts import counted
from fedknow.server.reports.measures import duration
from fedknow.server.run.schedule import Arrivals

__all__ = ["RunProgress"]

WINDOW = 12
"""Rounds whose pace the time left is told from: later tasks are slower, so only the latest count."""


class RunProgress:
    """Observer of one run's events, to be used as a context manager.

    On a terminal a bar shows task, round, accuracy so far and the time left; elsewhere each
    round and each evaluation is one line without control characters.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment, for the number of rounds to come.
    console : rich.console.Console
        Where to write.
    title : str
        Put before everything, to tell the runs of a comparison apart.
    """

    def __init__(
        self, config: ExperimentConfig, console: Console, title: str = ""
    ) -> None:
        self._tasks, self._rounds = config.data.tasks, f"/{config.train.rounds}"
        self._whole, self._measure = (
            float(config.data.tasks * config.train.rounds),
            "server_round",
        )
        if (
            arrivals := Arrivals.of(config)
        ) is not None:  # a task has as many rounds as go into its time
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
            self._row = self._bar.add_task(
                self._prefix("starting"), total=self._whole, left=""
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

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show one event of the experiment (see :mod:`fedknow.server.run.experiment`)."""
        handler = getattr(self, f"_on_{event['event']}", None)
        if (
            handler is not None
        ):  # an event that a later version adds is no reason to stop a run
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
                self._row,
                completed=done,
                description=self._prefix(f"{place} {self._accuracy}"),
                left=left,
            )
            return
        parts = []
        if event.get("loss") is not None:
            parts.append(f"loss {event['loss']:.3f}")
        if (
            event.get("accuracy") is not None
        ):  # on what was trained on; evaluations tell of the rest
            parts.append(f"training accuracy {100 * event['accuracy']:.1f} %")
        parts += [counted(event["clients"], "client"), f"{event['seconds']:.1f} s"]
        self._say(event, f"{place}: {', '.join(parts)}{f'; {left}' if left else ''}")

    def _on_evaluation(self, event: Mapping[str, Any]) -> None:
        self._accuracy = f"accuracy {100 * event['accuracy']:.1f} %"
        text = f"task {event['task'] + 1}/{self._tasks} after round {event['round']}{self._rounds}: {self._accuracy}"
        for key, name in (
            ("accuracy_global", "global model"),
            ("forgetting", "forgetting"),
        ):
            value = event.get(key)
            if value is not None:
                text += f", {name} {100 * value:.1f} %"
        self._say(event, text)

    def _on_failure(self, event: Mapping[str, Any]) -> None:
        self._say(event, f"failed: {_details(event)}", "red")

    def _on_forgotten(self, event: Mapping[str, Any]) -> None:
        self._say(event, _details(event), "yellow")

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
            self._console.print(
                escape(line), style=style, highlight=False, soft_wrap=True
            )

    def _prefix(self, text: str) -> str:
        return f"{self._title}: {text}" if self._title else text


def _details(event: Mapping[str, Any]) -> str:
    """A failure's or warning's sentence, or all its fields where it has none."""
    for key in ("message", "reason"):
        if key in event:
            return str(event[key])
    return ", ".join(
        f"{key} {value}" for key, value in event.items() if key not in ("event", "time")
    )
