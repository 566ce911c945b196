"""Messages on their way to Ray workers and back: shared and packed arrays."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
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

_Layout = tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]
_ALIGNMENT = 64
"""Bytes; vector instructions and torch like it best."""
_LARGE = 2**16
"""Bytes of an array from which on pickle costs less than one more copy."""


@dataclass
class Job:
    """All the work of a wave for one client, in order.

    Attributes
    ----------
    client : int
    version : int
        Version of the state that the work starts from.
    work : list of Message
    deaths : int
        Workers that died on it.
    """

    client: int
    version: int
    work: list[Message] = field(default_factory=list)
    deaths: int = 0


@dataclass(frozen=True)
class Shared:
    """A stand-in for arrays that many messages of a wave carry.

    They travel once, in a list.

    Attributes
    ----------
    place : int
        Their index in the list.
    """

    place: int


@dataclass(frozen=True)
class Packed:
    """A stand-in for arrays of an answer that lie in its batch's buffer.

    Attributes
    ----------
    start : int
        Their offset in the buffer.
    layout : tuple
        Name, type and shape of each, in order.
    """

    start: int
    layout: _Layout


@dataclass(frozen=True)
class Answered:
    """A worker's answers to a batch.

    Attributes
    ----------
    answers : list of (Message, int)
        An answer to each message, in order, as :func:`pack` leaves it, and the version of the
        client's state after it.
    arrays : ndarray
        The arrays that :func:`pack` took out, as uint8.
    seconds : float
        Time that the work took.
    peak_memory_mb : float
        Peak of the worker's resident memory, MB.
    files : dict of str to ndarray
        New files of client states by name, uint8, from a worker that does not see the run folder.
    """

    answers: list[tuple[Message, int]]
    arrays: np.ndarray
    seconds: float
    peak_memory_mb: float
    files: dict[str, np.ndarray] = field(default_factory=dict)


# --- shared arrays, on the way to workers


def share(jobs: Sequence[Job]) -> tuple[list[Job], list[Arrays]]:
    """Take arrays that more than one message carries out of the messages.

    Arrays are the same if they are the same object.

    Returns
    -------
    tuple
        The jobs with :class:`Shared` in place of the arrays, and the arrays.
    """
    counts = _count_records(jobs)
    stand_ins: dict[int, Shared] = {}
    arrays: list[Arrays] = []

    def lighten(record: Record) -> Record | Shared:
        if not isinstance(record, Arrays) or counts[id(record)] == 1:
            return record
        if id(record) not in stand_ins:
            stand_ins[id(record)] = Shared(len(arrays))
            arrays.append(record)
        return stand_ins[id(record)]

    light_jobs = []
    for job in jobs:
        work = [_map_records(message, lighten) for message in job.work]
        light_jobs.append(replace(job, work=work))
    return light_jobs, arrays


def unshare(message: Message, arrays: Sequence[Arrays]) -> Message:
    """Put the arrays that :func:`share` took out back into a message."""

    def restore(record: Record | Shared) -> Record:
        return arrays[record.place] if isinstance(record, Shared) else record

    return _map_records(message, restore)


def _count_records(jobs: Iterable[Job]) -> Counter[int]:
    """Count how often messages carry each record, by its identity."""
    counts: Counter[int] = Counter()
    for job in jobs:
        for message in job.work:
            # By identity: to compare the arrays would take longer than to send them.
            counts.update(id(record) for record in message.content.values())
    return counts


# --- packed arrays, on the way back


def pack(messages: Sequence[Message]) -> tuple[list[Message], np.ndarray]:
    """Put arrays of messages one after the other, to travel as one.

    Records of large arrays are left as they are: Ray writes each of those into its store
    without another copy.

    Returns
    -------
    tuple
        The messages with :class:`Packed` in place of the arrays, and the bytes of the arrays
        (uint8).
    """
    size = 0
    stowed: list[tuple[int, np.ndarray]] = []
    # One object for all messages of a layout, which pickle then writes once.
    layouts: dict[_Layout, _Layout] = {}

    def stow(record: Record) -> Record | Packed:
        nonlocal size
        if not isinstance(record, Arrays) or not _is_worth_packing(record):
            return record
        layout = tuple(
            (name, array.dtype, array.shape) for name, array in record.items()
        )
        packed = Packed(size, layouts.setdefault(layout, layout))
        for array in record.values():
            stowed.append((size, array))
            size += _aligned(array.nbytes)
        return packed

    light = [_map_records(message, stow) for message in messages]
    # Copied last, as only now the size of the buffer is known.
    buffer = np.empty(size, np.uint8)
    for start, array in stowed:
        # Through a view, which also lays out arrays of other strides.
        np.ndarray(array.shape, array.dtype, buffer.data, start)[...] = array
    return light, buffer


def unpack(message: Message, buffer: np.ndarray) -> Message:
    """Put back the arrays that :func:`pack` took out of a message.

    They are read-only views of the buffer.
    """

    def restore(record: Record | Packed) -> Record:
        if not isinstance(record, Packed):
            return record
        arrays = Arrays()
        start = record.start
        for name, dtype, shape in record.layout:
            array: np.ndarray = np.ndarray(shape, dtype, buffer.data, start)
            # The buffer lies in Ray's store, where other processes read it too.
            array.flags.writeable = False
            arrays[name] = array
            start += _aligned(array.nbytes)
        return arrays

    return _map_records(message, restore)


def detached(message: Message) -> Message:
    """Return a message with read-only arrays of its own.

    They take the place of those that lie in a shared store.
    """

    def copy_record(record: Record) -> Record:
        if not isinstance(record, Arrays):
            return record
        return Arrays((name, _read_only_copy(a)) for name, a in record.items())

    return _map_records(message, copy_record)


def _is_worth_packing(arrays: Arrays) -> bool:
    # A mean is one object for all answers, and pickle writes it once as it is.
    if isinstance(arrays, Mean):
        return False
    # Objects are pointers, and their bytes mean nothing in another process.
    if any(array.dtype.hasobject for array in arrays.values()):
        return False
    return sum(array.nbytes for array in arrays.values()) < _LARGE * len(arrays)


def _read_only_copy(array: np.ndarray) -> np.ndarray:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def _aligned(size: int) -> int:
    """Round a size up, so that the next array begins at an aligned place."""
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT


def _map_records(message: Message, convert: Callable[[Any], Any]) -> Message:
    """Return a message whose records are converted."""
    content: Mapping[str, Any] = message.content
    records = {name: convert(record) for name, record in content.items()}
    return replace(message, content=records)
