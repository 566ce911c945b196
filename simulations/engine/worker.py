"""The process of a Ray worker: it answers messages for clients."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
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
"""Makes the node of a worker; cloudpickle must be able to carry it."""


class Worker:
    """A process that answers messages for any clients; a Ray actor.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment.
    stream : TaskStream
        The clients' data; its arrays lie in Ray's object store and are read-only.
    folder : Path
        The folder of client states; all workers see the same.
    node : callable, optional
        Makes the node; by default :class:`fedknow.client.node.Node`.
    objects : mapping, optional
        Classes of the user that the experiment names, by name.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        stream: TaskStream,
        folder: Path,
        node: NodeFactory | None = None,
        objects: Mapping[str, Any] | None = None,
    ) -> None:
        # Workers share the cores, and sums are then taken in one order everywhere.
        torch.set_num_threads(1)
        # A notebook's classes are in no module of this process.
        parts.restore(objects or {})
        self._made_from = config, stream, folder, node
        self._host: Host | None = None
        self._shared: dict[str, Arrays] = {}

    def start(self) -> float:
        """Build the node, and raise the experiment's faults here.

        Returns
        -------
        float
            Peak of this process's memory, MB.
        """
        # Not in the constructor: there, Ray turns an error into the actor's death.
        if self._host is None:
            config, stream, folder, node = self._made_from
            # The server's checkpoints wait for this machine's disk, but not for that of others.
            store = StateStore(
                folder,
                config.engine.memory_mb * 2**20,
                durable=bool(config.engine.address),
            )
            answerer = node(config, stream) if node else None
            self._host = Host(config, stream, store, answerer)
            # As the grid does in its process: the collector need not walk through modules.
            gc.freeze()
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
            The arrays that :class:`Shared` stands for.
        average : bool
            Whether the clients' parameters are to be averaged here
            (:func:`fedknow.server.grids.running_mean.averaged`).
        """
        # A worker that replaces a dead one has not been started.
        self.start()
        assert self._host is not None
        arrays = self._load_shared(shared)
        messages = chain.from_iterable(job.work for job in jobs)
        work = [unshare(message, arrays) for message in messages]
        versions = {job.client: job.version for job in jobs}
        began = time.perf_counter()
        answering = self._host.handle_many(work, versions)
        if average:
            limit = self._made_from[0].engine.max_update_norm
            # The server records failures; here they are only left out of the mean.
            inspector = Inspector(lambda failure: None, limit)
            answering = averaged(work, answering, inspector)
        # A list, as clients work while it is made: that is the time to measure.
        answers = list(answering)
        seconds = time.perf_counter() - began
        light, packed = pack([reply for reply, _ in answers])
        new_versions = [version for _, version in answers]
        light_answers = list(zip(light, new_versions, strict=True))
        return Answered(light_answers, packed, seconds, process_peak_mb())

    def _load_shared(self, refs: Sequence[ray.ObjectRef]) -> list[Arrays]:
        """Take arrays from Ray's store, each once a wave."""
        loaded: dict[str, Arrays] = {}
        for ref in refs:
            key = ref.hex()
            loaded[key] = (
                self._shared[key] if key in self._shared else ray.get(ref)
            )
        # Those of earlier waves are dropped, so that the store can let go of them.
        self._shared = loaded
        return list(loaded.values())
