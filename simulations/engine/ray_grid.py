"""Virtual clients on Ray workers: one process a core, work in batches, states that outlive the
workers."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import (
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from fedknow.client.data.stream import TaskStream
from fedknow.client.state import StateStore
from fedknow.protocols import parts
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.messages import Mean, Message, client_of, nbytes
from fedknow.server.checks.faults import RunError
from fedknow.server.grids.base import Answers, MessageGrid
from fedknow.server.grids.wave import WaveOptions
from fedknow.simulations.engine.cluster import start_ray
from fedknow.simulations.engine.worker import (
    Answered,
    Job,
    NodeFactory,
    Worker,
    detached,
    share,
    unpack,
)

__all__ = ["WORKER_DIED", "RayGrid", "gpu_share", "placement"]

log = logging.getLogger(__name__)

WORKER_DIED = 8
"""Failure code of work on which workers died (Flower's ``CLIENT_APP_CRASHED``)."""
PATIENCE = 3
"""Workers that may die on one client's work before it fails."""

SHORTEST = 0.02
"""Seconds of work below which a batch is not worth its while: asking a worker and being answered
takes 3 ms, or 6."""
FEW = 64, 0.2, 0.25
"""So few clients are not cut into batches for less than so many seconds, nor below so much of a
worker's share of them: as far apart workers may end."""

_Batch = tuple[int, list[Job]]


class RayGrid(MessageGrid):
    """Clients on Ray workers. Answers do not depend on the number of workers, their speed, or what
    dies on the way.

    A wave is cut into one queue a worker, each client going to the worker that has its state in
    memory as far as that keeps the queues equally long. A worker takes half of its queue at a
    time, and half of the longest queue when its own is empty: few, large batches first, small
    ones to even out the end; where clients are quick, all at once. What messages of a wave
    share is put into Ray's object store once, and the arrays of a batch's answers are one
    buffer there, which strategies read where it lies; or with ``running_mean`` one mean of the
    batch's clients.

    A worker that dies is replaced, and what it had not answered is done again from the recorded
    states, client by client, so that a client which kills its worker is told from those that
    were with it; after three deaths it gets a failure.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment; ``engine.address`` names a Ray cluster to join, else Ray is started here
        (unless it is running in this process already) and stopped by :meth:`close`.
    stream : TaskStream
        The clients' data; put into the object store once.
    folder : str or PathLike
        Where client states lie. On a cluster all machines must see it.
    workers : int
        Number of workers; 0: ``engine.workers``, and if that is 0 too, one a core of the
        cluster, or one a GPU (``engine.device``).
    node : callable, optional
        ``node(config, stream)`` makes what answers in a worker; by default
        :class:`fedknow.client.node.Node`.

    Raises
    ------
    ConfigError
        If the experiment's node cannot be built, its device is not there, or Ray cannot be started
        or joined.
    ConnectionError
        If there is no Ray cluster at the address.
    RunError
        If a worker, or its machine, dies while it starts.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        stream: TaskStream,
        folder: str | os.PathLike[str],
        workers: int = 0,
        node: NodeFactory | None = None,
    ) -> None:
        super().__init__(stream.clients, StateStore(folder, memory_bytes=0))
        self._started_ray = not ray.is_initialized()
        self._workers: list[ActorHandle[Worker]] = []
        try:
            if self._started_ray:
                start_ray(config.engine.address)
            resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            cores = resources.get("CPU", 1.0)
            device, gpus, fitting = placement(
                config.engine.device, cores, resources.get("GPU", 0.0)
            )
            config = config.on_device(device)
            count = min(workers or config.engine.workers or fitting, stream.clients)
            # More workers than cores share them; Ray counts in ten-thousandths.
            self._cores = min(1.0, math.floor(1e4 * cores / count) / 1e4)
            self._gpus = gpu_share(count, gpus)
            room = resources.get("object_store_memory", 0.0)
            self._room = room / (4 * len(ray.nodes()))  # type: ignore[no-untyped-call]
            self._pace: dict[str, float] = {}
            self._made_from = (
                ray.put(config),
                ray.put(stream),
                Path(folder).absolute(),
                node,
            )
            self._workers = [self._spawn() for _ in range(count)]
            self._home: dict[int, int] = {}
            self._peaks: dict[int, float] = {}
            with _ray_failing("while workers started"):
                started = [worker.start.remote() for worker in self._workers]
                self._wait(started)
                self._peaks.update(enumerate(_get(started)))
        except BaseException:
            self.close()
            raise

    @property
    def workers(self) -> int:
        """Number of worker processes."""
        return len(self._workers)

    def deliver(
        self, work: Sequence[Message], timeout: float | None, options: WaveOptions
    ) -> Answers:
        """Have workers do the work; see :meth:`Delivery.deliver`.

        Raises
        ------
        StateError
            If a worker cannot read or write a client's state.
        RunError
            If Ray itself fails.
        Exception
            Whatever else is raised in a worker outside the node, which answers its own faults
            with failures.
        """
        with _ray_failing("in the run"):
            yield from self._deliver(work, timeout, options)

    def _deliver(
        self, work: Sequence[Message], timeout: float | None, options: WaveOptions
    ) -> Answers:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        jobs: dict[int, Job] = {}
        for message in work:
            client = client_of(message.node)
            jobs.setdefault(
                client, Job(client, self.versions.get(client, 0))
            ).work.append(message)
        lean, arrays = share(list(jobs.values()))
        shared = [ray.put(record) for record in arrays]
        queues = self._queues(lean)
        pace = max(
            (self._pace.get(message.kind, math.inf) for message in work), default=1.0
        )
        few, seconds, part = FEW
        least = max(
            int(SHORTEST / pace),
            min(int(seconds / pace), int(part * len(work) / self.workers), few),
        )
        average = options.averages(work)
        running: dict[ray.ObjectRef, _Batch] = {}
        held = 0

        def submit(index: int) -> None:
            batch = _take(queues[index] or max(queues, key=len), least)
            if batch:
                self._home.update((job.client, index) for job in batch)
                running[self._workers[index].work.remote(batch, shared, average)] = (
                    index,
                    batch,
                )

        try:
            for index in range(self.workers):
                submit(index)
            while running:
                left = deadline - time.monotonic()
                done, _ = ray.wait(
                    list(running), timeout=None if left == math.inf else max(0.0, left)
                )
                if not done:
                    return
                index, batch = running.pop(done[0])
                try:
                    answered: Answered = _get(done[0])
                except (RayActorError, OutOfMemoryError, ObjectLostError) as error:
                    self._replace([index])
                    again, failures = _after_death(batch, error)
                    queues[index].extendleft(reversed(again))
                    submit(index)
                    yield from failures
                else:
                    submit(
                        index
                    )  # before the answers are looked at, so that no worker waits for us
                    self._pace[batch[0].work[0].kind] = answered.seconds / len(batch)
                    self._peaks[index] = max(
                        self._peaks[index], answered.peak_memory_mb
                    )
                    for light, version in answered.answers:
                        reply = unpack(light, answered.arrays)
                        if isinstance(
                            reply.arrays(), Mean
                        ):  # it is added to others and let go
                            yield reply, version
                            continue
                        held += nbytes(reply.content)
                        # What is read where it lies keeps its place in the store until the
                        # strategy is done with it.
                        yield (
                            (reply if held <= self._room else detached(reply)),
                            version,
                        )
        finally:
            # Given up by timeout, interrupted, or left by an error: what still runs must not
            # write states any more.
            self._replace({index for index, _ in running.values()})

    def peak_memory_mb(self) -> float:
        """Largest resident memory of this process and of each worker, or the one in its place
        before, as it was known when it last answered; MB."""
        return super().peak_memory_mb() + sum(self._peaks.values())

    def close(self) -> None:
        """Stop the workers, and Ray if this grid started it."""
        if (
            ray.is_initialized()
        ):  # else they are gone, and asking Ray for anything would start it again
            for worker in self._workers:
                ray.kill(worker)
        self._workers = []
        if self._started_ray:
            ray.shutdown()
            self._started_ray = False
        super().close()

    def _spawn(self) -> ActorHandle[Worker]:
        config, stream, folder, node = self._made_from
        actor = ray.remote(Worker).options(
            num_cpus=self._cores, num_gpus=self._gpus, max_restarts=0
        )
        return cast(
            "ActorHandle[Worker]",
            actor.remote(config, stream, folder, node, parts.snapshot()),
        )

    def _wait(self, starting: list[ray.ObjectRef]) -> None:
        while starting:
            done, starting = ray.wait(starting, num_returns=len(starting), timeout=20)
            _get(done)
            if starting:
                free = ray.available_resources()  # type: ignore[no-untyped-call]
                log.warning(
                    "%d of %d workers wait for their place in the Ray cluster (%g cores and %g GPUs are free)",
                    *(
                        len(starting),
                        self.workers,
                        free.get("CPU", 0),
                        free.get("GPU", 0),
                    ),
                )

    def _replace(self, indices: Collection[int]) -> None:
        for index in indices:
            ray.kill(self._workers[index])  # certainly dead now, whatever Ray thought
            self._workers[index] = self._spawn()

    def _queues(self, jobs: Sequence[Job]) -> list[deque[Job]]:
        """One queue a worker, of lengths that differ by one at most, clients where they were as
        far as possible."""
        queues: list[deque[Job]] = [deque() for _ in self._workers]
        most = math.ceil(len(jobs) / len(queues))
        moving = []
        for job in jobs:
            home = self._home.get(job.client)
            if home is not None and len(queues[home]) < most:
                queues[home].append(job)
            else:
                moving.append(job)
        for job in moving:
            min(queues, key=len).append(job)
        return queues


def placement(device: str, cores: float, gpus: float) -> tuple[str, float, int]:
    """What workers compute on, in a cluster of so many cores and GPUs.

    Returns
    -------
    tuple
        ``engine.device`` without ``auto``; how many GPUs the workers share out; and how many
        workers fit.

    Raises
    ------
    ConfigError
        If they are to have GPUs and there are none.
    """
    if device == "auto":
        device = "cuda" if gpus >= 1 and torch.backends.cuda.is_built() else "cpu"  # type: ignore[no-untyped-call]
    if device == "cpu":
        return device, 0.0, max(1, int(cores))
    if (
        device != "cuda"
    ):  # that one of a machine: Ray, which hands out any, is not asked
        return device, 0.0, 1
    if gpus < 1:
        raise ConfigError(
            "engine.device = 'cuda': Ray sees no GPU; set engine.device to 'cpu' or 'auto'"
        )
    return device, gpus, int(gpus)


def gpu_share(workers: int, gpus: float) -> float:
    """How much of a GPU each worker has, if as few as possible share one; each has its part of a
    single GPU."""
    return math.floor(1e4 / math.ceil(workers / int(gpus))) / 1e4 if gpus else 0.0


def _take(queue: deque[Job], least: int = 1) -> list[Job]:
    """Half of a queue; at least ``least``, and all where less than that would be left."""
    size = max((len(queue) + 1) // 2, least)
    if len(queue) - size < least:
        size = len(queue)
    if (
        queue and queue[0].deaths
    ):  # what a worker died on is at the front, and is tried alone
        size = 1
    return [queue.popleft() for _ in range(size)]


def _after_death(
    batch: Sequence[Job], error: Exception
) -> tuple[list[Job], list[tuple[Message, int]]]:
    """What to try again after a worker died on a batch, and failures for what has been tried often
    enough."""
    log.warning(
        "a worker died and is replaced; %d clients' work is done again: %s",
        len(batch),
        _first_line(error),
    )
    again, failures = [], []
    for job in batch:
        job.deaths += 1
        if job.deaths < PATIENCE:
            again.append(job)
            continue
        reason = (
            f"client {job.client}: {job.deaths} workers died on its {job.work[0].kind!r} work ({_first_line(error)}); "
            "if memory ran out, lower engine.workers or train.batch_size"
        )
        failures += [
            (message.fail(WORKER_DIED, reason), job.version) for message in job.work
        ]
    return again, failures


def _get(refs: Any) -> Any:
    """``ray.get`` that raises what was raised in the worker, as it was raised there."""
    try:
        return ray.get(refs)
    except RayTaskError as error:
        raise (error.cause or error) from error


@contextmanager
def _ray_failing(when: str) -> Iterator[None]:
    """Raise what Ray fails with, such as a machine that went away, as a run's error."""
    try:
        yield
    except RayError as error:
        raise RunError(
            f"Ray failed {when}: {type(error).__name__}: {_first_line(error)}; if a machine or a "
            "worker died, look for what ended it; if memory ran out, lower engine.workers"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
