"""The process of a Ray worker: it answers messages for clients."""

from __future__ import annotations

import gc
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import ray
import torch

from fedknow.client.data.stream import TaskStream
from fedknow.client.host import Answerer, Host
from fedknow.protocols import parts
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.messages import Arrays, Message, client_of
from fedknow.server.checks.replies import Inspector
from fedknow.server.grids.process_memory import process_peak_mb
from fedknow.server.grids.running_mean import averaged
from fedknow.simulations.engine.packing import Answered, Job, pack, unshare
from fedknow.simulations.engine.travel import Files, ScratchStore, Started, States

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
    states : States
        The folder of client states.
    node : callable, optional
        Makes the node; by default :class:`fedknow.client.node.Node`.
    objects : mapping, optional
        Classes of the user that the experiment names, by name.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        stream: TaskStream,
        states: States,
        node: NodeFactory | None = None,
        objects: Mapping[str, Any] | None = None,
    ) -> None:
        # Workers share the cores, and sums are then taken in one order everywhere.
        torch.set_num_threads(1)
        # A notebook's classes are in no module of this process.
        parts.restore(objects or {})
        self._made_from = config, stream, states, node
        self._host: Host | None = None
        self._scratch: ScratchStore | None = None
        self._shared: dict[str, Arrays] = {}

    def start(self) -> Started:
        """Build the node, and raise the experiment's faults here.

        Raises
        ------
        ConfigError
            If the experiment's node cannot be built on this machine.
        """
        # Not in the constructor: there, Ray turns an error into the actor's death.
        if self._host is None:
            self._host = self._make_host()
            # As the grid does in its process: the collector need not walk through modules.
            gc.freeze()
        is_private = self._scratch is not None
        node: str = ray.get_runtime_context().get_node_id()
        return Started(process_peak_mb(), socket.gethostname(), node, is_private)

    def _make_host(self) -> Host:
        config, stream, states, node = self._made_from
        memory_bytes = config.engine.memory_mb * 2**20
        # The server's checkpoints wait for this machine's disk, but not for that of others.
        store = states.store(memory_bytes, durable=bool(config.engine.address))
        if isinstance(store, ScratchStore):
            self._scratch = store
        try:
            answerer = node(config, stream) if node else None
            return Host(config, stream, store, answerer)
        except ConfigError as error:
            if not config.engine.address:
                raise
            # The driver has built the same parts: it is this machine that lacks something.
            raise ConfigError(
                f"on machine {socket.gethostname()}: {error}; install it there too, or set "
                "engine.code to the folder of your modules"
            ) from error

    def close(self) -> None:
        """Delete what this process keeps on its machine."""
        if self._scratch is not None:
            self._scratch.remove()

    def work(
        self,
        jobs: Sequence[Job],
        shared: Sequence[ray.ObjectRef],
        average: bool = False,
        files: Mapping[str, np.ndarray] | None = None,
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
        files : mapping of str to ndarray, optional
            Client states that this worker lacks (:mod:`fedknow.simulations.engine.travel`).
        """
        # A worker that replaces a dead one has not been started.
        self.start()
        assert self._host is not None
        if self._scratch is not None:
            self._scratch.receive(files or {})
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
        return Answered(
            light_answers,
            packed,
            seconds,
            process_peak_mb(),
            self._new_files(answers),
        )

    def _new_files(self, answers: Sequence[tuple[Message, int]]) -> Files:
        """Take the states that a batch has left, to go back with its answers."""
        if self._scratch is None:
            return {}
        files = self._scratch.give_back()
        # The last answer to each client decides what it holds.
        self._scratch.keep_only(
            {client_of(reply.node): version for reply, version in answers}
        )
        return files

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
