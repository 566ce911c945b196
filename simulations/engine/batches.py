"""Batches: the clients that a worker is given at once, and its death."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from fedknow.protocols.messages import Message
from fedknow.simulations.engine.packing import Job

__all__ = [
    "DEATHS",
    "WORKER_DIED",
    "BatchLimits",
    "clients_at_least",
    "first_line",
    "take_batch",
]

log = logging.getLogger(__name__)

WORKER_DIED = 8
"""Failure code of work on which workers died (Flower's ``CLIENT_APP_CRASHED``)."""
DEATHS = 3
"""Workers that may die on one client's work before it fails."""
SHORTEST_SECONDS = 0.02
"""Seconds of work below which a batch is not worth its while.

Asking a worker and being answered takes 3 ms to 6 ms.
"""


@dataclass(frozen=True)
class BatchLimits:
    """Bounds below which a batch is not cut into smaller ones.

    The smallest of the three decides. They bound how far apart workers may end.

    Attributes
    ----------
    clients : int
        Clients of a batch.
    seconds : float
        Seconds of work.
    share : float
        Part of a worker's share of the wave.
    """

    clients: int = 64
    seconds: float = 0.2
    share: float = 0.25


def clients_at_least(
    pace: float,
    clients: int,
    workers: int,
    limits: BatchLimits = BatchLimits(),
) -> int:
    """Return how many clients a batch has at least.

    Parameters
    ----------
    pace : float
        Seconds that a client takes; infinite where that is unknown.
    clients : int
        Pieces of work in the wave.
    workers : int
        Number of workers.
    limits : BatchLimits
        Bounds of a batch.
    """
    # With an infinite pace a batch has no least size.
    bound = min(
        int(limits.seconds / pace),
        # No batch may be so large that other workers idle at the end of a wave.
        int(limits.share * clients / workers),
        limits.clients,
    )
    return max(int(SHORTEST_SECONDS / pace), bound)


def take_batch(queue: deque[Job], at_least: int = 1) -> list[Job]:
    """Take half of a queue, or ``at_least`` clients of it.

    All are taken where fewer than that would remain.
    """
    # Half, so that batches grow smaller towards the end and workers finish together.
    size = max((len(queue) + 1) // 2, at_least)
    # A rest too small for a batch of its own goes along.
    if len(queue) - size < at_least:
        size = len(queue)
    # A client that a worker died on is at the front. It is tried alone, to tell it from the
    # innocent ones of the same batch.
    if queue and queue[0].deaths:
        size = 1
    return [queue.popleft() for _ in range(size)]


def retry_or_fail(
    batch: Sequence[Job], error: Exception, is_guilty: bool = True
) -> tuple[list[Job], list[tuple[Message, int]]]:
    """Decide what to do with a batch on which a worker died.

    Parameters
    ----------
    batch : sequence of Job
    error : Exception
        What Ray says of the death.
    is_guilty : bool
        Whether one of the clients may have caused it.

    Returns
    -------
    list of Job
        Jobs to try again.
    list of tuple of Message and int
        Failures of the jobs that were tried often enough, with the versions of the clients'
        states.
    """
    log.warning(
        "a worker died and is replaced; %d clients' work is done again: %s",
        len(batch),
        first_line(error),
    )
    repeated = []
    failures = []
    for job in batch:
        job.deaths += is_guilty
        if job.deaths < DEATHS:
            repeated.append(job)
            continue
        reason = (
            f"client {job.client}: {job.deaths} workers died on its "
            f"{job.work[0].kind!r} work ({first_line(error)}); "
            "if memory ran out, lower engine.workers or train.batch_size"
        )
        failures += [
            (message.fail(WORKER_DIED, reason), job.version)
            for message in job.work
        ]
    return repeated, failures


def even_queues(
    jobs: Sequence[Job], workers: int, homes: dict[int, int]
) -> list[deque[Job]]:
    """Make one queue a worker, of lengths that differ by one at most.

    As far as possible, a client stays with the worker that has its state in memory (``homes``).
    """
    queues: list[deque[Job]] = [deque() for _ in range(workers)]
    longest = math.ceil(len(jobs) / workers)
    moving = []
    for job in jobs:
        home = homes.get(job.client)
        # At home the client's state is in the worker's memory, and need not be read from disk.
        if home is not None and len(queues[home]) < longest:
            queues[home].append(job)
        else:
            moving.append(job)
    for job in moving:
        min(queues, key=len).append(job)
    return queues


def first_line(error: Exception) -> str:
    """Return the first line of an error's text."""
    return str(error).strip().partition("\n")[0]
