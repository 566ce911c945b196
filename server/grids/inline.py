"""Clients in this process, one after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from fedknow.client.host import one_thread
from fedknow.client.state import StateStore
from fedknow.protocols.messages import Message
from fedknow.server.grids.activity import Listener
from fedknow.server.grids.base import Adversary, Answers, MessageGrid
from fedknow.server.grids.wave import WaveOptions

__all__ = ["Hosting", "InlineGrid"]


class Hosting(Protocol):
    """Answers messages, and keeps client states by version.

    See :class:`fedknow.client.host.Host`.
    """

    def handle_many(
        self, messages: Sequence[Message], versions: Mapping[int, int]
    ) -> Iterator[tuple[Message, int]]:
        """Answer messages in order, each client from the state of this version.

        A client without a version begins with none (0). Gives the version of the client's state
        after each answer, too.
        """
        ...


class InlineGrid(MessageGrid):
    """Clients in this process, for tests, debugging and tiny runs.

    They have one thread, as in a worker.

    Parameters
    ----------
    clients : int
        Number of clients.
    host : Hosting
        Answers the messages (:class:`fedknow.client.host.Host`).
    store : StateStore, optional
        The host's states; by default its own ``store``, where it has one.
    listener, adversary
        See :class:`~fedknow.server.grids.base.MessageGrid`.
    """

    def __init__(
        self,
        clients: int,
        host: Hosting,
        store: StateStore | None = None,
        listener: Listener | None = None,
        adversary: Adversary | None = None,
    ) -> None:
        if store is None:
            # A host of a test may have none.
            store = getattr(host, "store", None)
        super().__init__(clients, store, listener=listener, adversary=adversary)
        self.host = host

    def deliver(
        self,
        work: Sequence[Message],
        timeout: float | None,
        options: WaveOptions,
    ) -> Answers:
        """Do the work in the order given; see :meth:`Delivery.deliver`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        answers = self.host.handle_many(work, self.versions)
        # The threads are set for each answer: between two, the caller's own code runs.
        while deadline is None or time.monotonic() < deadline:
            with one_thread():
                answer = next(answers, None)
            if answer is None:
                return
            yield answer
