"""Events: what an experiment tells of itself, one dataclass a kind.

An event becomes one line of ``metrics.jsonl``: its kind under ``event``, the ``time`` (seconds
since 1970), its fields in the order in which they are declared here, and a checksum (``crc32``)
of it and of all lines before. :func:`parse` makes an event of such a line again.

Tasks and clients count from 0, rounds from 1. Two values look alike and are not:

* ``nan`` was not measured, and is ``null`` in the line;
* ``None`` was not said, by an earlier version for example, and is absent from the line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from fedknow.server.run.event_base import (
    NULL,
    Event,
    OtherEvent,
    VirtualTime,
    is_required,
)
from fedknow.server.run.membership_events import MembershipChanged
from fedknow.server.run.stream_events import BoundaryFound, PeopleScored

__all__ = [
    "KINDS",
    "BoundaryFound",
    "ClientBegunAnew",
    "ClientFailed",
    "Evaluated",
    "Event",
    "MembershipChanged",
    "OtherEvent",
    "PeopleScored",
    "RoundEnded",
    "RunEnded",
    "RunInterrupted",
    "RunStarted",
    "TaskEnded",
    "VirtualTime",
    "Warned",
    "parse",
]

Traffic = Mapping[str, Mapping[str, int]]
"""Bytes ``up`` and ``down`` and ``messages``, by kind of message."""


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """A run began, or was resumed.

    Attributes
    ----------
    clients, tasks, rounds : int
        Of the experiment; rounds of a task.
    travelling, bytes : int
        Number of parameters that clients and server exchange, and their size.
    learner, strategy : str
        Their names.
    partition : str
        Digest of which client holds what.
    resumed_from : int or None
        Rounds that were done before; ``None`` if it begins.
    versions : mapping
        Versions of what is installed where the experiment runs.
    attack : str or None
        Name of the attack that is simulated; ``None``: nobody attacks.
    hostile : sequence of int or None
        The hostile clients.
    """

    event: ClassVar[str] = "start"

    clients: int
    tasks: int
    rounds: int
    travelling: int
    bytes: int
    learner: str
    strategy: str
    partition: str
    resumed_from: int | None = field(default=None, metadata=NULL)
    versions: Mapping[str, str] = field(default_factory=dict)
    attack: str | None = None
    hostile: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class RoundEnded(Event):
    """Clients trained for a round, and the strategy aggregated.

    Attributes
    ----------
    task, round, server_round : int
        The round's number in the task and in the run.
    clients : int
        Good replies.
    loss, accuracy : float
        Means over these clients.
    samples : float or None
        Samples that went forward to be learned from, all clients together.
    metrics : mapping
        What the strategy aggregated.
    seconds : float
    traffic, peak_memory_mb : mapping, float
        Of the run so far; memory is all processes' own peaks added up.
    client_memory_bytes : float or None
        Most memory that any client's work has needed so far, as clients count it.
    flops : float or None
        Counted operations of the clients' training.
    failures : int
        Unusable replies.
    epsilon : float or None
        Of each client so far, for ``privacy.delta``; ``None`` without noise.
    elapsed : VirtualTime or None
    """

    event: ClassVar[str] = "round"

    task: int
    round: int
    server_round: int
    clients: int
    loss: float
    accuracy: float
    samples: float | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    seconds: float
    traffic: Traffic
    peak_memory_mb: float | None = None
    client_memory_bytes: float | None = None
    flops: float | None = None
    failures: int = 0
    epsilon: float | None = None
    elapsed: VirtualTime | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """Clients were scored on their test samples.

    Attributes
    ----------
    task, round : int
        After which round.
    accuracy, accuracy_global : float
        Average accuracy with what clients keep to themselves, and of the global model alone.
    accuracy_median, accuracy_trimmed : float or None
        Median over clients, and mean without a fifth of them at either end.
    accuracy_margin : float or None
        Half the 95 % interval of ``accuracy`` where a sample of clients was scored
        (``evaluation.clients``).
    is_claimed : bool or None
        Whether clients alone say how large their test sets are.
    forgetting : float
        Absolute forgetting.
    per_task : sequence of float
        Accuracy on each task so far.
    metrics : mapping
        What the strategy aggregated of an evaluation of its own.
    seconds : float
    elapsed : VirtualTime or None
    """

    event: ClassVar[str] = "evaluation"

    task: int
    round: int
    accuracy: float
    accuracy_global: float
    accuracy_median: float | None = None
    accuracy_trimmed: float | None = None
    accuracy_margin: float | None = None
    is_claimed: bool | None = None
    forgetting: float
    per_task: tuple[float, ...]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    seconds: float
    elapsed: VirtualTime | None = None


@dataclass(frozen=True, kw_only=True)
class TaskEnded(Event):
    """A task is over for all clients.

    Attributes
    ----------
    task : int
    knowledge_bytes : float
        Mean size of what a client keeps of its tasks.
    server_bytes : float or None
        Size of what the server's half of the method keeps of past tasks and of clients' data.
    client_memory_bytes : float or None
        As in :class:`RoundEnded`.
    samples, flops : float or None
        Of ending the task: what methods do then, and the training of clients that were never
        chosen in it.
    seconds : float
        Since the last such event.
    elapsed : VirtualTime or None
    """

    event: ClassVar[str] = "task_end"

    task: int
    knowledge_bytes: float
    server_bytes: float | None = None
    client_memory_bytes: float | None = None
    samples: float | None = None
    flops: float | None = None
    seconds: float
    elapsed: VirtualTime | None = None


@dataclass(frozen=True, kw_only=True)
class ClientFailed(Event):
    """A client's answer could not be used.

    Attributes
    ----------
    fault : str
        Name of a :class:`~fedknow.server.checks.faults.Fault`, in small letters.
    client, task, round : int
    kind : str
        Kind of the message that it answered.
    tensor : str
        Name of the tensor or metric at fault, where it is one.
    reason : str
        A sentence.
    """

    event: ClassVar[str] = "failure"

    fault: str
    client: int
    task: int
    round: int
    kind: str
    tensor: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """Something went on that the user should hear of.

    Attributes
    ----------
    task, round : int or None
        Where it belongs to a round.
    clients : sequence of int or None
        Clients that a wave of work went on without.
    reason : str
        A sentence.
    """

    event: ClassVar[str] = "warning"

    task: int | None = None
    round: int | None = None
    clients: tuple[int, ...] | None = None
    reason: str


@dataclass(frozen=True, kw_only=True)
class ClientBegunAnew(Event):
    """A client lost its state and begins anew.

    Attributes
    ----------
    client, task, round : int
    reason : str
        A sentence.
    """

    event: ClassVar[str] = "forgotten"

    client: int
    task: int
    round: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class RunInterrupted(Event):
    """The user interrupted the run.

    Attributes
    ----------
    task, round : int or None
        The last complete round; ``None`` if there is none.
    """

    event: ClassVar[str] = "interrupted"

    task: int | None = field(default=None, metadata=NULL)
    round: int | None = field(default=None, metadata=NULL)


@dataclass(frozen=True, kw_only=True)
class RunEnded(Event):
    """The run came to its end, with these metrics.

    :mod:`fedknow.server.run.metrics` defines them.

    Attributes
    ----------
    seconds : float
        All sessions of the run together.
    accuracy, accuracy_global, forgetting, forgetting_relative, forgetting_max : float
    backward_transfer, forward_transfer, gap : float
    traffic : mapping
    elapsed : VirtualTime or None
    """

    event: ClassVar[str] = "end"

    seconds: float
    accuracy: float
    accuracy_global: float
    forgetting: float
    forgetting_relative: float
    forgetting_max: float
    backward_transfer: float
    forward_transfer: float
    gap: float
    traffic: Traffic
    elapsed: VirtualTime | None = None


KINDS: dict[str, type[Event]] = {
    kind.event: kind
    for kind in (
        RunStarted,
        RoundEnded,
        Evaluated,
        TaskEnded,
        ClientFailed,
        Warned,
        ClientBegunAnew,
        MembershipChanged,
        PeopleScored,
        BoundaryFound,
        RunInterrupted,
        RunEnded,
    )
}
"""All events by the names that lines give them."""


def parse(line: Mapping[str, Any]) -> Event:
    """Make an event of one line of ``metrics.jsonl``.

    Parameters
    ----------
    line : mapping
        One of :meth:`fedknow.server.run.folder.RunFolder.events`.

    Returns
    -------
    Event
        :class:`OtherEvent` where this version does not know the kind.

    Raises
    ------
    ValueError
        If the line lacks something that its kind always has.
    """
    # A later version may write kinds that this one does not know, and they must not stop a
    # reader.
    kind = KINDS.get(line["event"])
    if kind is None:
        return OtherEvent(time=line.get("time", math.nan), values=line)
    try:
        return kind.read(line)
    # A constructor's text names Python arguments; the fields of the line are what a user can
    # look for.
    except TypeError:
        missing = [
            each.name
            for each in fields(kind)
            if each.name not in line and is_required(each)
        ]
        raise ValueError(
            f"an event {line['event']!r} without {', '.join(missing)}"
        ) from None
