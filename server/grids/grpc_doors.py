"""The doors of a gRPC server: who waits there, and who knocks too often.

Nobody holds a place before saying who it is. A visitor is a client that has proved its number,
or else an address. Each visitor has room for a few streams that have not said hello, and so many
new ones a second. Where a room is full its oldest stream gives way: an honest hello arrives
within milliseconds, and one that never comes has waited longest.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["DISPLACED", "Bucket", "Crowded", "DoorLimits", "Doors", "Repeats"]

DISPLACED = 0.0
"""When the wait of a stream ends that gives way: a moment of the loop's clock long ago."""
Clock = Callable[[], float]


class Crowded(Exception):
    """A visitor that comes too often; the text says what it may do."""


@dataclass(frozen=True)
class DoorLimits:
    """How much a visitor may ask for before it has said hello.

    Attributes
    ----------
    waiting : int
        Streams of one visitor that have not said hello.
    waiting_all : int
        Those of all visitors.
    burst : int
        Calls that a visitor may begin at once.
    rate : float
        Calls a second that it may begin after that.
    member_burst, member_rate : int and float
        The same for a client that has proved its number.
    visitors : int
        Visitors that are remembered.
    """

    waiting: int
    waiting_all: int
    burst: int
    rate: float
    member_burst: int = 64
    member_rate: float = 2.0
    visitors: int = 4096

    @classmethod
    def for_clients(cls, clients: int) -> DoorLimits:
        """Choose limits that let all clients come at once from one address."""
        # Clients behind one router share an address, and all come back when a server does.
        return cls(
            waiting=2 * clients + 16,
            waiting_all=4 * clients + 256,
            burst=4 * clients + 64,
            rate=2.0 * clients + 16,
        )


@dataclass
class Bucket:
    """Calls that a visitor may still begin.

    Attributes
    ----------
    tokens : float
        How many, at a moment.
    moment : float
        That moment, on the clock.
    """

    tokens: float
    moment: float

    def take(self, burst: int, rate: float, moment: float) -> bool:
        """Take one call out; return whether there was one."""
        # Filled up by the time that has passed, so that no timer runs.
        gained = (moment - self.moment) * rate
        self.tokens = min(float(burst), self.tokens + gained)
        self.moment = moment
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


class Doors:
    """Keeps count of visitors.

    Parameters
    ----------
    limits : DoorLimits
    clock : callable
        Seconds that never go back.

    Attributes
    ----------
    counts : Counter
        Visitors turned away: ``crowded`` came too often, ``displaced`` were silent when others
        needed the room.
    """

    def __init__(self, limits: DoorLimits, clock: Clock = time.monotonic) -> None:
        self.counts: Counter[str] = Counter()
        self._limits = limits
        self._clock = clock
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()
        self._waiting: dict[asyncio.Timeout, str] = {}
        self._by_visitor: Counter[str] = Counter()

    def knock(self, visitor: str, is_member: bool = False) -> None:
        """Let a visitor begin a call.

        Parameters
        ----------
        visitor : str
        is_member : bool
            Whether it is one client, and not an address that many may share.

        Raises
        ------
        Crowded
            If it has begun too many.
        """
        limits = self._limits
        burst = limits.member_burst if is_member else limits.burst
        rate = limits.member_rate if is_member else limits.rate
        moment = self._clock()
        bucket = self._buckets.pop(visitor, None)
        if bucket is None:
            bucket = Bucket(float(burst), moment)
        # Those that came last stand last, so that the first one is the one to forget.
        self._buckets[visitor] = bucket
        if len(self._buckets) > limits.visitors:
            self._buckets.popitem(last=False)
        if not bucket.take(burst, rate, moment):
            self.counts["crowded"] += 1
            raise Crowded(f"{visitor} begins more than {rate:g} calls a second")

    @contextmanager
    def waiting(self, visitor: str, patience: asyncio.Timeout) -> Iterator[None]:
        """Have a visitor's stream wait, in place of an older one if need be.

        Parameters
        ----------
        visitor : str
        patience : asyncio.Timeout
            Under which the stream waits. It ends at once where others need the room.
        """
        limits = self._limits
        # A visitor that has all its places gives one of them up, and nobody else does.
        if self._by_visitor[visitor] >= limits.waiting:
            self._displace(visitor)
        elif len(self._waiting) >= limits.waiting_all:
            # Whoever has most streams loses one, so that a crowd pushes out no single visitor.
            ((crowd, _),) = self._by_visitor.most_common(1)
            self._displace(crowd)
        self._waiting[patience] = visitor
        self._by_visitor[visitor] += 1
        try:
            yield
        finally:
            self._leave(patience)

    def _displace(self, visitor: str) -> None:
        """End the wait of a visitor's oldest stream."""
        oldest = next(
            patience
            for patience, waiting in self._waiting.items()
            if waiting == visitor
        )
        self._leave(oldest)
        self.counts["displaced"] += 1
        oldest.reschedule(DISPLACED)

    def _leave(self, patience: asyncio.Timeout) -> None:
        visitor = self._waiting.pop(patience, None)
        # It was displaced before, and another one has its place.
        if visitor is None:
            return
        self._by_visitor[visitor] -= 1
        # Counts of zero would stay, and strangers could fill the memory with them.
        if not self._by_visitor[visitor]:
            del self._by_visitor[visitor]


class Repeats:
    """Writes few lines about many events of one kind.

    Parameters
    ----------
    log : Logger
    lines : int
        Lines of one kind in a window; the others are counted.
    seconds : float
        Length of a window.
    clock : callable
        Seconds that never go back.
    """

    def __init__(
        self,
        log: logging.Logger,
        lines: int = 5,
        seconds: float = 10.0,
        clock: Clock = time.monotonic,
    ) -> None:
        self._log = log
        self._lines = lines
        self._seconds = seconds
        self._clock = clock
        self._began: dict[str, float] = {}
        self._seen: Counter[str] = Counter()

    def write(self, level: int, kind: str, text: str) -> None:
        """Write a line, or count it with others of its kind.

        Parameters
        ----------
        level : int
            Of :mod:`logging`.
        kind : str
            One of few: kinds are remembered.
        text : str
            The line.
        """
        moment = self._clock()
        if moment - self._began.setdefault(kind, moment) >= self._seconds:
            self.flush(kind)
            self._began[kind] = moment
        self._seen[kind] += 1
        if self._seen[kind] <= self._lines:
            self._log.log(level, "%s", text)

    def flush(self, kind: str) -> None:
        """Say how many lines of a kind were left out, and begin anew."""
        left_out = self._seen.pop(kind, 0) - self._lines
        self._began.pop(kind, None)
        if left_out > 0:
            self._log.warning("%s: %d more like these", kind, left_out)

    def flush_all(self) -> None:
        """Say of all kinds how many lines were left out."""
        # A copy, as flushing takes kinds out.
        for kind in list(self._began):
            self.flush(kind)
