"""The pool of Ray workers: starting, replacing and stopping them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from fedknow.server.checks.faults import RunError
from fedknow.simulations.engine.batches import first_line
from fedknow.simulations.engine.worker import Worker

__all__ = ["WorkerPool", "get", "ray_failing"]

log = logging.getLogger(__name__)

Spawn = Callable[[], "ActorHandle[Worker]"]


class WorkerPool:
    """Worker processes, each known by its place.

    Parameters
    ----------
    count : int
        Number of workers.
    spawn : callable
        Makes a worker.

    Attributes
    ----------
    workers : list of ActorHandle
    homes : dict of int to int
        Place of the worker that has a client's state in memory, by client.
    peaks : dict of int to float
        Peak of resident memory of a place's workers, also of earlier ones, MB.

    Raises
    ------
    RunError
        If a worker, or its machine, dies while it starts.
    """

    def __init__(self, count: int, spawn: Spawn) -> None:
        self._spawn = spawn
        self.workers = [spawn() for _ in range(count)]
        self.homes: dict[int, int] = {}
        self.peaks: dict[int, float] = {}

    def start(self) -> None:
        """Wait until all workers have built their nodes."""
        with ray_failing("while workers started"):
            started = [worker.start.remote() for worker in self.workers]
            self._wait(started)
            self.peaks.update(enumerate(get(started)))

    def _wait(self, starting: list[ray.ObjectRef]) -> None:
        while starting:
            # Workers that find no free cores wait in silence, so the log tells of it.
            ready, starting = ray.wait(
                starting, num_returns=len(starting), timeout=20
            )
            get(ready)
            if starting:
                free = ray.available_resources()  # type: ignore[no-untyped-call]
                cores = free.get("CPU", 0)
                gpus = free.get("GPU", 0)
                log.warning(
                    "%d of %d workers wait for their place in the Ray cluster (%g cores and %g "
                    "GPUs are free)",
                    len(starting),
                    len(self.workers),
                    cores,
                    gpus,
                )

    def replace(self, places: Collection[int]) -> None:
        """End workers, and start others in their places."""
        for place in places:
            # Certainly dead now, whatever Ray thought: it must not write a state any more.
            ray.kill(self.workers[place])
            # In the same place: queues and clients' homes go by places.
            self.workers[place] = self._spawn()

    def close(self) -> None:
        """End all workers."""
        # Without Ray they are gone, and asking Ray for anything would start it again.
        if ray.is_initialized():
            for worker in self.workers:
                ray.kill(worker)
        self.workers = []


def get(refs: Any) -> Any:
    """Do ``ray.get``, and raise a worker's error as it was raised there."""
    try:
        return ray.get(refs)
    # Ray wraps it in an error of its own, which callers could not tell from others.
    except RayTaskError as error:
        raise (error.cause or error) from error


@contextmanager
def ray_failing(moment: str) -> Iterator[None]:
    """Raise errors of Ray, such as a machine that went away, as a run's."""
    try:
        yield
    except RayError as error:
        raise RunError(
            f"Ray failed {moment}: {type(error).__name__}: {first_line(error)}; if a machine or a "
            "worker died, look for what ended it; if memory ran out, lower engine.workers"
        ) from error
