"""Delivery: how messages reach clients, what time it takes, and which states clients have."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from types import TracebackType
from typing import Any, Self

from fedknow.client.compute.heap import keep_freed
from fedknow.client.state import StateStore
from fedknow.protocols.messages import STATE_LOST, Message, client_of, node_of
from fedknow.server.grids.process_memory import process_peak_mb
from fedknow.server.grids.wave import WaveOptions

__all__ = ["Answers", "Delivery"]

Answers = Generator[tuple[Message, int], None, None]
"""Answers, each with the version of the client's state after it."""


class Delivery(ABC):
    """How messages reach clients.

    Parameters
    ----------
    clients : int
        Number of clients; their node ids are 2, 3, ...
    store : StateStore, optional
        Where the states of clients lie, for :meth:`prune`; nothing is pruned without.
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
        # A wave makes many small objects, and Python's collector would time and again walk
        # through all that was there before it (modules, mostly): 0.1 s each time.
        gc.freeze()
        keep_freed()

    # --- the work

    @abstractmethod
    def deliver(
        self, work: Sequence[Message], timeout: float | None, options: WaveOptions
    ) -> Answers:
        """Have clients do the work, each from the state that ``versions`` says.

        Work for one client is done in the order given, each piece from the state after the piece
        before.

        Parameters
        ----------
        work : sequence of Message
            The work.
        timeout : float or None
            Seconds after which unanswered work is given up.
        options : WaveOptions
            What the experiment wants of the wave.

        Yields
        ------
        tuple of Message and int
            The answers as they arrive, each with the version of the client's state after it.
        """

    def perform(
        self, work: Sequence[Message], timeout: float | None, options: WaveOptions
    ) -> Answers:
        """Deliver work, and deliver it again to clients that begin anew.

        A client whose state is lost goes back to none, as the server's versions say, so the same
        happens on every grid.

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
        if lost:
            repeated = [message for message in work if message.id in lost]
            with closing(self.deliver(repeated, timeout, options)) as answers:
                yield from answers

    def must_begin_anew(
        self, reply: Message, version: int, options: WaveOptions
    ) -> bool:
        """Return whether a client lost its state and may begin anew; if so, put it on record.

        Parameters
        ----------
        reply : Message
            The client's answer.
        version : int
            Version of the state that the client was to start from.
        options : WaveOptions
            Only with ``on_lost_state`` may a client begin anew.
        """
        if (
            options.on_lost_state is None
            or reply.failure is None
            or reply.failure.code != STATE_LOST
            or not version
        ):
            return False
        client = client_of(reply.node)
        # Another piece of its work may have said so before; that is on record already.
        if self.versions.pop(client, 0):
            options.on_lost_state(client, reply.failure.reason)
        return True

    def collect_answers(
        self, work: Sequence[Message], timeout: float | None, options: WaveOptions
    ) -> Sequence[tuple[Message, int]]:
        """Collect the answers to pushed work that have arrived; wait for one if none has.

        By default clients are equally fast, so all answers arrive at once. A grid with a clock
        gives those that are due, in the order of arrival, and is asked again for the others.

        Parameters
        ----------
        work : sequence of Message
            Work pushed and not answered yet. Pieces pushed since the last call are begun.
        timeout : float or None
            Seconds of :attr:`clock_time` to wait for the first answer; None: as long as it takes.
        options : WaveOptions
            What the experiment wants of the work.

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
        """Note a failure that took the place of an unusable answer; by default do nothing."""

    # --- time and presence

    @property
    def clock_time(self) -> float:
        """Seconds on the clock by which pulls wait.

        It stands still where all clients are equally fast.
        """
        return 0.0

    def wait(self, until: float) -> None:
        """Let time pass in which nobody has work, up to a moment of :attr:`clock_time`.

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
        """Return the ids of all clients to whom waiting work may be given, ascending."""
        return list(self.get_node_ids())

    def elapsed(self) -> dict[str, float]:
        """Return virtual time so far and its parts, for events; empty without virtual time."""
        return {}

    def fleet(self) -> dict[str, Any]:
        """Return what clients' devices did so far, for ``fleet.json``; empty without devices."""
        return {}

    # --- client states

    def restore_versions(self, versions: Mapping[int, int]) -> None:
        """Go back to the client states of a checkpoint."""
        # In place: a grid in front of this one holds the same dictionary.
        restored = dict(versions)
        self.versions.clear()
        self.versions.update(restored)

    def state(self) -> dict[str, Any]:
        """Return what else belongs in a checkpoint, as JSON; empty without virtual time."""
        return {}

    def restore_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - as `state`
        """Go back to what :meth:`state` gave."""

    def prune(self) -> None:
        """Delete all client states but the present ones, once a checkpoint of these is on disk.

        A state never overwrites another, as each version has a file of its own. So the last
        checkpoint stays whole until then.
        """
        if self.store is not None:
            self.store.prune(self.versions)

    # --- life

    def peak_memory_mb(self) -> float:
        """Return the largest resident memory so far of the processes at work, MB (1e6 bytes).

        Each process's own peak, added up; memory they share (Ray's object store) counts in each
        that has touched it.
        """
        return process_peak_mb()

    def close(self) -> None:
        """Let go of what the grid holds; it is of no use afterwards."""
        gc.unfreeze()
        if self.store is not None:
            self.store.settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
