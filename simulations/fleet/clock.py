"""The virtual clock: discrete events that say when each piece of work reaches its client, is done
and is back.

Nothing here knows of real time. What happens depends on the jobs given, their order and the
moments they are given at, and on nothing else.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from fedknow.simulations.fleet.availability import Presence
from fedknow.simulations.fleet.links import Links, Pipe

__all__ = ["Clock", "Job", "Timing"]


@dataclass(frozen=True)
class Job:
    """One piece of work of a client.

    Attributes
    ----------
    id : str
    client : int
    down, up : float
        Bytes of the request and of the answer.
    seconds : float
        What the client's device takes to compute.
    delays : tuple of float
        Seconds that request and answer are under way besides (latency, jitter).
    due : float
        The moment at which it is given up if it is not done; infinite: never.
    lost : bool
        The answer does not come: the work ends when due, or where it never is, when the answer
        should have come.
    """

    id: str
    client: int
    down: float = 0.0
    seconds: float = 0.0
    up: float = 0.0
    delays: tuple[float, float] = (0.0, 0.0)
    due: float = math.inf
    lost: bool = False


@dataclass(frozen=True)
class Timing:
    """What became of a job; all in virtual seconds.

    Attributes
    ----------
    job : Job
    given : float
        When the server gave it out.
    began, received, computed, arrived, ended : float
        When the request set out (later than ``given`` where the client was away or busy), had
        come, the work was done, the answer had come, or was lost, and the server was done with
        it. Where it was given up before, what did not happen any more has the time it ended.
    complete : bool
        Whether it was done before it was due.
    """

    job: Job
    given: float
    began: float
    received: float
    computed: float
    arrived: float
    ended: float
    complete: bool


_Event = tuple[float, int, int, str, str]
"""When, what comes first of what happens then (twice), to which job, what."""


@dataclass
class _Run:
    job: Job
    given: float
    marks: list[float] = field(default_factory=list)
    """When it began, was received, computed, and its answer was lost."""
    pipe: Pipe | None = None
    """What it is moving through."""


class Clock:
    """Jobs under way, and what happens next.

    A client does its jobs one after the other in the order given. A job waits until its client
    is there; a client that leaves goes on where it was when it is back (a transfer on a shared
    link is not interrupted once it has begun). Of what happens at the same moment, what was set
    going first comes first.

    Parameters
    ----------
    links : Links
    presence : Presence
    now : float
        Where the clock stands, seconds.
    """

    def __init__(self, links: Links, presence: Presence, now: float = 0.0) -> None:
        self.now = now
        self._links, self._presence = links, presence
        self._pipes = (Pipe(links.down[0]), Pipe(links.up[0]))
        self._runs: dict[str, _Run] = {}
        self._queues: dict[int, deque[str]] = {}
        self._events: list[_Event] = []
        self._count = 0

    @property
    def idle(self) -> bool:
        """Whether no job is under way."""
        return not self._runs

    def give(self, job: Job) -> None:
        """Give a job out, now."""
        self._runs[job.id] = _Run(job, self.now)
        if job.due < math.inf:
            self._at(job.due, job.id, "due")
        queue = self._queues.setdefault(job.client, deque())
        queue.append(job.id)
        # A client does one thing at a time.
        if len(queue) == 1:
            self._begin(job.id)

    def step(self, until: float = math.inf) -> Timing | None:
        """Go on until the next job ends.

        Parameters
        ----------
        until : float
            A moment after which nothing is to happen.

        Returns
        -------
        Timing or None
            The job that ended, and the clock shows when; None: none did until then, and the
            clock shows ``until`` (or what it showed, where no job is under way and there is no
            such moment).
        """
        while self._runs:
            time, _, _, id, what = event = self._first()
            if time > until:
                break
            if self._events and event is self._events[0]:
                heapq.heappop(self._events)
            self.now = time
            if what == "due":
                return self._end(id, complete=False)
            if what == "join":
                self._enter(self._runs[id])
            elif timing := self._advance(self._runs[id]):
                return timing
        if until < math.inf:
            self.now = max(self.now, until)
        return None

    def drop(self, ids: Iterable[str]) -> list[Timing]:
        """Give jobs up, now."""
        return [self._end(id, complete=False) for id in ids if id in self._runs]

    def shares(self, timing: Timing, since: float = -math.inf) -> tuple[float, float]:
        """How long a job's messages were under way, and how long its client computed.

        Neither counts what the client was away for, in which a job does not get on; on a shared
        link, where a transfer does, that counts.

        Parameters
        ----------
        timing : Timing
        since : float
            What was before this moment does not count.

        Returns
        -------
        (float, float)
            Seconds.
        """

        def there(start: float, end: float, paused: bool = True) -> float:
            start = max(start, since)
            if start >= end:
                return 0.0
            return (
                self._presence.between(timing.job.client, start, end)
                if paused
                else end - start
            )

        paused = not self._links.shared
        transfer = there(timing.began, timing.received, paused) + there(
            timing.computed, timing.arrived, paused
        )
        return transfer, there(timing.received, timing.computed)

    def wait(self, until: float) -> None:
        """Let time pass in which no job is under way."""
        assert self.idle
        self.now = max(self.now, until)

    # --- events
    # ---------------------------------------------------------------------------------------------------

    def _at(self, time: float, id: str, what: str) -> None:
        # A number for each event, so that equal times keep their order.
        self._count += 1
        # What is done just when it is due is done, so the end of patience comes last.
        heapq.heappush(
            self._events, (time, 2 if what == "due" else 0, self._count, id, what)
        )

    def _first(self) -> _Event:
        """The next event."""
        # Events of jobs that were given up stay in the heap, as removing them there is slow.
        while self._events and self._events[0][3] not in self._runs:
            heapq.heappop(self._events)
        moving = [
            (found[0], 1, way, found[1], "moved")
            for way, p in enumerate(self._pipes)
            if (found := p.next())
        ]
        return min([*self._events[:1], *moving])

    def _begin(self, id: str) -> None:
        self._at(
            self._presence.after(self._runs[id].job.client, self.now, 0.0), id, "begin"
        )

    def _advance(self, run: _Run) -> Timing | None:
        """The next stage of a job: it sets out, comes to the client, is computed, and the answer
        comes back."""
        job = run.job
        if run.pipe is not None:
            run.pipe.leave(job.id, self.now)
            run.pipe = None
        if len(run.marks) == 3 and not (job.lost and job.due < math.inf):
            return self._end(job.id, complete=True)
        run.marks.append(self.now)
        if len(run.marks) == 4:  # nobody knows that the answer is lost until it is due
            return None
        if len(run.marks) == 2:
            self._at(
                self._presence.after(job.client, self.now, job.seconds),
                job.id,
                "computed",
            )
        else:
            self._send(run)
        return None

    def _send(self, run: _Run) -> None:
        """Send the request of a job that has just begun, or the answer of one that has been computed."""
        job, way = run.job, len(run.marks) // 2
        if self._links.shared:
            self._at(self.now + job.delays[way], job.id, "join")
        else:
            size, rates = ((job.down, self._links.down), (job.up, self._links.up))[way]
            seconds = job.delays[way] + size / rates[job.client]
            self._at(
                self._presence.after(job.client, self.now, seconds), job.id, "moved"
            )

    def _enter(self, run: _Run) -> None:
        job, way = run.job, len(run.marks) // 2
        run.pipe = self._pipes[way]
        run.pipe.join(job.id, (job.down, job.up)[way], self.now)

    def _end(self, id: str, complete: bool) -> Timing:
        run = self._runs.pop(id)
        if run.pipe is not None:
            run.pipe.leave(id, self.now)
        queue = self._queues[run.job.client]
        first = queue[0] == id
        # From anywhere in the queue: work may be given up before it has begun.
        queue.remove(id)
        # Only the end of the work under way lets the next one begin.
        if first and queue:
            self._begin(queue[0])
        began, received, computed, arrived = (
            *run.marks,
            *[self.now] * (4 - len(run.marks)),
        )
        return Timing(
            run.job, run.given, began, received, computed, arrived, self.now, complete
        )
