"""Messages on their way to Ray workers and back: shared arrays, packed answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedknow.protocols.messages import Arrays, Mean, Message, Record

__all__ = [
    "Answered",
    "Job",
    "Packed",
    "Shared",
    "detached",
    "pack",
    "share",
    "unpack",
    "unshare",
]


@dataclass
class Job:
    """All the work of a wave for one client, in order, and the version of the state it starts from."""

    client: int
    version: int
    work: list[Message] = field(default_factory=list)
    deaths: int = 0
    """Workers that died on it."""


@dataclass(frozen=True)
class Shared:
    """Stands in a message for arrays that many messages of a wave carry and that travel once:
    their place in a list."""

    place: int


def share(jobs: Sequence[Job]) -> tuple[list[Job], list[Arrays]]:
    """Take arrays that more than one message carries (the same object) out of the messages.

    Returns
    -------
    tuple
        The jobs with :class:`Shared` in the arrays' stead, and the arrays.
    """
    counts: dict[int, int] = {}
    for message in (message for job in jobs for message in job.work):
        for record in message.content.values():
            # By identity: to compare the arrays would take longer than to send them.
            counts[id(record)] = counts.get(id(record), 0) + 1
    places: dict[int, Shared] = {}
    arrays: list[Arrays] = []

    def light(record: Record) -> Record | Shared:
        if not isinstance(record, Arrays) or counts[id(record)] == 1:
            return record
        if id(record) not in places:
            places[id(record)] = Shared(len(arrays))
            arrays.append(record)
        return places[id(record)]

    def strip(message: Message) -> Message:
        return _with(
            message, {name: light(record) for name, record in message.content.items()}
        )

    return [
        replace(job, work=[strip(message) for message in job.work]) for job in jobs
    ], arrays


def unshare(message: Message, arrays: Sequence[Arrays]) -> Message:
    """Put the arrays that :func:`share` took out back into a message."""
    content: Mapping[str, Record | Shared] = message.content
    return _with(
        message,
        {
            name: arrays[r.place] if isinstance(r, Shared) else r
            for name, r in content.items()
        },
    )


_Layout = tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]
_ALIGNMENT = 64
"""Bytes; what vector instructions and torch like best."""
_LARGE = 2**16
"""Bytes of an array from which on pickle's cost for it is less than that of one more copy."""


@dataclass(frozen=True)
class Packed:
    """Stands in an answer for arrays that lie in its batch's buffer: from where on, and what they
    are, in order."""

    start: int
    layout: _Layout


@dataclass(frozen=True)
class Answered:
    """What a worker gives back for a batch.

    Attributes
    ----------
    answers : list of (Message, int)
        An answer to each message, in order, as :func:`pack` leaves it, and the version of the
        client's state after it.
    arrays : ndarray
        uint8: what it took out.
    seconds : float
        How long the work took.
    peak_memory_mb : float
        Largest resident memory of the worker's process so far, MB.
    """

    answers: list[tuple[Message, int]]
    arrays: np.ndarray
    seconds: float
    peak_memory_mb: float


def pack(messages: Sequence[Message]) -> tuple[list[Message], np.ndarray]:
    """Put arrays of messages one after the other, so that they travel as one and not tensor by tensor.

    Records of large arrays are left as they are: Ray writes each of those into its store
    without a copy before.

    Returns
    -------
    tuple
        The messages with :class:`Packed` in the arrays' stead, and the bytes of the arrays (uint8).
    """
    size = 0
    todo: list[tuple[int, np.ndarray]] = []
    layouts: dict[
        _Layout, _Layout
    ] = {}  # one object for all messages, which pickle then writes once

    def stow(record: Record) -> Record | Packed:
        nonlocal size
        if not isinstance(record, Arrays) or isinstance(
            record, Mean
        ):  # a mean is one object, written once as it is
            return record
        # Objects are pointers, and their bytes mean nothing in another process.
        if any(array.dtype.hasobject for array in record.values()):
            return record
        if sum(array.nbytes for array in record.values()) >= _LARGE * len(record):
            return record
        layout = tuple(
            (name, array.dtype, array.shape) for name, array in record.items()
        )
        packed = Packed(size, layouts.setdefault(layout, layout))
        for array in record.values():
            todo.append((size, array))
            size += _room(array.nbytes)
        return packed

    light = [
        _with(message, {name: stow(record) for name, record in message.content.items()})
        for message in messages
    ]
    buffer = np.empty(size, np.uint8)
    for start, array in todo:
        # Through a view, which also lays out arrays of other strides.
        np.ndarray(array.shape, array.dtype, buffer.data, start)[...] = array
    return light, buffer


def unpack(message: Message, buffer: np.ndarray) -> Message:
    """Put back the arrays that :func:`pack` took out of a message: read-only views of the bytes."""

    def arrays(packed: Packed) -> Arrays:
        found, start = Arrays(), packed.start
        for name, dtype, shape in packed.layout:
            found[name] = array = np.ndarray(shape, dtype, buffer.data, start)
            array.flags.writeable = False
            start += _room(array.nbytes)
        return found

    content: Mapping[str, Record | Packed] = message.content
    return _with(
        message,
        {
            name: arrays(r) if isinstance(r, Packed) else r
            for name, r in content.items()
        },
    )


def detached(message: Message) -> Message:
    """A message with arrays of its own, read-only, in the place of those that lie elsewhere."""

    def copy(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.flags.writeable = False
        return array

    content = message.content.items()
    return _with(
        message,
        {
            n: Arrays((k, copy(a)) for k, a in r.items())
            if isinstance(r, Arrays)
            else r
            for n, r in content
        },
    )


def _room(size: int) -> int:
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT


def _with(message: Message, content: Mapping[str, Any]) -> Message:
    return replace(message, content=content)
