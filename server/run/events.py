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
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, Self

__all__ = [
    "KINDS",
    "ClientBegunAnew",
    "ClientFailed",
    "Evaluated",
    "Event",
    "OtherEvent",
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

_NULL = {"is_null_said": True}
"""Metadata of a field whose ``None`` is written as ``null``: it is an answer, not silence."""


@dataclass(frozen=True)
class VirtualTime:
    """Virtual time since the run began, where clients have devices.

    Attributes
    ----------
    virtual_seconds : float
        The sum of the next three.
    communication_seconds, computing_seconds : float
        In which the server waited for messages under way, or for clients that computed.
    waiting_seconds : float or None
        In which it waited for clients to come back, a deadline or the next task.
    energy_joules : float
        Energy that all clients have used.
    """

    virtual_seconds: float
    communication_seconds: float
    computing_seconds: float
    waiting_seconds: float | None = None
    energy_joules: float | None = None

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> Self | None:
        """Read the virtual time from an event's values; ``None`` without one."""
        if "virtual_seconds" not in line:
            return None
        return cls(**_values(cls, line))

    def written(self) -> dict[str, Any]:
        """Give the values by their names in a line."""
        return _said(self)


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened in a run.

    Attributes
    ----------
    event : str
        The kind, as the line names it.
    time : float
        Seconds since 1970; set when it is recorded.
    """

    event: ClassVar[str]

    time: float = field(default=math.nan, compare=False)

    def line(self) -> dict[str, Any]:
        """Give the values of the event's line, in their order."""
        return {"event": self.event, **_said(self)}

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> Self:
        """Undo :meth:`line`; what later versions may add is left out."""
        return cls(**_values(cls, line))


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
    resumed_from: int | None = field(default=None, metadata=_NULL)
    versions: Mapping[str, str] = field(default_factory=dict)


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
    traffic : mapping
        Of the run so far.
    peak_memory_mb : float
        Of the run so far; all processes' own peaks added up.
    client_memory_bytes : float or None
        Most memory that any client's work has needed so far, as clients count it.
    flops : float or None
        Counted operations of the clients' training.
    failures : int
        Replies that could not be used.
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

    task: int | None = field(default=None, metadata=_NULL)
    round: int | None = field(default=None, metadata=_NULL)


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


@dataclass(frozen=True, kw_only=True)
class OtherEvent(Event):
    """An event of a kind that this version does not know.

    Attributes
    ----------
    values : mapping
        The whole line.
    """

    event: ClassVar[str] = ""

    values: Mapping[str, Any]

    def line(self) -> dict[str, Any]:
        """Give the line as it was read."""
        return dict(self.values)


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
    kind = KINDS.get(line["event"])
    if kind is None:
        return OtherEvent(time=line.get("time", math.nan), values=line)
    try:
        return kind.read(line)
    except TypeError:
        missing = [
            each.name
            for each in fields(kind)
            if each.name not in line and _is_required(each)
        ]
        raise ValueError(
            f"an event {line['event']!r} without {', '.join(missing)}"
        ) from None


def _is_required(declared: Field[Any]) -> bool:
    return declared.default is MISSING and declared.default_factory is MISSING


def _said(record: Event | VirtualTime) -> dict[str, Any]:
    """Give a record's values by name, without those that it does not say."""
    values: dict[str, Any] = {}
    for declared in fields(record):
        value = getattr(record, declared.name)
        if isinstance(value, VirtualTime):
            values |= value.written()
        elif value is not None or declared.metadata:
            values[declared.name] = _plain(value)
    return values


def _plain(value: Any) -> Any:
    """Make a value one that JSON knows, but not inside of mappings."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _values(kind: type[Event] | type[VirtualTime], line: Mapping[str, Any]) -> Any:
    """Find the arguments of a record's constructor among a line's values."""
    values: dict[str, Any] = {}
    for declared in fields(kind):
        if declared.name == "elapsed":
            values["elapsed"] = VirtualTime.read(line)
        elif declared.name in line:
            values[declared.name] = _read(line[declared.name], declared)
    return values


def _read(value: Any, declared: Field[Any]) -> Any:
    """Make a value of JSON what it was; ``null`` was no finite number."""
    if value is None:
        return None if declared.metadata else math.nan
    if isinstance(value, list):
        return tuple(math.nan if item is None else item for item in value)
    return value
