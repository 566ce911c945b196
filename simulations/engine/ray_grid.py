"""Virtual clients on Ray workers.

There is one process a core, work goes out in batches, and states outlive the workers.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError

from fedknow.client.data.stream import TaskStream
from fedknow.client.state.remote import is_url, open_states
from fedknow.protocols import parts
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.messages import Message, client_of, nbytes
from fedknow.server.grids.activity import Listener
from fedknow.server.grids.base import Adversary, Answers, MessageGrid
from fedknow.server.grids.wave import WaveOptions
from fedknow.simulations.engine.batches import (
    clients_at_least,
    even_queues,
    retry_or_fail,
)
from fedknow.simulations.engine.cluster import start_ray
from fedknow.simulations.engine.packing import (
    Answered,
    Job,
    detached,
    share,
    unpack,
)
from fedknow.simulations.engine.pool import WorkerPool, get, ray_failing
from fedknow.simulations.engine.travel import Courier
from fedknow.simulations.engine.waves import RayWave
from fedknow.simulations.engine.worker import NodeFactory, Worker

__all__ = ["RayGrid", "core_share", "gpu_share", "placement"]


class RayGrid(MessageGrid):
    """Clients on Ray workers.

    Answers do not depend on the number of workers, their speed, or deaths among them.

    A wave is cut into one queue a worker. A client goes to the worker that has its state in
    memory, as far as that keeps the queues equally long. A worker takes half of its queue at a
    time, and half of the longest queue when its own is empty. So large batches come early, and
    small ones even out the end. Where clients are quick, a worker takes all at once.

    Records that messages of a wave share are put into Ray's object store once. The arrays of a
    batch's answers are one buffer there, which strategies read in place. With ``running_mean``
    they are one mean of the batch's clients.

    A worker that dies is replaced. Its unanswered work is done again from the recorded states,
    client by client, so that a client which kills its worker is told from the innocent ones.
    After three deaths it gets a failure. A machine that goes away takes its workers along: others
    do their work, and new ones start where there is room, or wait for it.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment; ``engine.address`` names a Ray cluster to join, else Ray is started here
        (unless it is running in this process already) and stopped by :meth:`close`.
    stream : TaskStream
        The clients' data; put into the object store once.
    folder : str or PathLike
        The folder of client states, or a storage URL. Machines of a cluster that do not see the
        folder get states through Ray's object store.
    workers : int
        Number of workers; 0: ``engine.workers``, and if that is 0 too, one a core of the
        cluster, or one a GPU (``engine.device``).
    node : callable, optional
        ``node(config, stream)`` makes the node of a worker; by default
        :class:`fedknow.client.node.Node`.
    listener, adversary
        See :class:`~fedknow.server.grids.base.MessageGrid`.

    Raises
    ------
    ConfigError
        If the experiment's node cannot be built, its device is missing, or Ray cannot be
        started or joined.
    ConnectionError
        If there is no Ray cluster at the address.
    RunError
        If a worker dies again and again while it starts.
    """

    def __init__(  # noqa: PLR0913  # settings of a public class
        self,
        config: ExperimentConfig,
        stream: TaskStream,
        folder: str | os.PathLike[str],
        workers: int = 0,
        node: NodeFactory | None = None,
        listener: Listener | None = None,
        adversary: Adversary | None = None,
    ) -> None:
        # Workers read and write the states; this process only deletes old ones.
        url = str(folder) if is_url(folder) else ""
        store = open_states(url or os.path.abspath(folder), memory_bytes=0)
        super().__init__(
            stream.clients, store, listener=listener, adversary=adversary
        )
        # Workers of a Ray of our own are on this machine.
        has_other_machines = bool(config.engine.address)
        self._courier = Courier(store, has_other_machines, url)
        # A Ray that somebody else started is not ours to shut down.
        self._started_ray = not ray.is_initialized()
        self.pool: WorkerPool | None = None
        try:
            if self._started_ray:
                start_ray(config.engine.address, config.engine.code)
            fixed = workers or config.engine.workers
            fair = _share_out(config.engine.device, fixed, stream.clients)
            config = config.on_device(fair.device)
            self._cores, self._gpus = fair.cores, fair.gpus
            self._held_bytes_limit = fair.held_bytes
            self._pace: dict[str, float] = {}
            # Put once into the store, which gives each machine one copy for all its workers.
            self._made_from = (
                ray.put(config),
                ray.put(stream),
                self._courier.states,
                node,
            )
            names = [config.learner.name, config.model.name]
            self._objects = parts.snapshot(names)
            self._may_grow = has_other_machines and not (fixed or fair.gpus)
            self.pool = WorkerPool(
                fair.workers, self._spawn, self._courier.take_on
            )
            self.pool.start()
        # Also after Ctrl-C: Ray's processes must not be left behind.
        except BaseException:
            self.close()
            raise

    @property
    def workers(self) -> int:
        """Number of worker processes."""
        return len(self._running_pool().workers)

    def _running_pool(self) -> WorkerPool:
        assert self.pool is not None, "the grid is closed"
        return self.pool

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
        with ray_failing("in the run"):
            yield from self._deliver(work, timeout, options)

    def _deliver(
        self, work: Sequence[Message], timeout: float | None, options: WaveOptions
    ) -> Answers:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        wave = self._begin_wave(work, options)
        pool = self._running_pool()
        try:
            wave.submit_idle()
            held_bytes = 0
            while wave.is_open:
                ref = wave.wait(deadline)
                if ref is None:
                    return
                place, batch = wave.running.pop(ref)
                try:
                    answered: Answered = get(ref)
                except (
                    RayActorError,
                    OutOfMemoryError,
                    ObjectLostError,
                ) as error:
                    # Clients are not to blame for a machine that went away.
                    is_guilty = not pool.went_with_node(place, error)
                    pool.replace([place])
                    repeated, failures = retry_or_fail(batch, error, is_guilty)
                    # To the front and in order, so that the one to blame is found early.
                    wave.queues[place % len(wave.queues)].extendleft(
                        reversed(repeated)
                    )
                    # Others may have run out of work by now.
                    wave.submit_idle()
                    yield from failures
                    continue
                # Before the answers are looked at, so that no worker waits for us.
                self._note(place, batch, answered)
                wave.submit(place)
                for light, version in answered.answers:
                    reply = unpack(light, answered.arrays)
                    # What is averaged is added to a sum and let go; anything else that is read
                    # where it lies keeps its place in the store until the strategy is done.
                    if not wave.is_averaged:
                        held_bytes += nbytes(reply.content)
                        if held_bytes > self._held_bytes_limit:
                            reply = detached(reply)
                    yield reply, version
        finally:
            # Given up by timeout, interrupted, or ended by an error: workers that still run must
            # not write states any more.
            pool.replace({place for place, _ in wave.running.values()})

    def _begin_wave(
        self, work: Sequence[Message], options: WaveOptions
    ) -> RayWave:
        """Cut work into queues, and put shared arrays into the store."""
        jobs: dict[int, Job] = {}
        for message in work:
            client = client_of(message.node)
            job = jobs.setdefault(
                client, Job(client, self.versions.get(client, 0))
            )
            job.work.append(message)
        lean, arrays = share(list(jobs.values()))
        pool = self._running_pool()
        pool.poll()
        self._use_new_machines()
        # The slowest kind decides; a kind that was never seen is taken for slow.
        paces = [self._pace.get(message.kind, math.inf) for message in work]
        pace = max(paces, default=1.0)
        return RayWave(
            pool,
            self._courier,
            even_queues(lean, self.workers, pool.homes),
            [ray.put(record) for record in arrays],
            clients_at_least(pace, len(work), self.workers),
            options.averages(work),
        )

    def _note(self, place: int, batch: Sequence[Job], answered: Answered) -> None:
        """Note a worker's speed and memory, and the states it has left."""
        self._pace[batch[0].work[0].kind] = answered.seconds / len(batch)
        peaks = self._running_pool().peaks
        peaks[place] = max(peaks[place], answered.peak_memory_mb)
        # A failed client's state may be missing there, so nothing is taken for certain.
        versions = (
            (client_of(reply.node), 0 if reply.failure else version)
            for reply, version in answered.answers
        )
        self._courier.unpack(place, answered.files, versions)

    def _use_new_machines(self) -> None:
        # With a number of workers that is set, or a Ray of our own, none are to come.
        if self._may_grow:
            cores = ray.cluster_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
            fitting = int(cores / self._cores)
            self._running_pool().grow_to(min(fitting, self.clients))

    def peak_memory_mb(self) -> float:
        """Return the peak of resident memory of this process and all workers, MB.

        A worker's is from its latest answer, or from an earlier worker in its place.
        """
        return super().peak_memory_mb() + sum(self._running_pool().peaks.values())

    def close(self) -> None:
        """Stop the workers, and Ray if this grid started it."""
        if self.pool is not None:
            self.pool.close()
        self._courier.close()
        if self._started_ray:
            ray.shutdown()
            self._started_ray = False
        super().close()

    def _spawn(self) -> ActorHandle[Worker]:
        config, stream, states, node = self._made_from
        # Ray would restart a worker without our knowing; the pool replaces it instead.
        actor = ray.remote(Worker).options(
            num_cpus=self._cores, num_gpus=self._gpus, max_restarts=0
        )
        worker = actor.remote(config, stream, states, node, self._objects)
        return cast("ActorHandle[Worker]", worker)


@dataclass(frozen=True)
class _Shares:
    """How many workers there are, and what each of them has."""

    device: str
    workers: int
    cores: float
    gpus: float
    held_bytes: float


def _share_out(device: str, fixed: int, clients: int) -> _Shares:
    """Share the cluster out to workers; ``fixed`` is 0 for as many as fit."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    cores = [node["Resources"].get("CPU", 0.0) for node in nodes]
    device, gpus, fitting = placement(
        device, sum(cores), resources.get("GPU", 0.0)
    )
    count = min(fixed or fitting, clients)
    return _Shares(
        device,
        count,
        core_share(count, cores),
        gpu_share(count, gpus),
        # A quarter of a machine's object store: workers need the rest for what they send.
        resources.get("object_store_memory", 0.0) / (4 * len(nodes)),
    )


def core_share(workers: int, cores: Sequence[float]) -> float:
    """Return the part of a core with which all workers have a place.

    Parameters
    ----------
    workers : int
    cores : sequence of float
        Cores of each machine. No worker has parts of two machines.

    Examples
    --------
    >>> core_share(3, [1.0, 1.0])
    0.5
    """
    share = 1.0
    # A cluster whose machines have no cores yet: workers wait for some.
    while any(cores) and sum(int(c / share) for c in cores) < workers:
        # The largest share with which one more worker fits on some machine.
        share = max(c / (int(c / share) + 1) for c in cores)
        # More workers than cores share them; Ray counts in ten-thousandths.
        share = math.floor(1e4 * share) / 1e4
    return share


def placement(device: str, cores: float, gpus: float) -> tuple[str, float, int]:
    """Decide what workers compute on.

    Parameters
    ----------
    device : str
        ``engine.device``.
    cores, gpus : float
        Those of the cluster.

    Returns
    -------
    device : str
        ``engine.device`` without ``auto``.
    gpus : float
        GPUs that the workers share out.
    workers : int
        Workers that fit.

    Raises
    ------
    ConfigError
        If they are to have GPUs and there are none.
    """
    if device == "auto":
        has_cuda = torch.backends.cuda.is_built()  # type: ignore[no-untyped-call]
        device = "cuda" if gpus >= 1 and has_cuda else "cpu"
    if device == "cpu":
        return device, 0.0, max(1, int(cores))
    # A certain GPU of this machine: Ray, which hands out any, is not asked.
    if device != "cuda":
        return device, 0.0, 1
    if gpus < 1:
        raise ConfigError(
            "engine.device = 'cuda': Ray sees no GPU; set engine.device to 'cpu' or 'auto'"
        )
    return device, gpus, int(gpus)


def gpu_share(workers: int, gpus: float) -> float:
    """Return the part of a single GPU that each worker has.

    As few workers as possible share one.
    """
    if not gpus:
        return 0.0
    workers_per_gpu = math.ceil(workers / int(gpus))
    # Rounded down: Ray counts in ten-thousandths, and the parts must not exceed one GPU.
    return math.floor(1e4 / workers_per_gpu) / 1e4
