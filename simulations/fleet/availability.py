"""When clients are there: always, in turns of random length, or as a trace says. Pure functions of
seed and time."""

from __future__ import annotations

import csv
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from fedknow.protocols.config import ConfigError, FleetConfig
from fedknow.protocols.seeds import generator

__all__ = ["Always", "Markov", "Presence", "Trace", "make_presence"]


class Presence(ABC):
    """Spans of virtual time ``[start, end)`` in which a client is there; outside these it does
    nothing at all."""

    @abstractmethod
    def index(self, client: int, time: float) -> int:
        """The first span that ends after a time."""

    @abstractmethod
    def span(self, client: int, index: int) -> tuple[float, float]:
        """A span, by its number from 0."""

    def here(self, client: int, time: float) -> bool:
        """Whether a client is there at a time."""
        return self.span(client, self.index(client, time))[0] <= time

    def after(self, client: int, time: float, seconds: float) -> float:
        """When a client that has something to do from a time on has been there for so many seconds."""
        index = self.index(client, time)
        while True:
            start, end = self.span(client, index)
            start = max(start, time)
            if seconds <= end - start:
                return start + seconds
            seconds -= end - start
            index += 1

    def between(self, client: int, start: float, end: float) -> float:
        """Seconds in which a client was there."""
        total, index = 0.0, self.index(client, start)
        while (span := self.span(client, index))[0] < end:
            total += min(span[1], end) - max(span[0], start)
            index += 1
        return total

    @abstractmethod
    def until(self, client: int, time: float) -> float:
        """Seconds up to a time, from 0 on, in which a client was there: :meth:`between` in one step."""


class Always(Presence):
    """Everybody, all the time."""

    def index(self, client: int, time: float) -> int:
        """The one span."""
        return 0

    def span(self, client: int, index: int) -> tuple[float, float]:
        """All time; nothing after it."""
        return (-math.inf, math.inf) if index == 0 else (math.inf, math.inf)

    def until(self, client: int, time: float) -> float:
        """All of it."""
        return time


class Markov(Presence):
    """Each client is there and away in turn, for exponentially distributed times: a Markov chain
    of two states.

    Parameters
    ----------
    seed : int
    online, offline : float
        Mean lengths, seconds. A client is there in the beginning with the chance that it has in
        the long run.
    """

    def __init__(self, seed: int, online: float, offline: float) -> None:
        self._seed, self._online, self._offline = seed, online, offline
        # A generator each, as spans are drawn when they are asked for, in any order of clients.
        self._draws: dict[int, np.random.Generator] = {}
        self._starts: dict[int, list[float]] = {}
        self._ends: dict[int, list[float]] = {}
        self._totals: dict[int, list[float]] = {}
        """Seconds there before each span."""

    def index(self, client: int, time: float) -> int:
        """See :meth:`Presence.index`; spans are drawn as far as they are asked for."""
        # Drawn in order and kept, so that a moment has the same answer whenever it is asked
        # for.
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
        return self._totals[client][index] + max(
            0.0, time - self._starts[client][index]
        )

    def _draw(self, client: int) -> None:
        if client not in self._draws:
            draw = self._draws[client] = generator(self._seed, "fleet.presence", client)
            # In the chain's long-run proportion, so that time 0 is like any other moment.
            away = draw.random() >= self._online / (self._online + self._offline)
            self._starts[client] = [draw.exponential(self._offline) if away else 0.0]
            self._ends[client], self._totals[client] = [], [0.0]
        draw, starts, ends = (
            self._draws[client],
            self._starts[client],
            self._ends[client],
        )
        ends.append(starts[-1] + draw.exponential(self._online))
        self._totals[client].append(self._totals[client][-1] + ends[-1] - starts[-1])
        starts.append(ends[-1] + draw.exponential(self._offline))


class Trace(Presence):
    """Spans from a record of real clients, repeated without end.

    Parameters
    ----------
    spans : list of list of (float, float)
        Of each recorded client, in order and apart from each other. Client ``n`` is recorded
        client ``n`` modulo their number.
    period : float
        Seconds after which the record begins anew; not before its last end.
    """

    def __init__(self, spans: list[list[tuple[float, float]]], period: float) -> None:
        self._spans = spans
        self._ends = [[end for _, end in client] for client in spans]
        self._totals = [
            [0.0, *accumulate(end - start for start, end in client)] for client in spans
        ]
        """Seconds there before each span, and in all."""
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
        return spans[place][0] + turn * self._period, spans[place][
            1
        ] + turn * self._period

    def until(self, client: int, time: float) -> float:
        """See :meth:`Presence.until`."""
        index, totals = (
            self.index(client, time),
            self._totals[client % len(self._totals)],
        )
        turn, place = divmod(index, len(totals) - 1)
        return (
            turn * totals[-1]
            + totals[place]
            + max(0.0, time - self.span(client, index)[0])
        )

    @classmethod
    def read(cls, path: Path) -> Trace:
        """A CSV file with the columns ``client``, ``start`` and ``end`` (seconds); it repeats
        after its last end.

        Raises
        ------
        ConfigError
            If it cannot be read, is empty, or spans overlap.
        """
        found: dict[str, list[tuple[float, float]]] = {}
        try:
            with path.open(newline="", encoding="utf-8") as file:
                for line, row in enumerate(csv.DictReader(file), 2):
                    try:
                        span = float(row["start"]), float(row["end"])
                        if not 0 <= span[0] < span[1] < math.inf:
                            raise ValueError(
                                f"start = {span[0]:g}, end = {span[1]:g}: not 0 <= start < end"
                            )
                        found.setdefault(row["client"], []).append(span)
                    except (KeyError, ValueError, TypeError) as error:
                        raise ConfigError(
                            f"fleet.availability: {path}, line {line}: needs client, start and end in seconds: {error}"
                        ) from None
        except OSError as error:
            raise ConfigError(
                f"fleet.availability = {str(path)!r}: cannot be read: {error.strerror}; give 'always', 'markov' or a "
                "CSV file"
            ) from None
        for client, spans in found.items():
            spans.sort()
            for (_, end), (start, _) in pairwise(spans):
                if start < end:
                    raise ConfigError(
                        f"fleet.availability: {path}: spans of client {client} overlap at {start:g} s"
                    )
        if not found:
            raise ConfigError(f"fleet.availability: {path}: there is nobody in it")
        # One period for all, so that clients keep their distance from one another.
        return cls(list(found.values()), max(spans[-1][1] for spans in found.values()))


def make_presence(config: FleetConfig, seed: int) -> Presence:
    """What ``fleet.availability`` says.

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
