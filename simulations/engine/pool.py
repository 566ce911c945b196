"""The pool of Ray workers: starting, replacing and stopping them."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError

from fedknow.protocols.config import ConfigError
from fedknow.protocols.texts import counted
from fedknow.server.checks.faults import RunError
from fedknow.simulations.engine.batches import DEATHS, first_line
from fedknow.simulations.engine.travel import Started
from fedknow.simulations.engine.worker import Worker

__all__ = ["WorkerPool", "get", "ray_failing"]

log = logging.getLogger(__name__)

Spawn = Callable[[], "ActorHandle[Worker]"]

TELL_SECONDS = 20.0
"""Seconds after which the log tells of workers that wait for a place."""


class WorkerPool:
    """Worker processes, each known by its place.

    A place is *ready* when its worker has built its node. Until then, no work goes there. In a
    cluster a new worker may wait for free cores, or for a machine to come.

    Parameters
    ----------
    count : int
        Number of workers.
    spawn : callable
        Makes a worker.
    on_ready : callable, optional
        Called with a place and what its new worker says.

    Attributes
    ----------
    workers : list of ActorHandle
    starting : dict of ObjectRef to int
        Places that are not ready, by the calls that their workers answer when they are.
    homes : dict of int to int
        Place of the worker that has a client's state in memory, by client.
    peaks : dict of int to float
        Peak of resident memory of a place's workers, also of earlier ones, MB.
    machines : dict of int to str
        Name of the machine of a place's worker.

    Raises
    ------
    RunError
        If workers die again and again while they start.
    """

    def __init__(
        self,
        count: int,
        spawn: Spawn,
        on_ready: Callable[[int, Started], None] | None = None,
    ) -> None:
        self._spawn = spawn
        self._on_ready = on_ready
        self.workers: list[ActorHandle[Worker]] = []
        self.starting: dict[ray.ObjectRef, int] = {}
        self.homes: dict[int, int] = {}
        self.peaks: dict[int, float] = {}
        self.machines: dict[int, str] = {}
        self._deaths: dict[int, int] = {}
        self._nodes: dict[int, str] = {}
        self._next_word = time.monotonic() + TELL_SECONDS
        self.grow(count)

    def grow(self, count: int) -> None:
        """Start so many more workers, at new places."""
        for _ in range(count):
            self.workers.append(self._spawn())
            self._begin(len(self.workers) - 1)

    def grow_to(self, count: int) -> None:
        """Start workers, if there are fewer than so many."""
        extra = count - len(self.workers)
        if extra > 0:
            log.warning(
                "the Ray cluster has room for %s more", counted(extra, "worker")
            )
            self.grow(extra)

    def ready(self) -> list[int]:
        """Return the places that can be given work."""
        waiting = set(self.starting.values())
        return [
            place for place in range(len(self.workers)) if place not in waiting
        ]

    def start(self) -> None:
        """Wait until all workers that find a place have built their nodes."""
        with ray_failing("while workers started"):
            while self.starting:
                arrived, _ = ray.wait(list(self.starting), timeout=TELL_SECONDS)
                for ref in arrived:
                    self.welcome(ref)
                self.tell()
                # Others may hold the places until they end, and might wait for ours.
                if not arrived and self.ready():
                    return

    def poll(self) -> None:
        """Take in the workers that are ready by now."""
        if self.starting:
            refs = list(self.starting)
            for ref in ray.wait(refs, num_returns=len(refs), timeout=0)[0]:
                self.welcome(ref)

    def welcome(self, ref: ray.ObjectRef) -> int | None:
        """Take in a worker whose call of :attr:`starting` has ended.

        Returns
        -------
        int or None
            Its place; None if it died, and another one is started there.

        Raises
        ------
        RunError
            If that happened as often as it may.
        """
        place = self.starting.pop(ref)
        try:
            started: Started = get(ref)
        except RayActorError as error:
            raise_missing_module(error)
            self._deaths[place] = self._deaths.get(place, 0) + 1
            if self._deaths[place] >= DEATHS and not self.went_with_node(
                place, error
            ):
                raise
            log.warning(
                "a worker died while it started; another one is started: %s",
                first_line(error),
            )
            self.replace([place])
            return None
        self._deaths.pop(place, None)
        self._nodes[place] = started.node
        self.machines[place] = started.machine
        self.peaks[place] = max(
            self.peaks.get(place, 0.0), started.peak_memory_mb
        )
        if self._on_ready is not None:
            self._on_ready(place, started)
        return place

    def tell(self) -> None:
        """Log what workers wait for: 20 s after the first began to, and so on."""
        moment = time.monotonic()
        if not self.starting or moment < self._next_word:
            return
        self._next_word = moment + TELL_SECONDS
        free = ray.available_resources()  # type: ignore[no-untyped-call]
        log.warning(
            "%s of %d start or wait for a place in the Ray cluster, and %d are ready (%g cores and "
            "%g GPUs are free); another run may hold the cores, or a machine is gone",
            counted(len(self.starting), "worker"),
            len(self.workers),
            len(self.ready()),
            free.get("CPU", 0),
            free.get("GPU", 0),
        )

    def went_with_node(self, place: int, error: Exception) -> bool:
        """Return whether a worker that died went with its machine."""
        # Ray says so if it knows by now; else its list of machines may know.
        if "node has died" in str(error):
            return True
        node = self._nodes.get(place)
        return any(
            entry["NodeID"] == node and not entry["Alive"]
            for entry in ray.nodes()  # type: ignore[no-untyped-call]
        )

    def replace(self, places: Collection[int]) -> None:
        """End workers, and start others in their places."""
        for place in places:
            # Certainly dead now, whatever Ray thought: it must not write a state any more.
            ray.kill(self.workers[place])
            # In the same place: queues and clients' homes go by places.
            self.workers[place] = self._spawn()
            self._begin(place)

    def _begin(self, place: int) -> None:
        if not self.starting:
            self._next_word = time.monotonic() + TELL_SECONDS
        self.starting = {
            ref: waiting
            for ref, waiting in self.starting.items()
            if waiting != place
        }
        self.starting[self.workers[place].start.remote()] = place

    def close(self) -> None:
        """End all workers."""
        # Without Ray they are gone, and asking Ray for anything would start it again.
        if ray.is_initialized():
            closing = [
                self.workers[place].close.remote() for place in self.ready()
            ]
            # Those that are stuck or gone are ended all the same.
            if closing:
                ray.wait(closing, num_returns=len(closing), timeout=5)
            for worker in self.workers:
                ray.kill(worker)
        self.workers = []
        self.starting = {}


def raise_missing_module(error: RayActorError) -> None:
    """Raise a sentence if a worker died for lack of a module.

    Raises
    ------
    ConfigError
        Naming the machine, the module and the remedy.
    """
    text = str(error)
    missing = re.search(r"ModuleNotFoundError: ([^\n]+)", text)
    if missing is None:
        return
    machine = re.search(r"ip[=:] ?([^\s,)]+)", text)
    place = machine[1] if machine else "unknown"
    raise ConfigError(
        f"a worker on machine {place} cannot start: {missing[1]}; install it there too, or set "
        "engine.code to the folder of your modules"
    ) from error


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
