"""Events that only some streams of data have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedknow.server.run.event_base import Event

__all__ = ["BoundaryFound", "PeopleScored"]


@dataclass(frozen=True, kw_only=True)
class PeopleScored(Event):
    """The global model was scored on people who are no clients.

    Attributes
    ----------
    task : int
        After which task.
    people : sequence of str
        Their names.
    accuracy : float
        Average accuracy on all tasks so far, as that of clients
        (:func:`~fedknow.server.run.metrics.average_accuracy`).
    per_person, per_task : sequence of float
        Average accuracy of each person, and accuracy on each task so far; NaN without samples.
    seconds : float
    """

    event: ClassVar[str] = "people"

    task: int
    people: tuple[str, ...]
    accuracy: float
    per_person: tuple[float, ...]
    per_task: tuple[float, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class BoundaryFound(Event):
    """A client's detector found that a new task began (``data.boundaries``).

    Attributes
    ----------
    client : int
    task, round : int
        Task of the stream, and round in it, in which the client found it.
    boundaries : int
        Boundaries that this client has found so far.
    delay : int
        Samples of the round that it took.
    """

    event: ClassVar[str] = "boundary"

    client: int
    task: int
    round: int
    boundaries: int
    delay: int
