"""The gRPC side of :class:`~fedknow.server.grids.grpc_grid.GrpcGrid`: streams of clients, in an
event loop of their own."""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedknow.protocols.messages import client_of, node_of
from fedknow.protocols.security import CredentialError, Tokens, authenticate, is_server
from fedknow.protocols.transport import (
    HEARTBEAT_SECONDS,
    HELLO_SECONDS,
    SERVER_OPTIONS,
    SILENCE_SECONDS,
)
from fedknow.protocols.wire import (
    HEARTBEAT,
    SERVICE,
    Assembler,
    Code,
    Frame,
    Limits,
    Packed,
    Parcel,
    StatusReply,
    StatusRequest,
    WireError,
    check_version,
    goodbye,
    parse,
    refusal,
    refused,
    welcome,
)

__all__ = ["Answer", "Service", "Work"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Work:
    """A message for one client, serialised; what it shares with others' is shared."""

    id: str
    node: int
    packed: Packed
    version: int
    committed: int

    def frames(self) -> Iterator[bytes]:
        """What is written on the client's stream."""
        return self.packed.frames(
            self.node, self.id, version=self.version, committed=self.committed
        )


@dataclass(frozen=True, eq=False)
class Answer:
    """What a client sent in answer to its work; nothing but the envelope has been looked at."""

    work: Work
    parcel: Parcel


@dataclass(eq=False)
class _Peer:
    """One client of the experiment, connected or not."""

    node: int
    work: Work | None = None
    link: _Link | None = None
    since: float = 0.0
    joined: int = 0
    received: int = 0
    sent: int = 0


class _Over(Exception):
    """A stream that has come to its end; the text says why."""


class Service:
    """Who is connected, what work each client has, and what came back.

    Everything is called in the event loop, but :meth:`wait_for` and reading ``answers``.

    Each client has one piece of work at most. It is sent over whatever stream the client has at
    the time, again over the next one if that breaks, and taken back when its answer comes; an
    answer to anything else is dropped, counted.

    Parameters
    ----------
    clients : int
        Their nodes are 2, 3, ...
    config : str
        The experiment's configuration (TOML), which clients are given.
    run : str
        The run's id, which they are given too.
    secure : bool
        Whether clients must prove who they are: by their certificate, or by ``tokens``.
        Without, they are believed.
    tokens : Tokens, optional
        The tokens that let clients in.
    limits : Limits
        What a client may send.

    Attributes
    ----------
    answers : SimpleQueue of Answer or Exception
        What came back; an exception is this service's own end.
    progress : dict
        What :meth:`status` tells of the work going on.
    """

    def __init__(
        self,
        clients: int,
        config: str,
        run: str,
        *,
        secure: bool,
        tokens: Tokens | None,
        limits: Limits,
    ) -> None:
        self.peers = {
            node_of(client): _Peer(node_of(client)) for client in range(clients)
        }
        self.answers: queue.SimpleQueue[Answer | Exception] = queue.SimpleQueue()
        self.progress: dict[str, Any] = {}
        self.limits = limits
        self.counts: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self._config = config
        self._run = run
        self._secure = secure
        self._tokens = tokens
        self._began = time.time()
        self._owners: dict[str, int] = {}
        self._farewell: bytes | None = None
        self._away: set[int] = set()
        self._all_told = asyncio.Event()
        self._changed = threading.Condition()

    # --- life
    # -----------------------------------------------------------------------------------------------------

    async def start(
        self, listen: str, credentials: grpc.ServerCredentials | None
    ) -> int:
        """Begin to listen; the port, which is one of the system's choice where ``listen`` ends
        with ``:0``.

        Raises
        ------
        RuntimeError
            If the address cannot be had.
        """
        # A connection that has not said who it is costs little, but not nothing.
        most = 2 * len(self.peers) + 64
        self._server = grpc.aio.server(
            options=SERVER_OPTIONS, maximum_concurrent_rpcs=most
        )
        methods = {
            "Join": grpc.stream_stream_rpc_method_handler(self._join),
            "Status": grpc.unary_unary_rpc_method_handler(
                self._status, StatusRequest.FromString, StatusReply.SerializeToString
            ),
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, methods),)
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        port: int
        if credentials is None:
            port = self._server.add_insecure_port(listen)
        else:
            port = self._server.add_secure_port(listen, credentials)
        await self._server.start()
        return port

    async def stop(
        self, finished: bool, reason: str, linger: float, everyone: bool
    ) -> None:
        """Say goodbye to all clients, also to those that come back within ``linger`` seconds, and
        stop.

        ``everyone``: also to those that this process has never seen.
        """
        await self._health.enter_graceful_shutdown()
        self._farewell = goodbye(finished, reason)
        self._away = {
            node
            for node, peer in self.peers.items()
            if (peer.joined or everyone) and not peer.link
        }
        for peer in self.peers.values():
            if peer.link is not None:
                peer.link.end(self._farewell)
        if finished and self._away:
            try:
                async with asyncio.timeout(linger):
                    await self._all_told.wait()
            except TimeoutError:
                away = ", ".join(str(client_of(node)) for node in sorted(self._away))
                log.warning(
                    "clients %s are away and do not know that the run is over", away
                )
        await self._server.stop(grace=HEARTBEAT_SECONDS)

    # --- work
    # -----------------------------------------------------------------------------------------------------

    def assign(
        self, works: Sequence[Work], progress: Mapping[str, Any] | None = None
    ) -> None:
        """Give out work, one piece a client; what the client had before is not wanted any more."""
        if progress is not None:
            self.progress = dict(progress)
        for work in works:
            peer = self.peers[work.node]
            peer.work = work
            self._owners[work.id] = work.node
            if peer.link is not None:
                peer.link.wake.set()

    def withdraw(self) -> None:
        """No answers are wanted any more."""
        for peer in self.peers.values():
            peer.work = None
        self._owners.clear()

    def drop(self, node: int) -> None:
        """What a client has to do is not wanted any more."""
        peer = self.peers[node]
        if peer.work is not None:
            self._owners.pop(peer.work.id, None)
            peer.work = None

    def reject(self, work: Work, error: WireError) -> None:
        """An answer cannot be read: its sender's stream ends, and the work is to be done again."""
        peer = self.peers[work.node]
        peer.work = work
        if peer.link is not None:
            self._refuse(f"client {client_of(work.node)}", error)
            peer.link.end(refusal(error))

    def count(self, kind: str, number: int = 1) -> None:
        """Count what the grid saw: answers that came ``late``, work that was ``left_out``, answers
        ``refused``."""
        self.counts[kind] += number

    def wait_for(self, clients: int, timeout: float) -> bool:
        """Wait until so many clients are connected; whether they are. From any thread but the loop's."""
        with self._changed:
            return self._changed.wait_for(
                lambda: len(self.connected()) >= clients, timeout
            )

    def connected(self) -> list[int]:
        """Nodes that are connected, ascending. From any thread."""
        return [node for node, peer in self.peers.items() if peer.link is not None]

    def status(self) -> dict[str, Any]:
        """How the run stands.

        Returns
        -------
        dict
            ``run``; ``seconds`` since the start; ``work``: task, round and kind of what is
            being done; ``clients``: how many belong to the experiment; ``connected``;
            ``waiting_for``: clients that have work; ``bytes_in`` and ``bytes_out`` of messages,
            so far; ``refusals``: by code; ``dropped``: answers by why (``duplicate``: answered
            before; ``late``: of no work that is going on); ``left_out``: pieces of work given
            up at a deadline; ``refused``: answers that could be read but not used (NaN, other
            shapes, absurd norms); ``each``: by client ``connected``, ``since`` (seconds since
            1970), ``joined`` (times), ``bytes_in`` and ``bytes_out``.
        """
        peers = self.peers.values()
        return {
            "run": self._run,
            "seconds": round(time.time() - self._began, 1),
            "work": self.progress,
            "clients": len(self.peers),
            "connected": len(self.connected()),
            "waiting_for": [
                client_of(peer.node) for peer in peers if peer.work is not None
            ],
            "bytes_in": sum(peer.received for peer in peers),
            "bytes_out": sum(peer.sent for peer in peers),
            "refusals": dict(self.refusals),
            "dropped": {kind: self.counts[kind] for kind in ("duplicate", "late")},
            "left_out": self.counts["left_out"],
            "refused": self.counts["refused"],
            "each": {
                str(client_of(peer.node)): {
                    "connected": peer.link is not None,
                    "since": round(peer.since, 1),
                    "joined": peer.joined,
                    "bytes_in": peer.received,
                    "bytes_out": peer.sent,
                }
                for peer in peers
                if peer.joined
            },
        }

    # --- calls
    # ----------------------------------------------------------------------------------------------------

    async def _status(self, request: StatusRequest, context: Any) -> StatusReply:
        try:
            if not is_server(context.auth_context()):
                self._prove(context, None)
        except WireError as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, error.reason)
        return StatusReply(json=json.dumps(self.status()))

    async def _join(self, _: Any, context: Any) -> None:
        try:
            link = await self._greet(context)
        except _Over as end:
            log.info("%s: %s", context.peer(), end)
            return
        except WireError as error:
            self._refuse(context.peer(), error)
            await context.write(refusal(error))
            return
        name = f"client {client_of(link.peer.node)}"
        log.info("%s is here (%s)", name, context.peer())
        reason = "the connection broke"
        try:
            await context.write(welcome(link.peer.node, self._config, self._run))
            reason = await link.run()
        finally:
            if link.peer.link is link:
                self._attach(link.peer, None)
            log.info(
                "%s is gone: %s", name, "told why" if link.last is not None else reason
            )

    async def _greet(self, context: Any) -> _Link:
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                data = await context.read()
        except TimeoutError:
            raise WireError(
                Code.OUT_OF_ORDER, f"no hello within {HELLO_SECONDS:.0f} s"
            ) from None
        if data is grpc.aio.EOF:
            raise _Over("hung up without a word")
        frame = parse(data)
        if frame.WhichOneof("kind") != "hello":
            raise WireError(
                Code.OUT_OF_ORDER,
                f"a {frame.WhichOneof('kind')} frame where hello was expected",
            )
        check_version(frame.hello)
        peer = self._identify(
            context, client_of(frame.hello.node) if frame.hello.node else None
        )
        if peer.link is not None:
            error = WireError(
                Code.REPLACED,
                f"client {client_of(peer.node)} has connected anew, from {context.peer()}",
            )
            self._refuse(f"client {client_of(peer.node)}", error)
            peer.link.end(refusal(error))
        link = _Link(self, peer, context)
        self._attach(
            peer, link
        )  # with nothing awaited since it was found, so that nobody else is given the same place
        if self._farewell is not None:
            link.end(self._farewell)
            self._away.discard(peer.node)
            if not self._away:
                self._all_told.set()
        return link

    def _prove(self, context: Any, claimed: int | None) -> int | None:
        """The client that a call comes from, as its credential proves; in the clear, the one it
        claims to be."""
        if not self._secure:
            return claimed
        try:
            return authenticate(
                context.auth_context(),
                context.invocation_metadata() or (),
                self._tokens,
                claimed,
            )
        except CredentialError as error:
            raise WireError(Code.CREDENTIAL, error.reason) from None

    def _identify(self, context: Any, claimed: int | None) -> _Peer:
        """Whose stream this is."""
        client = self._prove(context, claimed)
        if (
            client is None
        ):  # in the clear, a client that comes for the first time takes any free place
            free = [peer for peer in self.peers.values() if peer.link is None]
            if not free:
                raise WireError(
                    Code.NO_ROOM, f"no place is free: data.clients = {len(self.peers)}"
                )
            return min(free, key=lambda peer: peer.joined > 0)
        peer = self.peers.get(node_of(client))
        if peer is None:
            raise WireError(
                Code.NO_ROOM,
                f"there is no client {client}; this experiment has {len(self.peers)} (data.clients), from 0 on",
            )
        return peer

    def _attach(self, peer: _Peer, link: _Link | None) -> None:
        with self._changed:
            peer.link = link
            if link is not None:
                peer.since = time.time()
                peer.joined += 1
            self._changed.notify_all()

    def _refuse(self, who: str, error: WireError) -> None:
        self.refusals[error.code.name] += 1
        log.warning("%s is refused: %s", who, error)

    # --- what links tell
    # ------------------------------------------------------------------------------------------

    def take(self, link: _Link, parcel: Parcel) -> None:
        """A message came in whole.

        Raises
        ------
        WireError
            ``FOREIGN`` if it is in another client's name.
        """
        peer = link.peer
        if peer.link is not link:
            return  # replaced; the work is with the new stream
        owner = self._owners.get(parcel.reply_to, peer.node)
        if parcel.node != peer.node or owner != peer.node:
            raise WireError(
                Code.FOREIGN,
                f"client {client_of(peer.node)} answers in the name of node {parcel.node}, work of node {owner}",
            )
        work = peer.work
        if work is None or work.id != parcel.reply_to:
            kind = "duplicate" if parcel.reply_to in self._owners else "late"
            self.counts[kind] += 1
            log.info(
                "client %d: %s answer dropped (to %r)",
                client_of(peer.node),
                kind,
                parcel.reply_to,
            )
            return
        peer.work = None
        self.answers.put(Answer(work, parcel))

    def refused_by(self, link: _Link, error: WireError) -> None:
        """A link found fault with what came in."""
        self._refuse(f"client {client_of(link.peer.node)}", error)


@dataclass(eq=False)
class _Link:
    """One stream of one client."""

    service: Service
    peer: _Peer
    context: Any
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    last: bytes | None = None
    """The frame with which the stream ends."""

    def end(self, frame: bytes) -> None:
        """End the stream with a frame, after the one that is being written."""
        if self.last is None:
            self.last = frame
        self.wake.set()

    async def run(self) -> str:
        """Read and write until the stream ends; why it did."""
        reading, writing = (
            asyncio.create_task(self._read()),
            asyncio.create_task(self._write()),
        )
        try:
            await asyncio.wait((reading, writing), return_when=asyncio.FIRST_COMPLETED)
            if (
                reading.done() and self.last is not None
            ):  # a refusal is still to be written
                await asyncio.wait((writing,), timeout=HEARTBEAT_SECONDS)
            return reading.result() if reading.done() else writing.result()
        except grpc.aio.BaseError as error:
            return f"the connection broke: {error}"
        finally:
            for task in (reading, writing):
                task.cancel()
            await asyncio.gather(reading, writing, return_exceptions=True)

    async def _read(self) -> str:
        assembler = Assembler(self.service.limits)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(SILENCE_SECONDS) as patience:
                while True:
                    data = await self.context.read()
                    patience.reschedule(loop.time() + SILENCE_SECONDS)
                    if data is grpc.aio.EOF:
                        return "hung up"
                    self.peer.received += len(data)
                    self._hear(parse(data), assembler)
        except TimeoutError:
            return f"not heard for {SILENCE_SECONDS:.0f} s"
        except _Over as end:
            return str(end)
        except WireError as error:
            self.service.refused_by(self, error)
            self.end(refusal(error))
            return f"refused: {error}"

    def _hear(self, frame: Frame, assembler: Assembler) -> None:
        match frame.WhichOneof("kind"):
            case "chunk":
                parcel = assembler.add(frame)
                if parcel is not None:
                    self.service.take(self, parcel)
            case "heartbeat":
                pass
            case "refusal":
                raise _Over(f"it refuses: {refused(frame.refusal)}")
            case kind:
                raise WireError(
                    Code.OUT_OF_ORDER, f"a {kind} frame in the midst of a stream"
                )

    async def _write(self) -> str:
        sent: Work | None = None
        while True:
            # What is written is asked for anew each time: work that was taken back meanwhile is
            # not sent at all.
            if self.last is not None:
                await self.context.write(self.last)
                return "told why"
            work = self.peer.work
            if work is not None and work is not sent and self.peer.link is self:
                sent = work
                for frame in work.frames():
                    await self._send(frame)
                continue
            self.wake.clear()
            try:
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    await self.wake.wait()
            except TimeoutError:
                await self._send(HEARTBEAT)

    async def _send(self, frame: bytes) -> None:
        await self.context.write(frame)
        self.peer.sent += len(frame)
