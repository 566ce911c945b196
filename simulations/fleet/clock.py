"""The virtual clock: events of jobs on their way to clients and back.

Nothing here knows of real time. The events depend on the jobs, their order and the moments at
which they are given out, and on nothing else.
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
        Time that the client's device takes to compute.
    delays : tuple of float
        Further seconds that request and answer are under way (latency, jitter).
    due : float
        The moment at which it is given up if it is not complete; infinite: never.
    is_lost : bool
        Whether its answer does not come. The job then ends when it is due. If it never is, it
        ends when the answer should have come.
    """

    id: str
    client: int
    down: float = 0.0
    seconds: float = 0.0
    up: float = 0.0
    delays: tuple[float, float] = (0.0, 0.0)
    due: float = math.inf
    is_lost: bool = False


@dataclass(frozen=True)
class Timing:
    """The moments of a job, in virtual seconds.

    Attributes
    ----------
    job : Job
    given_at : float
        The server gave it out.
    began : float
        The request set out; this is later where the client was away or busy.
    received : float
        The request had come.
    computed : float
        The work was done.
    arrived : float
        The answer had come, or was lost.
    ended : float
        The server was done with it. Where it gave the job up, the moments that it did not reach
        are this one too.
    is_complete : bool
        Whether it was complete before it was due.
    """

    job: Job
    given_at: float
    began: float
    received: float
    computed: float
    arrived: float
    ended: float
    is_complete: bool


_Event = tuple[float, int, int, str, str]
"""Time, order among events of one time (two numbers), id of the job, kind."""


@dataclass
class _Run:
    """A job under way.

    Attributes
    ----------
    job : Job
    given_at : float
    marks : list of float
        When it began, was received, was computed, and its answer was lost, as far as it got.
    pipe : Pipe or None
        The shared link that it is moving through.
    """

    job: Job
    given_at: float
    marks: list[float] = field(default_factory=list)
    pipe: Pipe | None = None

    @property
    def direction(self) -> int:
        """0 while the request is on its way, 1 for the answer."""
        # One mark (begun) or three (computed).
        return len(self.marks) // 2


class Clock:
    """Jobs under way, and their next events.

    A client does its jobs one after the other in the order given. A job waits until its client
    is present. A client that leaves goes on at the same point when it is back. (A transfer on a
    shared link is not interrupted once it has begun.) Events of the same moment happen in the
    order in which they were scheduled.

    Parameters
    ----------
    links : Links
    presence : Presence
    time : float
        The time that the clock shows, seconds.
    """

    def __init__(
        self,
        links: Links,
        presence: Presence,
        time: float = 0.0,
    ) -> None:
        self.time = time
        self._links = links
        self._presence = presence
        self._pipes = (Pipe(links.down[0]), Pipe(links.up[0]))
        self._runs: dict[str, _Run] = {}
        self._queues: dict[int, deque[str]] = {}
        self._events: list[_Event] = []
        self._count = 0

    @property
    def is_idle(self) -> bool:
        """Whether no job is under way."""
        return not self._runs

    def give(self, job: Job) -> None:
        """Give a job out, now."""
        self._runs[job.id] = _Run(job, self.time)
        if job.due < math.inf:
            self._schedule(job.due, job.id, "due")
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
            The job that ended; the clock shows when. None: no job ended until then. The clock
            then shows ``until``, or stands still if that is infinite.
        """
        while self._runs:
            event = self._next_event()
            time, _, _, id, kind = event
            if time > until:
                break
            # Events of pipes are not in the heap: they move with each transfer that joins.
            if self._events and event is self._events[0]:
                heapq.heappop(self._events)
            self.time = time
            if kind == "due":
                return self._end(id, is_complete=False)
            if kind == "join":
                self._enter(self._runs[id])
            elif timing := self._advance(self._runs[id]):
                return timing
        if until < math.inf:
            self.time = max(self.time, until)
        return None

    def drop(self, ids: Iterable[str]) -> list[Timing]:
        """Give jobs up, now."""
        return [
            self._end(id, is_complete=False) for id in ids if id in self._runs
        ]

    def shares(
        self, timing: Timing, since: float = -math.inf
    ) -> tuple[float, float]:
        """Return how long a job's messages were under way and its client computed.

        Neither counts times in which the client was away, as a job makes no progress then. A
        transfer on a shared link does, so there these times count.

        Parameters
        ----------
        timing : Timing
        since : float
            Times before this moment do not count.

        Returns
        -------
        (float, float)
            Seconds.
        """

        def seconds_present(start: float, end: float) -> float:
            start = max(start, since)
            if start >= end:
                return 0.0
            return self._presence.between(timing.job.client, start, end)

        def seconds(start: float, end: float) -> float:
            return max(0.0, end - max(start, since))

        transfer = seconds if self._links.is_shared else seconds_present
        request = transfer(timing.began, timing.received)
        answer = transfer(timing.computed, timing.arrived)
        computing = seconds_present(timing.received, timing.computed)
        return request + answer, computing

    def wait(self, until: float) -> None:
        """Let time pass in which no job is under way."""
        assert self.is_idle
        self.time = max(self.time, until)

    # --- events

    def _schedule(self, time: float, id: str, kind: str) -> None:
        # A number for each event, so that equal times keep their order.
        self._count += 1
        # A job that is complete just when it is due is complete, so giving up comes last.
        order = 2 if kind == "due" else 0
        heapq.heappush(self._events, (time, order, self._count, id, kind))

    def _next_event(self) -> _Event:
        # Events of jobs that were given up stay in the heap, as removing them there is slow.
        while self._events and self._events[0][3] not in self._runs:
            heapq.heappop(self._events)
        events = self._events[:1]
        for direction, pipe in enumerate(self._pipes):
            transfer = pipe.next()
            if transfer is not None:
                time, id = transfer
                events.append((time, 1, direction, id, "moved"))
        return min(events)

    def _begin(self, id: str) -> None:
        # A client that is away begins when it is back.
        client = self._runs[id].job.client
        time = self._presence.completion(client, self.time, 0.0)
        self._schedule(time, id, "begin")

    def _advance(self, run: _Run) -> Timing | None:
        """Take a job to its next stage.

        It sets out, comes to the client, is computed, and its answer comes back.
        """
        job = run.job
        if run.pipe is not None:
            run.pipe.leave(job.id, self.time)
            run.pipe = None
        if len(run.marks) == 3 and not (job.is_lost and job.due < math.inf):
            return self._end(job.id, is_complete=True)
        run.marks.append(self.time)
        # Nobody knows that the answer is lost until it is due.
        if len(run.marks) == 4:
            return None
        if len(run.marks) == 2:
            time = self._presence.completion(job.client, self.time, job.seconds)
            self._schedule(time, job.id, "computed")
        else:
            self._send(run)
        return None

    def _send(self, run: _Run) -> None:
        """Send the request of a job, or its answer."""
        job = run.job
        delay = job.delays[run.direction]
        if self._links.is_shared:
            # The delay is not the link's: a transfer uses the link only after it.
            self._schedule(self.time + delay, job.id, "join")
            return
        size = (job.down, job.up)[run.direction]
        rates = (self._links.down, self._links.up)[run.direction]
        seconds = delay + size / rates[job.client]
        time = self._presence.completion(job.client, self.time, seconds)
        self._schedule(time, job.id, "moved")

    def _enter(self, run: _Run) -> None:
        """Have a job's transfer join the shared link."""
        job = run.job
        run.pipe = self._pipes[run.direction]
        run.pipe.join(job.id, (job.down, job.up)[run.direction], self.time)

    def _end(self, id: str, is_complete: bool) -> Timing:
        """End a job, and begin the next one of its client."""
        run = self._runs.pop(id)
        if run.pipe is not None:
            run.pipe.leave(id, self.time)
        queue = self._queues[run.job.client]
        # A waiting job may be given up too; the client then goes on with its own.
        was_at_work = queue[0] == id
        queue.remove(id)
        if was_at_work and queue:
            self._begin(queue[0])
        missing = 4 - len(run.marks)
        began, received, computed, arrived = (*run.marks, *[self.time] * missing)
        return Timing(
            run.job,
            run.given_at,
            began,
            received,
            computed,
            arrived,
            self.time,
            is_complete,
        )
