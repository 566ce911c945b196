"""The base of all events: how one becomes a line, and a line an event."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, Self

__all__ = ["NULL", "Event", "OtherEvent", "VirtualTime", "is_required"]

NULL = {"is_null_said": True}
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
        # Clients without devices have no virtual time.
        if "virtual_seconds" not in line:
            return None
        return cls(**_values(cls, line))

    def written(self) -> dict[str, Any]:
        """Give the values by their names in a line."""
        return _written_values(self)


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
        return {"event": self.event, **_written_values(self)}

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> Self:
        """Undo :meth:`line`; what later versions may add is left out."""
        return cls(**_values(cls, line))


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


def is_required(declared: Field[Any]) -> bool:
    """Say whether lines of an event always have a field."""
    return declared.default is MISSING and declared.default_factory is MISSING


def _written_values(record: Event | VirtualTime) -> dict[str, Any]:
    """Give a record's values by name, without those that it does not say."""
    values: dict[str, Any] = {}
    for declared in fields(record):
        value = getattr(record, declared.name)
        if isinstance(value, VirtualTime):
            values |= value.written()
        # `None` is left out, unless it is an answer: then the field has metadata.
        elif value is not None or declared.metadata:
            values[declared.name] = _to_json(value)
    return values


def _to_json(value: Any) -> Any:
    """Make a value one that JSON knows, but not inside of mappings."""
    if isinstance(value, float):
        # JSON has neither NaN nor infinity.
        return float(value) if math.isfinite(value) else None
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return value


def _values(
    kind: type[Event] | type[VirtualTime], line: Mapping[str, Any]
) -> Any:
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
