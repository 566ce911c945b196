"""Delivery of messages: ways to clients, their time, clients' states."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, Self

from fedknow.client.compute.heap import retain_freed_memory
from fedknow.client.state import StateStore
from fedknow.protocols.messages import STATE_LOST, Message, client_of, node_of
from fedknow.server.grids.process_memory import process_peak_mb
from fedknow.server.grids.wave import WaveOptions

__all__ = ["Answers", "Delivery"]

Answers = Generator[tuple[Message, int], None, None]
"""Answers, each with the version of the client's state after it."""


class Delivery(ABC):
    """A way on which messages reach clients.

    Parameters
    ----------
    clients : int
        Number of clients; their node ids are 2, 3, ...
    store : StateStore, optional
        The place of clients' states, for :meth:`prune`; nothing is pruned without.
    versions : dict, optional
        The versions of clients' states, where another delivery keeps them too.

    Attributes
    ----------
    versions : dict
        Version of each client's state; clients that are not in it are fresh.
    is_timed : bool
        Whether the clock moves on, so that one client may answer later than another.
    """

    is_timed = False

    def __init__(
        self,
        clients: int,
        store: StateStore | None = None,
        versions: dict[int, int] | None = None,
    ) -> None:
        self.clients = clients
        self.store = store
        self.versions = {} if versions is None else versions
        # A wave makes many small objects. Python's collector would walk through all older
        # ones (modules, mostly) again and again: 0.1 s each time.
        gc.freeze()
        retain_freed_memory()

    # --- the work

    @abstractmethod
    def deliver(
        self, work: Sequence[Message], timeout: float | None, options: WaveOptions
    ) -> Answers:
        """Have clients do the work, each from the state that ``versions`` says.

        Work for one client is done in the order given. Each piece starts from the state after
        the earlier one.

        Parameters
        ----------
        work : sequence of Message
            The work.
        timeout : float or None
            Seconds after which unanswered work is given up.
        options : WaveOptions
            The experiment's wishes for the wave.

        Yields
        ------
        tuple of Message and int
            The answers as they arrive, each with the version of the client's state after it.
        """

    def perform(
        self, work: Sequence[Message], timeout: float | None, options: WaveOptions
    ) -> Answers:
        """Deliver work, and deliver it again to clients that begin anew.

        A client whose state is lost goes back to none, as the server's versions say. So the
        same happens on every grid.

        Parameters
        ----------
        work, timeout, options
            As in :meth:`deliver`; work that is done anew has as long again.

        Yields
        ------
        tuple of Message and int
            As :meth:`deliver`.
        """
        requests = {message.id: message for message in work}
        lost: set[str] = set()
        with closing(self.deliver(work, timeout, options)) as answers:
            for reply, version in answers:
                if self.must_begin_anew(reply, version, options):
                    lost.add(requests[reply.reply_to].id)
                else:
                    yield reply, version
        # After the wave: a second one beside it could meet the same client twice at once.
        if lost:
            repeated = [message for message in work if message.id in lost]
            with closing(self.deliver(repeated, timeout, options)) as answers:
                yield from answers

    def must_begin_anew(
        self, reply: Message, version: int, options: WaveOptions
    ) -> bool:
        """Return whether a client begins anew; if so, put it on record.

        It does if its state is lost, and the wave allows it.

        Parameters
        ----------
        reply : Message
            The client's answer.
        version : int
            Version of the state that the client was to start from.
        options : WaveOptions
            Only with ``on_lost_state`` may a client begin anew.
        """
        if reply.failure is None or reply.failure.code != STATE_LOST:
            return False
        # Without a version it began with no state already: there is nothing to begin anew.
        if options.on_lost_state is None or not version:
            return False
        client = client_of(reply.node)
        # An earlier piece of its work may have said so; that is on record already.
        if self.versions.pop(client, 0):
            options.on_lost_state(client, reply.failure.reason)
        return True

    def collect_answers(
        self, work: Sequence[Message], timeout: float | None, options: WaveOptions
    ) -> Sequence[tuple[Message, int]]:
        """Collect the answers to pushed work, and wait for one if need be.

        By default clients are equally fast, so all answers arrive at once. A grid with a clock
        gives those that are due, in the order of arrival, and is asked again for the others.

        Parameters
        ----------
        work : sequence of Message
            Work pushed and not answered yet. Pieces pushed since the last call are begun.
        timeout : float or None
            Seconds of :attr:`clock_time` to wait for an answer; None: as long as it takes.
        options : WaveOptions
            The experiment's wishes for the work.

        Returns
        -------
        sequence of tuple of Message and int
            Answers, each with the version of the client's state after it. A failure with the
            code ``NO_ANSWER`` is work that is given up. Empty: none came in time, or none can
            come any more.
        """
        with closing(self.perform(work, None, options)) as answers:
            return sorted(answers, key=lambda answer: answer[0].node)

    def note_unusable(self, reply: Message) -> None:  # noqa: B027 - most grids keep no count
        """Note that an answer was unusable; by default do nothing."""

    # --- time and presence

    @property
    def clock_time(self) -> float:
        """Seconds on the clock by which pulls wait.

        It stands still where all clients are equally fast.
        """
        return 0.0

    def wait(self, until: float) -> None:
        """Let time pass without work, up to a moment of :attr:`clock_time`.

        Raises
        ------
        RuntimeError
            If the clock stands still.
        """
        raise RuntimeError(
            f"{type(self).__name__}: a clock that stands still never shows {until:g} s"
        )

    def gather(self, until: float) -> None:  # noqa: B027 - nothing to wait for without a clock
        """Let time pass until enough clients are present, up to a moment at most.

        By default nothing happens: all clients are present, or are waited for when they are given
        work.
        """

    @property
    def is_occupied(self) -> bool:
        """Whether clients that do pushed work can be asked nothing else."""
        return False

    def get_node_ids(self) -> list[int]:
        """Return the ids of all present clients, ascending."""
        return [node_of(client) for client in range(self.clients)]

    def members(self) -> list[int]:
        """Return the ids of all clients that may be given work, ascending."""
        return list(self.get_node_ids())

    def absent(self) -> list[int]:
        """Return the clients that are away now, ascending."""
        return []

    def elapsed(self) -> dict[str, float]:
        """Return virtual time so far and its parts; empty without such time."""
        return {}

    def fleet(self) -> dict[str, Any]:
        """Return the devices' accounts for ``fleet.json``; empty without any."""
        return {}

    # --- client states

    def restore_versions(self, versions: Mapping[int, int]) -> None:
        """Go back to the client states of a checkpoint."""
        # In place: a grid in front of this one holds the same dictionary.
        restored = dict(versions)
        self.versions.clear()
        self.versions.update(restored)

    def state(self) -> dict[str, Any]:
        """Return further parts of a checkpoint, as JSON; empty by default."""
        return {}

    def restore_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - as `state`
        """Go back to an earlier :meth:`state`."""

    def prune(self) -> None:
        """Delete older client states, once a checkpoint holds the present ones.

        Each version of a state has a file of its own and overwrites no other. So the latest
        checkpoint stays complete until then.
        """
        if self.store is not None:
            self.store.prune(self.versions)

    # --- life

    def peak_memory_mb(self) -> float:
        """Return the peak of resident memory, MB (1e6 bytes).

        Each process's own peak counts, with the memory that it shares with others.
        """
        return process_peak_mb()

    def close(self) -> None:
        """Release what the grid holds; it is of no use afterwards."""
        gc.unfreeze()
        if self.store is not None:
            self.store.settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
