"""The gRPC service of a run: the methods that clients call.

It belongs to an event loop of its own (:mod:`fedknow.server.grids.grpc_thread`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedknow.protocols.messages import client_of
from fedknow.protocols.texts import printable
from fedknow.protocols.transport import HEARTBEAT_SECONDS, SERVER_OPTIONS
from fedknow.protocols.wire import (
    SERVICE,
    Limits,
    Parcel,
    RenewReply,
    RenewRequest,
    StatusReply,
    StatusRequest,
    WireError,
    goodbye,
    refusal,
)
from fedknow.server.grids.grpc_assignments import Assignments
from fedknow.server.grids.grpc_doors import Crowded, Repeats
from fedknow.server.grids.grpc_fencing import Arbiter
from fedknow.server.grids.grpc_gate import Gate
from fedknow.server.grids.grpc_health import Health
from fedknow.server.grids.grpc_link import Link, Peer, StreamOver, Work
from fedknow.server.grids.grpc_membership import Guest
from fedknow.server.grids.grpc_status import describe_run
from fedknow.server.grids.grpc_words import Farewell, Invitation
from fedknow.server.renewal import expiry_of

__all__ = ["Service"]

log = logging.getLogger(__name__)

WATCH_SECONDS = 1.0
"""How often open streams are judged anew."""


class Service:
    """The methods that clients call: one to join the run, one for its status.

    All of it belongs to the event loop. The few things that other threads may use are named at
    :class:`Roster` and :class:`Assignments`.

    Parameters
    ----------
    assignments : Assignments
        The clients, and their work.
    gate : Gate
        Lets clients in.
    invitation : Invitation
        What clients are told of the run.
    limits : Limits
        What a client may send.

    Attributes
    ----------
    refusals : Counter
        Refused streams and answers, by code.
    """

    def __init__(
        self,
        assignments: Assignments,
        gate: Gate,
        invitation: Invitation,
        limits: Limits,
    ) -> None:
        self.roster = assignments.roster
        self.assignments = assignments
        self.limits = limits
        self.refusals: Counter[str] = Counter()
        self._invitation = invitation
        self._gate = gate
        self._membership = gate.membership
        self._arbiter = Arbiter(gate.membership)
        self._began = time.time()
        self._log = Repeats(log)
        self._farewell: bytes | None = None
        self._away: set[int] = set()
        self._has_told_all = asyncio.Event()

    # --- its life

    async def start(
        self, listen: str, credentials: grpc.ServerCredentials | None
    ) -> int:
        """Begin to listen, and return the port.

        The port is one of the system's choice where ``listen`` ends with ``:0``.

        Raises
        ------
        RuntimeError
            If the address cannot be had.
        """
        self._server = _make_server(
            len(self.roster.peers), self._join, self._status, self._renew
        )
        self._health = Health(self._gate.doors)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        port: int
        if credentials is None:
            port = self._server.add_insecure_port(listen)
        else:
            port = self._server.add_secure_port(listen, credentials)
        await self._server.start()
        self._watching = asyncio.create_task(self._watch())
        return port

    async def stop(self, farewell: Farewell) -> None:
        """Say goodbye to all clients, and stop.

        Clients that come back within ``linger`` seconds are told too.
        """
        self._watching.cancel()
        # First, so that load balancers and orchestrators send nobody here any more.
        await self._health.enter_graceful_shutdown()
        self._farewell = goodbye(farewell.is_finished, farewell.reason)
        for node, peer in self.roster.peers.items():
            if peer.link is not None:
                peer.link.end(self._farewell)
            elif client_of(node) in self._membership.ejected:
                continue
            elif peer.joined or farewell.is_for_everyone:
                # These come back to ask, and are told then.
                self._away.add(node)
        # A run that is not over goes on after a restart: clients come back by themselves.
        if farewell.is_finished and self._away:
            await self._wait_for_absent(farewell.linger)
        await self._server.stop(grace=HEARTBEAT_SECONDS)
        self._log.flush_all()
        # With the last of its objects gRPC ends its thread, which else is killed with the process.
        del self._server, self._health

    async def _wait_for_absent(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._has_told_all.wait()
        except TimeoutError:
            absent = ", ".join(
                str(client_of(node)) for node in sorted(self._away)
            )
            log.warning(
                "clients %s are away and do not know that the run is over", absent
            )

    def status(self) -> dict[str, Any]:
        """Describe the run's state; see :func:`describe_run`."""
        return describe_run(
            self.assignments, self._gate, self._invitation.run, self.refusals
        ) | {"seconds": round(time.time() - self._began, 1)}

    # --- calls

    async def _status(self, request: StatusRequest, context: Any) -> StatusReply:
        try:
            self._gate.check_reader(context)
        except Crowded as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except WireError as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, error.reason)
        return StatusReply(json=json.dumps(self.status()))

    async def _join(self, _: Any, context: Any) -> None:
        """Serve one stream, from a client's hello to its end."""
        try:
            peer, guest = await self._gate.greet(context)
            link = self._connect(peer, guest, context)
        except Crowded as error:
            self._log.write(logging.WARNING, "too many calls", str(error))
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except StreamOver as end:
            text = f"{context.peer()}: {end}"
            self._log.write(logging.INFO, "streams without a word", text)
            return
        except WireError as error:
            self._refuse(context.peer(), error)
            await context.write(refusal(error))
            return
        # Nothing was awaited since the place was found, so nobody else was given the same one.
        name = f"client {client_of(peer.node)}"
        text = f"{name} is here ({context.peer()})"
        self._log.write(logging.INFO, f"{name} is here", text)
        reason = "the connection broke"
        try:
            await context.write(self._invitation.welcome(link))
            reason = await link.run()
        finally:
            # The client may have connected anew, and that stream must stay.
            if peer.link is link:
                self.roster.attach(peer, None)
            if link.last_frame is not None:
                reason = "told why"
            text = f"{name} is gone: {reason}"
            self._log.write(logging.INFO, f"{name} is gone", text)
            self._membership.note(
                "left", client=client_of(peer.node), reason=reason
            )

    def _connect(self, peer: Peer, guest: Guest, context: Any) -> Link:
        """Give a client a stream, in place of one that it had before.

        Raises
        ------
        WireError
            ``DUPLICATE`` if another holder of its identity has a better right to it.
        """
        replaced = self._arbiter.arbitrate(peer, guest, context)
        if peer.link is not None and replaced is not None:
            self._refuse(f"client {client_of(peer.node)}", replaced)
            peer.link.end(refusal(replaced))
        membership = self._membership
        membership.settle(guest.proof)
        fence = membership.fences.issue(peer.node)
        expires = expiry_of(guest.proof.pem) if guest.proof.pem else math.inf
        link = Link(self, peer, context, guest, fence, expires)
        membership.note(
            "joined",
            client=client_of(peer.node),
            address=context.peer(),
            credential=guest.proof.mark[-16:],
            has_returned=guest.has_returned,
        )
        self.roster.attach(peer, link)
        if self._farewell is not None:
            link.end(self._farewell)
            self._away.discard(peer.node)
            if not self._away:
                self._has_told_all.set()
        return link

    # --- what may change meanwhile

    async def _watch(self) -> None:
        """Judge open streams anew, now and then."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            self._membership.refresh()
            for node, peer in self.roster.peers.items():
                client = client_of(node)
                if client in self._membership.ejected:
                    self.assignments.give_up(node)
                if peer.link is not None and peer.link.last_frame is None:
                    self._arbiter.judge_anew(client, peer.link)

    async def _renew(self, request: RenewRequest, context: Any) -> RenewReply:
        try:
            proof = self._gate.prove_client(context)
        except Crowded as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except WireError as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, error.reason)
        return RenewReply(certificate=self._membership.renew(proof))

    def _refuse(self, name: str, error: WireError) -> None:
        """Count and log a refusal."""
        self.refusals[error.code.name] += 1
        text = f"{name} is refused: {printable(str(error))}"
        # By code and not by name: strangers may come from any number of ports.
        kind = f"refusals of code {error.code.name}"
        self._log.write(logging.WARNING, kind, text)

    # --- news of links

    def take(self, link: Link, parcel: Parcel) -> None:
        """Take in a complete message; see :meth:`Assignments.take`."""
        self.assignments.take(link, parcel)

    def refused_by(self, link: Link, error: WireError) -> None:
        """Note that a link refused what came in."""
        self._refuse(f"client {client_of(link.peer.node)}", error)

    def reject(self, work: Work, error: WireError) -> None:
        """End the stream of an answer that cannot be read.

        The work is to be done again.
        """
        peer = self.roster.peers[work.node]
        # Back on the desk: the client is sent the same work when it comes back.
        peer.work = work
        if peer.link is not None:
            self._refuse(f"client {client_of(work.node)}", error)
            peer.link.end(refusal(error))


def _make_server(
    clients: int,
    join: Callable[[Any, Any], Awaitable[None]],
    status: Callable[[StatusRequest, Any], Awaitable[StatusReply]],
    renew: Callable[[RenewRequest, Any], Awaitable[RenewReply]],
) -> grpc.aio.Server:
    """Make a gRPC server with the service's methods."""
    # Of one connection: a proxy may bring all clients over one. All calls together have no bound
    # here, as strangers could fill it; the gate bounds those of each visitor.
    max_streams = 2 * clients + 64
    server = grpc.aio.server(
        options=[*SERVER_OPTIONS, ("grpc.max_concurrent_streams", max_streams)]
    )
    methods = {
        "Join": grpc.stream_stream_rpc_method_handler(join),
        "Status": grpc.unary_unary_rpc_method_handler(
            status, StatusRequest.FromString, StatusReply.SerializeToString
        ),
        "Renew": grpc.unary_unary_rpc_method_handler(
            renew, RenewRequest.FromString, RenewReply.SerializeToString
        ),
    }
    handler = grpc.method_handlers_generic_handler(SERVICE, methods)
    server.add_generic_rpc_handlers((handler,))
    return server
