"""From events to numbers with a name and a step.

A name is the event's kind and the field (:mod:`fedknow.server.run.events`): ``round/loss``,
``evaluation/accuracy``, ``end/forgetting``. What has parts is spelled out:

* ``evaluation/per_task/1``, ``/2``, ...: accuracy on each task so far, counted from 1;
* ``round/traffic/up``, ``/down``, ``/messages``: sums over all kinds of messages;
* ``round/metrics/NAME``: what the strategy aggregated;
* ``round/virtual_seconds``, ``round/energy_joules``, ...: where clients have devices.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from fedknow.server.run.events import (
    Evaluated,
    Event,
    PeopleScored,
    RoundEnded,
    RunEnded,
    RunStarted,
    TaskEnded,
    VirtualTime,
)

__all__ = ["RunNumbers"]

# The step says it already, or every tracker does.
_PLACES = frozenset({"task", "round", "server_round", "time", "people"})
NUMBERED = (RoundEnded, Evaluated, PeopleScored, TaskEnded, RunEnded)
"""Events that have numbers to be drawn."""


class RunNumbers:
    """Turns the events of one run into numbers, in their order.

    Attributes
    ----------
    step : int
        Rounds so far.
    """

    def __init__(self) -> None:
        self.step = 0

    def read(self, event: Event) -> dict[str, float]:
        """Return an event's numbers by name; empty where it has none.

        Those that are not finite were not measured, and are left out.
        """
        if isinstance(event, RunStarted):
            self.step = event.resumed_from or 0
        if isinstance(event, RoundEnded):
            self.step = event.server_round
        if not isinstance(event, NUMBERED):
            return {}
        numbers = {}
        for declared in fields(event):
            if declared.name in _PLACES:
                continue
            for name, value in _numbers(
                declared.name, getattr(event, declared.name)
            ):
                if math.isfinite(value):
                    numbers[f"{event.event}/{name}"] = float(value)
        return numbers


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield the numbers of one field."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield name, value
    elif isinstance(value, VirtualTime):
        yield from _of_mapping("", value.written())
    elif name == "traffic" and isinstance(value, Mapping):
        total: Counter[str] = Counter()
        for counts in value.values():
            total.update(counts)
        yield from _of_mapping("traffic/", total)
    elif isinstance(value, Mapping):
        yield from _of_mapping(f"{name}/", value)
    elif isinstance(value, tuple):
        for number, item in enumerate(value, start=1):
            yield f"{name}/{number}", item


def _of_mapping(
    prefix: str, values: Mapping[str, Any]
) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        # A strategy may aggregate lists too, which no tracker draws.
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value
