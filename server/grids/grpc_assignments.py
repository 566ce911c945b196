"""Assignments: the work of each client on a gRPC server, and the answers."""

from __future__ import annotations

import logging
import queue
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedknow.protocols.messages import client_of
from fedknow.protocols.wire import Code, Parcel, WireError
from fedknow.server.grids.grpc_gate import Roster
from fedknow.server.grids.grpc_link import Link, Work
from fedknow.server.grids.grpc_membership import Membership

__all__ = ["Answer", "Assignments"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Answer:
    """A client's answer to its work; only the envelope has been read.

    Without a parcel there is none: the client is out of the run.
    """

    work: Work
    parcel: Parcel | None


class Assignments:
    """The work of each client, one piece at most, and the answers.

    Work is sent over the stream that the client has now, and again over the next one if that
    breaks. It is taken back when its answer comes. An answer to anything else is dropped, and
    counted.

    Only ``answers`` may be used outside the event loop.

    Parameters
    ----------
    roster : Roster
        The clients.
    membership : Membership
        Who is out of the run.

    Attributes
    ----------
    answers : SimpleQueue of Answer or Exception
        The answers so far; an exception is the service's own end.
    counts : Counter
        Answers and work by what became of them: ``duplicate``, ``late``, ``left_out``,
        ``refused``.
    progress : dict
        The work under way, as the server's status shows it.
    """

    def __init__(self, roster: Roster, membership: Membership) -> None:
        self.membership = membership
        self.answers: queue.SimpleQueue[Answer | Exception] = queue.SimpleQueue()
        self.counts: Counter[str] = Counter()
        self.progress: dict[str, Any] = {}
        self.roster = roster
        self._owners: dict[str, int] = {}

    def assign(
        self, works: Sequence[Work], progress: Mapping[str, Any] | None = None
    ) -> None:
        """Give out work, one piece a client, in place of what it had before."""
        if progress is not None:
            self.progress = dict(progress)
        for work in works:
            peer = self.roster.peers[work.node]
            peer.work = work
            self._owners[work.id] = work.node
            if client_of(work.node) in self.membership.ejected:
                self.give_up(work.node)
            elif peer.link is not None:
                peer.link.wake.set()

    def give_up(self, node: int) -> None:
        """Wait no longer for a client that is out of the run."""
        work = self.roster.peers[node].work
        if work is not None:
            self.drop(node)
            self.answers.put(Answer(work, None))

    def withdraw(self) -> None:
        """Take all clients' work back: no answers are wanted any more."""
        for peer in self.roster.peers.values():
            peer.work = None
        # Answers that are still on their way count as late.
        self._owners.clear()

    def drop(self, node: int) -> None:
        """Take one client's work back."""
        peer = self.roster.peers[node]
        if peer.work is not None:
            self._owners.pop(peer.work.id, None)
            peer.work = None

    def count(self, kind: str, number: int = 1) -> None:
        """Count what the grid saw.

        Parameters
        ----------
        kind : str
            ``late`` or ``refused`` answers, or work that was ``left_out``.
        number : int
            How many to add.
        """
        self.counts[kind] += number

    def take(self, link: Link, parcel: Parcel) -> None:
        """Take in a complete message from a client's stream.

        Raises
        ------
        WireError
            ``FOREIGN`` if it is in another client's name.
        """
        peer = link.peer
        # The stream was replaced, and the work is with the new one.
        if peer.link is not link:
            return
        client = client_of(peer.node)
        owner = self._owners.get(parcel.reply_to, peer.node)
        # A client that is let in must not answer for another one.
        if parcel.node != peer.node or owner != peer.node:
            raise WireError(
                Code.FOREIGN,
                f"client {client} answers in the name of node {parcel.node}, "
                f"work of node {owner}",
            )
        work = peer.work
        if work is None or work.id != parcel.reply_to:
            kind = "duplicate" if parcel.reply_to in self._owners else "late"
            self.count(kind)
            log.info(
                "client %d: %s answer dropped (to %r)",
                client,
                kind,
                parcel.reply_to,
            )
            return
        peer.work = None
        # Unread: to unpack arrays takes time that other clients' heartbeats need.
        self.answers.put(Answer(work, parcel))
