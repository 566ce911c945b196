"""Presence of clients: always, in random turns, or from a trace.

All of it is a pure function of seed and time.
"""

from __future__ import annotations

import csv
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from fedknow.protocols.config import (
    ConfigError,
    FleetConfig,
)
from fedknow.protocols.seeds import generator

__all__ = [
    "Always",
    "Markov",
    "Presence",
    "Trace",
    "make_presence",
]

Span = tuple[float, float]
"""Start and end of a time in which a client is present, in seconds."""


class Presence(ABC):
    """Spans of virtual time ``[start, end)`` in which a client is present.

    Outside these it does nothing at all.
    """

    @abstractmethod
    def index(self, client: int, time: float) -> int:
        """Return the number of the next span that ends after a time."""

    @abstractmethod
    def span(self, client: int, index: int) -> tuple[float, float]:
        """Return a span, by its number from 0."""

    def is_present(self, client: int, time: float) -> bool:
        """Return whether a client is present at a time."""
        return self.span(client, self.index(client, time))[0] <= time

    def completion(self, client: int, time: float, seconds: float) -> float:
        """Return when a client has been present for so many seconds.

        Parameters
        ----------
        client : int
        time : float
            When it begins to have something to do.
        seconds : float
            Time that it takes, while the client is present.
        """
        index = self.index(client, time)
        while True:
            start, end = self.span(client, index)
            start = max(start, time)
            if seconds <= end - start:
                return start + seconds
            seconds -= end - start
            index += 1

    def between(self, client: int, start: float, end: float) -> float:
        """Return the seconds in which a client was present."""
        total = 0.0
        index = self.index(client, start)
        while (span := self.span(client, index))[0] < end:
            total += min(span[1], end) - max(span[0], start)
            index += 1
        return total

    @abstractmethod
    def until(self, client: int, time: float) -> float:
        """Return the seconds from 0 up to a time in which a client was present.

        This is :meth:`between` in one step.
        """


class Always(Presence):
    """All clients are present all the time."""

    def index(self, client: int, time: float) -> int:
        """See :meth:`Presence.index`; there is one span."""
        return 0

    def span(self, client: int, index: int) -> tuple[float, float]:
        """See :meth:`Presence.span`; the one span is all time."""
        # No time is left for further spans, so a search for one ends.
        return (-math.inf, math.inf) if index == 0 else (math.inf, math.inf)

    def until(self, client: int, time: float) -> float:
        """See :meth:`Presence.until`; the client is never away."""
        return time


class Markov(Presence):
    """Each client is present and absent in turn: a Markov chain of two states.

    The times are exponentially distributed.

    Parameters
    ----------
    seed : int
    online, offline : float
        Mean lengths, seconds. A client is present in the beginning with the chance that it has
        in the long run.
    """

    def __init__(self, seed: int, online: float, offline: float) -> None:
        self._seed = seed
        self._online = online
        self._offline = offline
        # A generator each, as spans are drawn when they are asked for, in any order of clients.
        self._draws: dict[int, np.random.Generator] = {}
        self._starts: dict[int, list[float]] = {}
        self._ends: dict[int, list[float]] = {}
        self._totals: dict[int, list[float]] = {}
        """Seconds of presence up to each span."""

    def index(self, client: int, time: float) -> int:
        """See :meth:`Presence.index`; spans are drawn as far as need be."""
        # Drawn in order and kept, so that a moment always has the same answer.
        while not self._ends.get(client) or self._ends[client][-1] <= time:
            self._draw(client)
        # To the right: at its end a span is over.
        return bisect_right(self._ends[client], time)

    def span(self, client: int, index: int) -> tuple[float, float]:
        """See :meth:`Presence.span`."""
        while len(self._ends.setdefault(client, [])) <= index:
            self._draw(client)
        return self._starts[client][index], self._ends[client][index]

    def until(self, client: int, time: float) -> float:
        """See :meth:`Presence.until`."""
        index = self.index(client, time)
        # Between two spans, the next one has not begun and adds nothing.
        current = max(0.0, time - self._starts[client][index])
        return self._totals[client][index] + current

    def _draw(self, client: int) -> None:
        """Draw a client's next span, and the start of the one that follows."""
        if client not in self._draws:
            self._draw_start(client)
        draw = self._draws[client]
        starts = self._starts[client]
        ends = self._ends[client]
        totals = self._totals[client]
        # The order of the draws is part of a seed's meaning.
        ends.append(starts[-1] + draw.exponential(self._online))
        totals.append(totals[-1] + ends[-1] - starts[-1])
        starts.append(ends[-1] + draw.exponential(self._offline))

    def _draw_start(self, client: int) -> None:
        draw = generator(self._seed, "fleet.presence", client)
        # In the chain's long-run proportion, so that time 0 is like any other moment.
        is_absent = draw.random() >= self._online / (self._online + self._offline)
        start = draw.exponential(self._offline) if is_absent else 0.0
        self._draws[client] = draw
        self._starts[client] = [start]
        self._ends[client] = []
        self._totals[client] = [0.0]


class Trace(Presence):
    """Spans from a record of real clients, repeated without end.

    Parameters
    ----------
    spans : list of list of (float, float)
        Those of each recorded client, in order and without overlap. Client ``n`` is recorded
        client ``n`` modulo their number.
    period : float
        Seconds after which the record begins anew, once its latest span has ended.
    """

    def __init__(self, spans: list[list[Span]], period: float) -> None:
        self._spans = spans
        self._ends = list(map(_ends, spans))
        self._totals = list(map(_running_totals, spans))
        """Seconds of presence up to each span, and in all."""
        self._period = period

    def index(self, client: int, time: float) -> int:
        """See :meth:`Presence.index`."""
        ends = self._ends[client % len(self._ends)]
        turn = math.floor(time / self._period)
        return turn * len(ends) + bisect_right(ends, time - turn * self._period)

    def span(self, client: int, index: int) -> tuple[float, float]:
        """See :meth:`Presence.span`."""
        spans = self._spans[client % len(self._spans)]
        turn, place = divmod(index, len(spans))
        shift = turn * self._period
        start, end = spans[place]
        return start + shift, end + shift

    def until(self, client: int, time: float) -> float:
        """See :meth:`Presence.until`."""
        index = self.index(client, time)
        totals = self._totals[client % len(self._totals)]
        turn, place = divmod(index, len(totals) - 1)
        # Between two spans, the next one has not begun and adds nothing.
        current = max(0.0, time - self.span(client, index)[0])
        return turn * totals[-1] + totals[place] + current

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Read a CSV file with the columns ``client``, ``start`` and ``end``.

        Times are in seconds. The record repeats after its latest end.

        Raises
        ------
        ConfigError
            If it cannot be read, is empty, or spans overlap.
        """
        spans_by_client = _read_spans(path)
        if not spans_by_client:
            raise ConfigError(
                f"fleet.availability: {path}: there is nobody in it"
            )
        for client, spans in spans_by_client.items():
            spans.sort()
            _check_overlap(path, client, spans)
        # One period for all, so that clients keep their distance from one another.
        period = max(spans[-1][1] for spans in spans_by_client.values())
        return cls(list(spans_by_client.values()), period)


def _ends(spans: Sequence[Span]) -> list[float]:
    return [end for _, end in spans]


def _running_totals(spans: Sequence[Span]) -> list[float]:
    return [
        0.0,
        *accumulate(end - start for start, end in spans),
    ]


def _read_spans(path: Path) -> dict[str, list[Span]]:
    """Read the spans of each recorded client, in the order of the file."""
    spans: dict[str, list[Span]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            # Line 1 is the header.
            for line, row in enumerate(csv.DictReader(file), 2):
                try:
                    span = _read_span(row)
                    client = row["client"]
                except (
                    KeyError,
                    ValueError,
                    TypeError,
                ) as error:
                    raise ConfigError(
                        f"fleet.availability: {path}, line {line}: needs client, start and end "
                        f"in seconds: {error}"
                    ) from None
                spans.setdefault(client, []).append(span)
    except OSError as error:
        raise ConfigError(
            f"fleet.availability = {str(path)!r}: cannot be read: {error.strerror}; give "
            "'always', 'markov' or a CSV file"
        ) from None
    return spans


def _read_span(row: Mapping[str, str]) -> Span:
    start = float(row["start"])
    end = float(row["end"])
    if not 0 <= start < end < math.inf:
        raise ValueError(
            f"start = {start:g}, end = {end:g}: not 0 <= start < end"
        )
    return start, end


def _check_overlap(path: Path, client: str, spans: Sequence[Span]) -> None:
    for (_, end), (start, _) in pairwise(spans):
        if start < end:
            raise ConfigError(
                f"fleet.availability: {path}: spans of client {client} overlap at {start:g} s"
            )


def make_presence(config: FleetConfig, seed: int) -> Presence:
    """Make the presence that ``fleet.availability`` names.

    Raises
    ------
    ConfigError
        If it names a file that is no trace.
    """
    if config.availability == "always":
        return Always()
    if config.availability == "markov":
        return Markov(seed, config.online, config.offline)
    return Trace.read(Path(config.availability))
