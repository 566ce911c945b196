"""What runs in a Ray worker process, and what the grid sends it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from fedknow.client.data.stream import TaskStream
from fedknow.client.host import Answerer, Host
from fedknow.client.state import StateStore
from fedknow.protocols import parts
from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.messages import Arrays
from fedknow.server.checks.replies import Inspector
from fedknow.server.grids.process_memory import process_peak_mb
from fedknow.server.grids.running_mean import averaged
from fedknow.simulations.engine.packing import Answered, Job, pack, unshare

__all__ = ["NodeFactory", "Worker"]

NodeFactory = Callable[[ExperimentConfig, TaskStream], Answerer]
"""Makes what answers messages in a worker; cloudpickle must be able to carry it."""


class Worker:
    """A process that answers messages for whichever clients it is given; a Ray actor.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment.
    stream : TaskStream
        The clients' data; its arrays lie in Ray's object store and are read-only.
    folder : Path
        Where client states lie; all workers see the same.
    node : callable, optional
        Makes the node; by default :class:`fedknow.client.node.Node`.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        stream: TaskStream,
        folder: Path,
        node: NodeFactory | None = None,
        objects: Mapping[str, Any] | None = None,
    ) -> None:
        # One thread a worker: workers share the cores, and sums are then taken in one order
        # everywhere.
        torch.set_num_threads(1)
        parts.restore(objects or {})  # a notebook's classes are in no module here
        self._made_from = config, stream, folder, node
        self._host: Host | None = None
        self._shared: dict[str, Arrays] = {}

    def start(self) -> float:
        """Build the node, so that what is wrong with the experiment is raised here; largest memory
        so far, MB."""
        # Not in the constructor: there, Ray turns an error into the actor's death.
        if self._host is None:
            config, stream, folder, node = self._made_from
            # The server's checkpoints wait for this machine's disk, but not for that of others.
            store = StateStore(
                folder,
                config.engine.memory_mb * 2**20,
                durable=bool(config.engine.address),
            )
            self._host = Host(
                config, stream, store, node(config, stream) if node else None
            )
            gc.freeze()  # as the grid does in its process
        return process_peak_mb()

    def work(
        self,
        jobs: Sequence[Job],
        shared: Sequence[ray.ObjectRef],
        average: bool = False,
    ) -> Answered:
        """Do jobs, one after the other or many at once (``engine.vectorize``).

        Parameters
        ----------
        jobs : sequence of Job
            The work.
        shared : sequence of ObjectRef
            The arrays that :class:`Shared` stands for; each is taken from the store once a wave.
        average : bool
            Whether the clients' parameters are to be averaged here
            (:func:`fedknow.server.grids.running_mean.averaged`).
        """
        self.start()
        assert self._host is not None
        # Kept from batch to batch of a wave; what the next wave does not name is let go.
        self._shared = {
            ref.hex(): self._shared[ref.hex()]
            if ref.hex() in self._shared
            else ray.get(ref)
            for ref in shared
        }
        arrays = list(self._shared.values())
        work = [unshare(message, arrays) for job in jobs for message in job.work]
        began = time.perf_counter()
        answering = self._host.handle_many(
            work, {job.client: job.version for job in jobs}
        )
        if average:
            limit = self._made_from[0].engine.max_update_norm
            answering = averaged(
                work, answering, Inspector(lambda failure: None, limit)
            )
        answers = list(answering)
        seconds = time.perf_counter() - began
        light, packed = pack([reply for reply, _ in answers])
        versions = [version for _, version in answers]
        return Answered(
            list(zip(light, versions, strict=True)), packed, seconds, process_peak_mb()
        )
