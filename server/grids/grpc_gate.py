"""The gate of a gRPC server: who may come in, and whose stream it is."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

import grpc.aio

from fedknow.protocols.messages import client_of, node_of
from fedknow.protocols.security import is_server
from fedknow.protocols.wire import Code, Frame, WireError, check_version, parse
from fedknow.server.grids.grpc_doors import DISPLACED, DoorLimits, Doors
from fedknow.server.grids.grpc_link import Link, Peer, StreamOver
from fedknow.server.grids.grpc_membership import Guest, Membership, Proof

__all__ = ["Gate", "Roster", "address_of"]

HELLO_SECONDS = 5.0
"""How long a stream may be silent at first. A hello is one small frame."""


class Roster:
    """The clients of an experiment, and which of them are connected.

    Only :meth:`wait_for` and :meth:`connected` may be called outside the event loop.

    Parameters
    ----------
    clients : int
        Number of clients; their nodes are 2, 3, ...
    presence : callable
        Called in the event loop after a client came or went, with those that are absent.

    Attributes
    ----------
    peers : dict of int to Peer
        The clients by node.
    """

    def __init__(
        self, clients: int, presence: Callable[[Collection[int]], None]
    ) -> None:
        nodes = [node_of(client) for client in range(clients)]
        self.peers = {node: Peer(node) for node in nodes}
        self._presence = presence
        self._changed = threading.Condition()

    def wait_for(self, clients: int, timeout: float) -> bool:
        """Wait until so many clients are connected; return whether they are."""
        with self._changed:
            return self._changed.wait_for(
                lambda: len(self.connected()) >= clients, timeout
            )

    def connected(self) -> list[int]:
        """Return the connected nodes, ascending."""
        return [
            node for node, peer in self.peers.items() if peer.link is not None
        ]

    def absent(self) -> list[int]:
        """Return the clients that are not connected, ascending."""
        peers = self.peers.values()
        return sorted(client_of(peer.node) for peer in peers if peer.link is None)

    def attach(self, peer: Peer, link: Link | None) -> None:
        """Give a client its stream, or take it away."""
        with self._changed:
            peer.link = link
            if link is not None:
                peer.since = time.time()
                peer.joined += 1
            self._changed.notify_all()
        # Outside the lock, as a listener may take its time.
        self._presence(self.absent())

    def place(self, client: int | None, ejected: Collection[int] = ()) -> Peer:
        """Return a client's place, or a free one for a client without a number.

        Parameters
        ----------
        client : int or None
        ejected : collection of int
            Clients whose places are not free.

        Raises
        ------
        WireError
            ``NO_ROOM`` if there is no such place.
        """
        count = len(self.peers)
        if client is None:
            free = [
                peer
                for peer in self.peers.values()
                if peer.link is None and client_of(peer.node) not in ejected
            ]
            if not free:
                raise WireError(
                    Code.NO_ROOM, f"no place is free: data.clients = {count}"
                )
            # A place that had a client before is kept for that one as long as possible.
            return min(free, key=lambda peer: peer.joined > 0)
        peer = self.peers.get(node_of(client))
        if peer is None:
            raise WireError(
                Code.NO_ROOM,
                f"there is no client {client}; this experiment has {count} (data.clients), "
                "from 0 on",
            )
        return peer


class Gate:
    """Reads a client's hello, checks its credential, and finds its place.

    Parameters
    ----------
    roster : Roster
    is_secure : bool
        Whether clients must prove who they are. Without, they are believed.
    membership : Membership
        Who may come in now.

    Attributes
    ----------
    doors : Doors
        Visitors that have not said who they are.
    membership : Membership
        As given.
    """

    def __init__(
        self,
        roster: Roster,
        is_secure: bool,
        membership: Membership,
    ) -> None:
        limits = DoorLimits.for_clients(len(roster.peers))
        self.doors = Doors(limits)
        self._roster = roster
        self._is_secure = is_secure
        self.membership = membership

    async def greet(self, context: Any) -> tuple[Peer, Guest]:
        """Wait for a client's hello.

        Returns
        -------
        tuple of Peer and Guest
            The client's place, and what it has shown.

        Raises
        ------
        Crowded
            If it comes too often.
        StreamOver
            If the client hangs up without a hello.
        WireError
            If it may not come in.
        """
        # First of all: whoever proves a number does not wait among strangers.
        visitor = self._knock(context)
        hello = (await self._read_hello(context, visitor)).hello
        # Before the credential: with another version its fields may mean something else.
        check_version(hello)
        # 0 is no client's node: the client has no number yet.
        claimed = client_of(hello.node) if hello.node else None
        proof = self._prove(context, claimed)
        ejected = self.membership.ejected
        peer = self._roster.place(proof.client, ejected)
        client = client_of(peer.node)
        if client in ejected:
            raise WireError(
                Code.EJECTED,
                f"client {client} is out of the run: {ejected[client]}",
            )
        fence = hello.fence if hello.HasField("fence") else None
        is_known = self.membership.fences.is_known(peer.node, fence or b"")
        return peer, Guest(proof, fence, bool(fence) and is_known)

    def prove_client(self, context: Any) -> Proof:
        """Find the client that a call beside its stream is from.

        Raises
        ------
        Crowded
            If it comes too often.
        WireError
            If it proves nothing.
        """
        self._knock(context)
        return self._prove(context, None)

    def _knock(self, context: Any) -> str:
        """Let a call begin.

        Returns
        -------
        str
            Who it is from: a client that has proved its number, or else an address.

        Raises
        ------
        Crowded
            If it comes too often.
        """
        visitor = address_of(context)
        is_member = False
        if self._is_secure:
            # Its own fault is told once it has said hello, if it does.
            with suppress(WireError):
                visitor = f"client {self._prove(context, None).client}"
                is_member = True
        self.doors.knock(visitor, is_member)
        return visitor

    def check_reader(self, context: Any) -> None:
        """Refuse a call for the status that is neither ours nor a client's.

        Raises
        ------
        Crowded
            If it comes too often.
        WireError
            If the credential is none of the run's.
        """
        is_ours = is_server(context.auth_context())
        if is_ours:
            self.doors.knock("the server")
        else:
            self._knock(context)
            self._prove(context, None)

    def _prove(self, context: Any, claimed: int | None) -> Proof:
        """Find who a call is from; in the clear it is whom it claims to be from."""
        # Without TLS there is nothing that could prove a claim.
        if not self._is_secure:
            return Proof(claimed)
        return self.membership.prove(context, claimed)

    async def _read_hello(self, context: Any, visitor: str) -> Frame:
        """Read the frame that opens a stream."""
        try:
            async with asyncio.timeout(HELLO_SECONDS) as patience:
                with self.doors.waiting(visitor, patience):
                    data = await context.read()
        except TimeoutError:
            is_displaced = patience.when() == DISPLACED
            reason = (
                "silent while others needed the room"
                if is_displaced
                else f"no hello within {HELLO_SECONDS:.0f} s"
            )
            raise WireError(Code.OUT_OF_ORDER, reason) from None
        if data is grpc.aio.EOF:
            raise StreamOver("hung up without a word")
        frame = parse(data)
        kind = frame.WhichOneof("kind")
        if kind != "hello":
            raise WireError(
                Code.OUT_OF_ORDER, f"a {kind} frame where hello was expected"
            )
        return frame


def address_of(context: Any) -> str:
    """Give the address that a call comes from, without its port."""
    # gRPC's form: ipv4:192.0.2.7:4711, ipv6:%5B2001:db8::1%5D:4711 or unix:...
    peer: str = context.peer()
    # Without the port, which changes with each connection.
    return peer.rpartition(":")[0] or peer
