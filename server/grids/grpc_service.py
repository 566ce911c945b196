"""The gRPC service of a run: the methods that clients call.

It belongs to an event loop of its own (:mod:`fedknow.server.grids.grpc_thread`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedknow.protocols.messages import client_of
from fedknow.protocols.texts import printable
from fedknow.protocols.transport import HEARTBEAT_SECONDS, SERVER_OPTIONS
from fedknow.protocols.wire import (
    SERVICE,
    Code,
    Limits,
    Parcel,
    StatusReply,
    StatusRequest,
    WireError,
    goodbye,
    refusal,
    welcome,
)
from fedknow.server.grids.grpc_assignments import Assignments
from fedknow.server.grids.grpc_doors import Crowded, Repeats
from fedknow.server.grids.grpc_gate import Gate
from fedknow.server.grids.grpc_health import Health
from fedknow.server.grids.grpc_link import Link, Peer, StreamOver, Work

__all__ = ["Farewell", "Service"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Farewell:
    """How clients are told that the server stops.

    Attributes
    ----------
    is_finished : bool
        Whether the run is over.
    reason : str
        The reason, in a few words.
    linger : float
        Seconds that clients that are away have to come and hear it.
    is_for_everyone : bool
        Whether to wait for clients that were never connected, too.
    """

    is_finished: bool = False
    reason: str = "the server stops"
    linger: float = 0.0
    is_for_everyone: bool = False


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
    config : str
        The experiment's configuration (TOML), which clients are given.
    run : str
        The run's id, which they are given too.
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
        config: str,
        run: str,
        limits: Limits,
    ) -> None:
        self.roster = assignments.roster
        self.assignments = assignments
        self.limits = limits
        self.refusals: Counter[str] = Counter()
        self._config = config
        self._run = run
        self._gate = gate
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
            len(self.roster.peers), self._join, self._status
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
        return port

    async def stop(self, farewell: Farewell) -> None:
        """Say goodbye to all clients, and stop.

        Clients that come back within ``linger`` seconds are told too.
        """
        # First, so that load balancers and orchestrators send nobody here any more.
        await self._health.enter_graceful_shutdown()
        self._farewell = goodbye(farewell.is_finished, farewell.reason)
        for node, peer in self.roster.peers.items():
            if peer.link is not None:
                peer.link.end(self._farewell)
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
        """Describe the run's state.

        Returns
        -------
        dict
            ``run``; ``seconds`` since the start; ``work``: task, round and kind of the work
            under way; ``clients``: how many belong to the experiment; ``connected``;
            ``waiting_for``: clients that have work; ``bytes_in`` and ``bytes_out`` of messages,
            so far; ``refusals``: by code; ``dropped``: answers by why (``duplicate``: answered
            before; ``late``: of no work that is going on); ``left_out``: pieces of work given
            up at a deadline; ``doors``: calls that were turned away before they said hello
            (:class:`~fedknow.server.grids.grpc_doors.Doors`); ``refused``: answers that could be
            read but not used (NaN, other shapes, absurd norms); ``each``: by client ``connected``,
            ``since`` (seconds since 1970), ``joined`` (times), ``bytes_in`` and ``bytes_out``.
        """
        counts = self.assignments.counts
        peers = list(self.roster.peers.values())
        busy = [peer for peer in peers if peer.work is not None]
        joined = [peer for peer in peers if peer.joined]
        return {
            "run": self._run,
            "seconds": round(time.time() - self._began, 1),
            "work": self.assignments.progress,
            "clients": len(peers),
            "connected": len(self.roster.connected()),
            "waiting_for": [client_of(peer.node) for peer in busy],
            "bytes_in": sum(peer.received for peer in peers),
            "bytes_out": sum(peer.sent for peer in peers),
            "refusals": dict(self.refusals),
            "dropped": {kind: counts[kind] for kind in ("duplicate", "late")},
            "left_out": counts["left_out"],
            "doors": dict(self._gate.doors.counts),
            "refused": counts["refused"],
            "each": {
                str(client_of(peer.node)): peer.describe() for peer in joined
            },
        }

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
            peer = await self._gate.greet(context)
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
        # Nothing is awaited since the place was found, so nobody else is given the same one.
        link = self._connect(peer, context)
        name = f"client {client_of(peer.node)}"
        text = f"{name} is here ({context.peer()})"
        self._log.write(logging.INFO, f"{name} is here", text)
        reason = "the connection broke"
        try:
            await context.write(welcome(peer.node, self._config, self._run))
            reason = await link.run()
        finally:
            # The client may have connected anew, and that stream must stay.
            if peer.link is link:
                self.roster.attach(peer, None)
            if link.last_frame is not None:
                reason = "told why"
            text = f"{name} is gone: {reason}"
            self._log.write(logging.INFO, f"{name} is gone", text)

    def _connect(self, peer: Peer, context: Any) -> Link:
        """Give a client a stream, in place of one that it had before."""
        if peer.link is not None:
            name = f"client {client_of(peer.node)}"
            reason = f"{name} has connected anew, from {context.peer()}"
            error = WireError(Code.REPLACED, reason)
            self._refuse(name, error)
            peer.link.end(refusal(error))
        link = Link(self, peer, context)
        self.roster.attach(peer, link)
        if self._farewell is not None:
            link.end(self._farewell)
            self._away.discard(peer.node)
            if not self._away:
                self._has_told_all.set()
        return link

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
) -> grpc.aio.Server:
    """Make a gRPC server with the service's two methods."""
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
    }
    handler = grpc.method_handlers_generic_handler(SERVICE, methods)
    server.add_generic_rpc_handlers((handler,))
    return server
