"""A node and the states of the clients it answers for: what one worker runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch

from fedknow.client.state import State, StateStore
from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.messages import Message, client_of

if TYPE_CHECKING:
    from fedknow.client.data.stream import TaskStream

__all__ = ["Answerer", "Host", "one_thread", "successor"]


class Answerer(Protocol):
    """A pure node: state in, state out (:class:`fedknow.client.node.Node`)."""

    def handle(self, message: Message, state: State) -> tuple[Message, State]:
        """Answer a message; the state given is not changed, and is given back itself where nothing is new."""
        ...


class Host:
    """Answers messages to any client, whose state it takes from a store and puts back under a new version.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment.
    stream : TaskStream or None
        The clients' data; ``None`` where a node is given.
    store : StateStore
        The clients' states.
    node : Answerer, optional
        What answers; by default :class:`fedknow.client.node.Node` of the two above.
    """

    def __init__(
        self, config: ExperimentConfig, stream: TaskStream | None, store: StateStore, node: Answerer | None = None
    ) -> None:
        if node is None:
            from fedknow.client.node import Node

            assert stream is not None  # as said above
            node = Node(config, stream)
        self.node = node
        self.store = store

    def handle(self, message: Message, version: int) -> tuple[Message, int]:
        """Answer a message for a client whose state has the given version.

        Returns
        -------
        tuple of Message and int
            The answer and the version of the client's state after it: the same where the state did not change.

        Raises
        ------
        StateError
            If the state cannot be read or written.
        """
        client = client_of(message.node)
        state = self.store.load(client, version)
        reply, after = self.node.handle(message, state)
        if after is state or not (after or state):
            return reply, version
        version = successor(version, message.id)
        self.store.save(client, version, after)
        return reply, version


def successor(version: int, id: str) -> int:
    """The version of a client's state after it answered the message of this id: a 48-bit digest of both, never 0.

    The same work done again gives the same version, and other work on the same state another, so that a file is
    never replaced by one with other content, whatever was lost, refused or done twice in between.
    """
    return int.from_bytes(hashlib.blake2b(f"{version}:{id}".encode(), digest_size=6).digest(), "big") or 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread, as every worker does: sums are taken in one order everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
