"""A wave under way: who does which part of its work."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, field

import ray

from fedknow.protocols.texts import counted
from fedknow.simulations.engine.batches import take_batch
from fedknow.simulations.engine.packing import Job
from fedknow.simulations.engine.pool import TELL_SECONDS, WorkerPool
from fedknow.simulations.engine.travel import Courier

__all__ = ["RayWave"]

log = logging.getLogger(__name__)

SILENT_SECONDS = 30.0
"""Seconds without an answer after which the log tells who is waited for."""


@dataclass
class RayWave:
    """A wave under way: a queue of jobs for each worker, and their batches.

    Attributes
    ----------
    pool : WorkerPool
    courier : Courier
        Brings states to workers that do not see the run folder.
    queues : list of deque of Job
        One a place of the pool.
    shared : list of ObjectRef
        Arrays that many messages carry.
    at_least : int
        Clients of the smallest batch.
    is_averaged : bool
        Whether workers average their clients' parameters.
    running : dict of ObjectRef to (int, list of Job)
        Batches at work, with their places.
    """

    pool: WorkerPool
    courier: Courier
    queues: list[deque[Job]]
    shared: list[ray.ObjectRef]
    at_least: int
    is_averaged: bool
    running: dict[ray.ObjectRef, tuple[int, list[Job]]] = field(
        default_factory=dict
    )
    _heard: float = field(default_factory=time.monotonic)
    _patience: float = SILENT_SECONDS

    @property
    def is_open(self) -> bool:
        """Whether there is work that is not done yet."""
        return bool(self.running) or any(self.queues)

    def submit_idle(self) -> None:
        """Give work to all workers that are ready and have none."""
        busy = {place for place, _ in self.running.values()}
        for place in self.pool.ready():
            if place not in busy:
                self.submit(place)

    def submit(self, place: int) -> None:
        """Give a worker its next batch: of its own queue, or else of the longest."""
        # A machine that came amid the wave has no queue of its own.
        jobs = self.queues[place] if place < len(self.queues) else None
        queue = jobs or max(self.queues, key=len)
        batch = take_batch(queue, self.at_least)
        if not batch:
            return
        files, fitting = self.courier.pack(place, batch)
        # Back to the front, for whoever comes next.
        queue.extendleft(reversed(batch[fitting:]))
        batch = batch[:fitting]
        self.pool.homes.update((job.client, place) for job in batch)
        worker = self.pool.workers[place]
        ref: ray.ObjectRef = worker.work.remote(
            batch, self.shared, self.is_averaged, files
        )
        self.running[ref] = place, batch

    def wait(self, deadline: float) -> ray.ObjectRef | None:
        """Wait for a batch to end; None when the time is over.

        Workers that become ready meanwhile get work. What is waited for is said in the log.
        """
        while True:
            seconds = max(0.0, deadline - time.monotonic())
            refs = [*self.running, *self.pool.starting]
            ready, _ = ray.wait(refs, timeout=min(seconds, TELL_SECONDS))
            if ready and ready[0] in self.running:
                self._heard = time.monotonic()
                return ready[0]
            if ready and self.pool.welcome(ready[0]) is not None:
                self.submit_idle()
            if not ready and time.monotonic() >= deadline:
                return None
            # Not only after 20 s in which nothing came: workers that come one by one would put
            # the word off.
            self.pool.tell()
            self._tell_silence()

    def _tell_silence(self) -> None:
        """Log which machines of a cluster have not answered for long."""
        silence = time.monotonic() - self._heard
        # On one machine, Ray knows of a death at once; long work needs no word there.
        if not self.courier.has_other_machines or silence < self._patience:
            return
        # Twice as late each time, as clients may just have much to do.
        self._patience *= 2
        places = {place for place, _ in self.running.values()}
        machines = {self.pool.machines.get(place, "?") for place in places}
        clients = sum(len(batch) for _, batch in self.running.values())
        log.warning(
            "no answer for %.0f s: %s on %s have %s to do; Ray notices within half a minute that "
            "a machine is gone",
            silence,
            counted(len(places), "worker"),
            ", ".join(sorted(machines)) or "no machine",
            counted(clients, "client"),
        )
