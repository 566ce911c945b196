"""What runs in a Ray worker process, and what the grid sends it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import ray
import torch

from fedknow.client.data.stream import TaskStream
from fedknow.client.host import Answerer, Host
from fedknow.client.state import StateStore
from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.messages import Arrays, Message, Record
from fedknow.server.grid import process_peak_mb

__all__ = ["Job", "NodeFactory", "Shared", "Worker", "share", "unshare"]

NodeFactory = Callable[[ExperimentConfig, TaskStream], Answerer]
"""Makes what answers messages in a worker; cloudpickle must be able to carry it."""


@dataclass
class Job:
    """All the work of a wave for one client, in order, and the version of the state it starts from."""

    client: int
    version: int
    work: list[Message] = field(default_factory=list)
    deaths: int = 0
    """Workers that died on it."""


@dataclass(frozen=True)
class Shared:
    """Stands in a message for arrays that many messages of a wave carry and that travel once: their place in a list."""

    place: int


def share(jobs: Sequence[Job]) -> tuple[list[Job], list[Arrays]]:
    """Take arrays that more than one message carries (the same object) out of the messages.

    Returns
    -------
    tuple
        The jobs with :class:`Shared` in the arrays' stead, and the arrays.
    """
    counts: dict[int, int] = {}
    for message in (message for job in jobs for message in job.work):
        for record in message.content.values():
            counts[id(record)] = counts.get(id(record), 0) + 1
    places: dict[int, Shared] = {}
    arrays: list[Arrays] = []

    def light(record: Record) -> Record | Shared:
        if not isinstance(record, Arrays) or counts[id(record)] == 1:
            return record
        if id(record) not in places:
            places[id(record)] = Shared(len(arrays))
            arrays.append(record)
        return places[id(record)]

    def strip(message: Message) -> Message:
        content = {name: light(record) for name, record in message.content.items()}
        return replace(message, content=content)  # type: ignore[arg-type]

    return [replace(job, work=[strip(message) for message in job.work]) for job in jobs], arrays


def unshare(message: Message, arrays: Sequence[Arrays]) -> Message:
    """Put the arrays that :func:`share` took out back into a message."""
    content: Mapping[str, Record | Shared] = message.content
    full = {name: arrays[r.place] if isinstance(r, Shared) else r for name, r in content.items()}
    return replace(message, content=full)


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
        self, config: ExperimentConfig, stream: TaskStream, folder: Path, node: NodeFactory | None = None
    ) -> None:
        torch.set_num_threads(1)
        self._made_from = config, stream, folder, node
        self._host: Host | None = None
        self._shared: dict[str, Arrays] = {}

    def start(self) -> None:
        """Build the node, so that what is wrong with the experiment is raised here."""
        # Not in the constructor: there, Ray turns an error into the actor's death.
        if self._host is None:
            config, stream, folder, node = self._made_from
            store = StateStore(folder, config.engine.memory_mb * 2**20)
            self._host = Host(config, stream, store, node(config, stream) if node else None)

    def peak_memory_mb(self) -> float:
        """Largest resident memory of this process so far, MB."""
        return process_peak_mb()

    def work(self, jobs: Sequence[Job], shared: Sequence[ray.ObjectRef]) -> list[tuple[Message, int]]:
        """Do jobs one after the other.

        Parameters
        ----------
        jobs : sequence of Job
            The work.
        shared : sequence of ObjectRef
            The arrays that :class:`Shared` stands for; each is taken from the store once a wave.

        Returns
        -------
        list of (Message, int)
            An answer to each message, in order, and the version of the client's state after it.
        """
        self.start()
        assert self._host is not None
        self._shared = {
            ref.hex(): self._shared[ref.hex()] if ref.hex() in self._shared else ray.get(ref) for ref in shared
        }
        arrays = list(self._shared.values())
        answers = []
        for job in jobs:
            version = job.version
            for message in job.work:
                reply, version = self._host.handle(unshare(message, arrays), version)
                answers.append((reply, version))
        return answers
