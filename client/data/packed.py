"""The shares of many clients, laid end to end in a few arrays.

A share as an object of its own takes about a kilobyte. Hundreds of thousands of clients have
millions of shares, in each process that knows them. Here they are a dozen arrays, which processes
of a machine can have in common. A share is made when somebody asks for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from fedknow.client.data.recurrence import NO_ROWS
from fedknow.client.data.shares import Indices

__all__ = [
    "ClientShares",
    "Counts",
    "PackedShares",
    "Rows",
    "Share",
]

_COLUMNS = (
    "classes",
    "train",
    "test",
    "held",
    "counts",
    "domains",
)
_PER_CHUNK = 10_000
"""Shares that are put together, or digested, at once: a few megabytes."""


class Share(NamedTuple):
    """One client's share of one task."""

    classes: tuple[int, ...]
    """Classes of the task; all clients have the same ones where boundaries are sharp."""
    train: Indices
    """Places in the training arrays, ascending."""
    test: Indices
    """Places in the test arrays, ascending."""
    held: tuple[int, ...]
    """Those of the classes that the client has training samples of."""
    counts: tuple[int, ...] = ()
    """How many training samples of each of these."""
    domain: int = -1
    """The domain that its samples are moved to (:mod:`~fedknow.client.data.domains`); -1:
    none."""
    domains: Indices = NO_ROWS
    """The domain of each training row; empty where all are of ``domain``."""


class Rows:
    """Sequences of integers, laid end to end.

    Parameters
    ----------
    pieces : sequence of ndarray
        Some sequences each, laid end to end already.
    sizes : ndarray of int64
        How many numbers each sequence has.
    """

    def __init__(self, pieces: Sequence[Indices], sizes: Indices) -> None:
        values = np.concatenate(pieces) if pieces else NO_ROWS
        # Half the room, for a data set of fewer than two thousand million samples.
        is_small = not len(values) or values.max() < 2**31
        self.values: NDArray[np.integer[Any]] = (
            values.astype(np.int32) if is_small else values
        )
        self.starts: Indices = np.concatenate(([0], np.cumsum(sizes)))

    @property
    def sizes(self) -> Indices:
        """How many numbers each sequence has."""
        return np.diff(self.starts)

    def row(self, index: int) -> Indices:
        """Give one sequence, as an array of its own."""
        # Back to int64, which indices are everywhere else.
        part = self.values[self.starts[index] : self.starts[index + 1]]
        return part.astype(np.int64)

    def numbers(self, start: int, stop: int) -> list[int]:
        """Give the numbers of some neighbouring sequences."""
        part = self.values[self.starts[start] : self.starts[stop]]
        numbers: list[int] = part.tolist()
        return numbers


class PackedShares(Sequence["ClientShares"]):
    """The shares of all clients: ``shares[client][position]``.

    Parameters
    ----------
    clients : iterable of iterable of Share
        Read one client after the other, so that they need not be in memory together.
    """

    def __init__(self, clients: Iterable[Iterable[Share]]) -> None:
        lengths: list[int] = []
        domain: list[int] = []
        sizes: dict[str, list[int]] = {name: [] for name in _COLUMNS}
        pieces: dict[str, list[Indices]] = {name: [] for name in _COLUMNS}
        for shares in _in_chunks(clients, lengths):
            domain += [share.domain for share in shares]
            for name in _COLUMNS:
                rows = [getattr(share, name) for share in shares]
                sizes[name] += map(len, rows)
                pieces[name].append(_joined(rows))
        self.columns = {
            name: Rows(
                pieces[name],
                np.array(sizes[name], np.int64),
            )
            for name in _COLUMNS
        }
        self.domain: Indices = np.array(domain, np.int64)
        self.starts: Indices = np.concatenate(([0], np.cumsum(lengths))).astype(
            np.int64
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, client: int) -> ClientShares: ...
    @overload
    def __getitem__(self, client: slice) -> Sequence[ClientShares]: ...
    def __getitem__(
        self, client: int | slice
    ) -> ClientShares | Sequence[ClientShares]:
        if isinstance(client, slice):
            return [self[place] for place in range(*client.indices(len(self)))]
        # As a list does: a client below 0 counts from the end.
        place = range(len(self))[client]
        return ClientShares(
            self,
            int(self.starts[place]),
            int(self.starts[place + 1]),
        )

    @property
    def lengths(self) -> Indices:
        """How many tasks each client has."""
        return np.diff(self.starts)

    def share(self, place: int) -> Share:
        """Make the share at a place among all."""
        columns = self.columns
        return Share(
            tuple(columns["classes"].numbers(place, place + 1)),
            columns["train"].row(place),
            columns["test"].row(place),
            tuple(columns["held"].numbers(place, place + 1)),
            tuple(columns["counts"].numbers(place, place + 1)),
            int(self.domain[place]),
            columns["domains"].row(place),
        )

    def sizes(self, name: str) -> Counts:
        """Count the rows of all shares, of one kind (``"train"``)."""
        return Counts(self.columns[name].sizes, self.starts)

    def digest(self, header: Sequence[int]) -> str:
        """SHA-256 (hex) of some numbers, and of all classes and rows."""
        total = hashlib.sha256(np.array(header, "<i8").tobytes())
        count = len(self.domain)
        # In chunks, as the words of all clients at once would double the memory.
        for start in range(0, count, _PER_CHUNK):
            chunk = self._words(start, min(start + _PER_CHUNK, count))
            # Little-endian on every machine.
            total.update(chunk.astype("<i8").tobytes())
        return total.hexdigest()

    def _words(self, start: int, stop: int) -> Indices:
        """Write shares one after the other, each sequence behind its length."""
        domain = self.domain[start:stop]
        has_domain = domain >= 0
        parts = [self.columns[name] for name in ("classes", "train", "test")]
        lengths = [np.diff(part.starts[start : stop + 1]) for part in parts]
        domain_lengths = np.diff(self.columns["domains"].starts[start : stop + 1])
        # Lengths stand before values, so that no two partitions give the same bytes.
        sizes = sum(lengths) + len(parts)
        # Domains come last, and only where there are any: so partitions without them have the
        # digest that they always had.
        sizes = sizes + np.where(has_domain, 2 + domain_lengths, 0)
        ends = np.cumsum(sizes)
        words = np.empty(int(ends[-1]), np.int64)
        place = ends - sizes
        for part, length in zip(parts, lengths, strict=True):
            words[place] = length
            _fill(words, place + 1, part, start, stop)
            place = place + 1 + length
        words[place[has_domain]] = domain[has_domain]
        words[place[has_domain] + 1] = domain_lengths[has_domain]
        _fill(
            words,
            place + 2,
            self.columns["domains"],
            start,
            stop,
        )
        return words


class ClientShares(Sequence[Share]):
    """The shares of one client, in its own order of tasks.

    Parameters
    ----------
    packed : PackedShares
    start, stop : int
        Their places among all.
    """

    def __init__(self, packed: PackedShares, start: int, stop: int) -> None:
        self._packed = packed
        self._places = range(start, stop)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, task: int) -> Share: ...
    @overload
    def __getitem__(self, task: slice) -> Sequence[Share]: ...
    def __getitem__(self, task: int | slice) -> Share | Sequence[Share]:
        if isinstance(task, slice):
            return [self._packed.share(place) for place in self._places[task]]
        return self._packed.share(self._places[task])

    def seen(self, task: int) -> tuple[int, ...]:
        """Give the classes of a task and all before it, in the order met."""
        start, stop = (
            self._places.start,
            self._places[task] + 1,
        )
        met = self._packed.columns["classes"].numbers(start, stop)
        # Tasks may share classes; each counts where it is met for the first time.
        return tuple(dict.fromkeys(met))


class Counts(Sequence[list[int]]):
    """Counts of samples by client and task: ``sizes[client][task]``.

    Parameters
    ----------
    counts : ndarray of int64
        Of all shares.
    starts : ndarray of int64
        The first share of each client, and the number of all.
    """

    def __init__(self, counts: Indices, starts: Indices) -> None:
        self._counts = counts
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, client: int) -> list[int]: ...
    @overload
    def __getitem__(self, client: slice) -> Sequence[list[int]]: ...
    def __getitem__(self, client: int | slice) -> list[int] | Sequence[list[int]]:
        if isinstance(client, slice):
            return [self[place] for place in range(*client.indices(len(self)))]
        place = range(len(self))[client]
        counts = self._counts[self._starts[place] : self._starts[place + 1]]
        numbers: list[int] = counts.tolist()
        return numbers

    def of_task(self, task: int) -> Indices:
        """Give the counts of all clients that have a task."""
        has_task = np.diff(self._starts) > task
        return self._counts[self._starts[:-1][has_task] + task]


def _in_chunks(
    clients: Iterable[Iterable[Share]], lengths: list[int]
) -> Iterator[list[Share]]:
    """Give the shares of some clients at a time, and note how many each has."""
    waiting: list[Share] = []
    for shares in clients:
        count = len(waiting)
        waiting.extend(shares)
        lengths.append(len(waiting) - count)
        if len(waiting) >= _PER_CHUNK:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _joined(
    rows: Sequence[Sequence[int] | Indices],
) -> Indices:
    """Lay sequences end to end."""
    # An array of each tuple first would take four times as long.
    if isinstance(rows[0], tuple):
        return np.fromiter(chain.from_iterable(rows), np.int64)
    return np.concatenate([np.asarray(row, np.int64) for row in rows])


def _fill(
    words: Indices,
    places: Indices,
    column: Rows,
    start: int,
    stop: int,
) -> None:
    """Write sequences of a column to places, one a sequence."""
    begin, end = column.starts[start], column.starts[stop]
    lengths = np.diff(column.starts[start : stop + 1])
    # From its place among the chunk's numbers to that in the text.
    shifts = places - (column.starts[start:stop] - begin)
    target = np.repeat(shifts, lengths) + np.arange(end - begin)
    words[target] = column.values[begin:end]
