"""One connection of a client to its server, from greeting to goodbye."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any, NoReturn, cast

import grpc.aio

from fedknow.client.edge.desk import Desk, Job
from fedknow.client.edge.errors import Gone, Refused
from fedknow.client.edge.journal import key_of
from fedknow.client.edge.threads import WorkThread, first_to_end, forever
from fedknow.client.edge.worker import Worker
from fedknow.client.state import StateError
from fedknow.protocols.config import ConfigError
from fedknow.protocols.messages import client_of
from fedknow.protocols.plugins import explain
from fedknow.protocols.transport import (
    HEARTBEAT_SECONDS,
    HELLO_SECONDS,
    SILENCE_SECONDS,
)
from fedknow.protocols.wire import (
    HEARTBEAT,
    Assembler,
    Code,
    Frame,
    Goodbye,
    Parcel,
    Welcome,
    WireError,
    check_version,
    hello,
    parse,
    refusal,
    refused,
)

__all__ = ["Session"]

log = logging.getLogger(__name__)


class Session:
    """What is said on one stream.

    Parameters
    ----------
    server : str
        ``HOST:PORT``, for texts.
    desk : Desk
        Gets work, and has answers.
    thread : WorkThread
        In which the worker makes ready.
    worker : Worker
        Makes ready for the run that the server tells of.

    Attributes
    ----------
    was_welcomed : bool
        The server has let this client in.
    fence : bytes
        The secret of this stream, by which the server knows the client when it comes back.
    """

    def __init__(
        self,
        server: str,
        desk: Desk,
        thread: WorkThread,
        worker: Worker,
    ) -> None:
        self._server = server
        self._desk = desk
        self._thread = thread
        self._worker = worker
        self._node = 0
        self._is_ready = asyncio.Event()
        self.fence = b""
        self.was_welcomed = False

    async def run(self, stream: Any, claimed: int, fence: bytes = b"") -> Goodbye:
        """Greet the server, and do what it says until it says goodbye.

        Parameters
        ----------
        stream : grpc.aio.StreamStreamCall
            The stream.
        claimed : int
            The node id that this client says it has; 0: any.
        fence : bytes
            The secret of its last stream; empty without one.

        Raises
        ------
        Refused
            If the server ends the stream with a reason.
        Gone
            If the connection is of no use any more.
        ConfigError
            If the run cannot be joined with what is here.
        WireError
            If the server does not keep to the protocol.
        """
        frame = await self._greet(stream, hello(claimed, fence))
        kind = frame.WhichOneof("kind")
        if kind == "refusal":
            raise Refused(refused(frame.refusal))
        if kind != "welcome":
            raise Gone(f"{self._server} speaks another protocol: no welcome")
        welcome = frame.welcome
        check_version(welcome)
        client = client_of(welcome.node)
        log.info("connected to %s as client %d", self._server, client)
        self._node = welcome.node
        self.fence = welcome.fence
        # A problem of the last connection must not end this one.
        self._desk.problem = None
        self.was_welcomed = True
        try:
            goodbye = await first_to_end(
                self._read(stream), self._write(stream), self._prepare(welcome)
            )
        except (Gone, grpc.aio.AioRpcError):
            # Where this side ended the stream, its own reason is the one to tell.
            if self._desk.problem is None:
                raise
            raise self._desk.problem from None
        return cast(Goodbye, goodbye)

    async def _greet(self, stream: Any, greeting: bytes) -> Frame:
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                await stream.write(greeting)
                return parse(_bytes(await stream.read()))
        except TimeoutError:
            raise Gone(f"{self._server} does not answer") from None

    async def _prepare(self, welcome: Welcome) -> NoReturn:
        prepare = self._worker.prepare
        # Back while it trains: the thread is busy, and all that is needed is there.
        if self._worker.is_ready_for(welcome.config, welcome.run):
            self._is_ready.set()
        try:
            # In the thread: data and model take seconds, in which heartbeats must go on.
            await self._thread.do(
                prepare,
                welcome.config,
                welcome.run,
                welcome.node,
                welcome.fence,
                welcome.signature,
            )
        except ConfigError as error:
            self._desk.complain(error)
        # This machine's own troubles end the client, as they do elsewhere.
        except (StateError, OSError):
            raise
        # Whatever else it is: the server's words led to it, and the server is told.
        except Exception as error:
            log.exception("the experiment cannot be made ready")
            self._desk.complain(ConfigError(f"not made ready: {explain(error)}"))
        self._is_ready.set()
        await forever()

    async def _read(self, stream: Any) -> Goodbye:
        assembler: Assembler | None = None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(SILENCE_SECONDS) as patience:
                while True:
                    data = _bytes(await stream.read())
                    # Any frame counts, heartbeats too.
                    patience.reschedule(loop.time() + SILENCE_SECONDS)
                    if assembler is None and _is_chunk(data):
                        # How much may come depends on the model, which is being built.
                        patience.reschedule(None)
                        await self._is_ready.wait()
                        patience.reschedule(loop.time() + SILENCE_SECONDS)
                        assembler = Assembler(self._worker.limits)
                    goodbye = self._hear(data, assembler)
                    if goodbye is not None:
                        await _read_to_end(stream)
                        return goodbye
        except TimeoutError:
            raise Gone(
                f"{self._server} was not heard for {SILENCE_SECONDS:.0f} s"
            ) from None

    def _hear(self, data: bytes, assembler: Assembler | None) -> Goodbye | None:
        """Do what a frame says, unless this side is about to end the stream."""
        # Nothing counts any more but the end.
        if self._desk.problem is not None:
            return None
        try:
            return self._handle(parse(data), assembler)
        except WireError as error:
            self._desk.complain(error)
            return None

    def _handle(
        self, frame: Frame, assembler: Assembler | None
    ) -> Goodbye | None:
        match frame.WhichOneof("kind"):
            case "chunk":
                assert assembler is not None  # made before the first chunk
                parcel = assembler.add(frame)
                if parcel is not None:
                    self._take(parcel)
            case "goodbye":
                return frame.goodbye
            case "refusal":
                raise Refused(refused(frame.refusal))
            case "heartbeat":
                pass
            case kind:
                raise WireError(
                    Code.OUT_OF_ORDER, f"a {kind} frame in the midst of a stream"
                )
        return None

    def _take(self, parcel: Parcel) -> None:
        # The state here is this client's, and another client's work would spoil it.
        if parcel.node != self._node:
            raise WireError(
                Code.FOREIGN,
                f"work for node {parcel.node} came to node {self._node}",
            )
        # Not unpacked here: arrays take time, and this is the loop that heartbeats pass
        # through.
        self._desk.put_job(Job(key_of(parcel), parcel))

    async def _write(self, stream: Any) -> NoReturn:
        """Send answers and heartbeats, until there is a problem to tell."""
        try:
            while self._desk.problem is None:
                await self._send(stream)
            problem = self._desk.problem
            code = (
                problem.code if isinstance(problem, WireError) else Code.BAD_VALUE
            )
            reason = self._worker.discreet(str(problem))
            await stream.write(refusal(WireError(code, reason)))
            await stream.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # The stream is over. What the server said at last is still to be read, and says why.
            await forever()
        # As a rule the server ends the stream in this time.
        await asyncio.sleep(HEARTBEAT_SECONDS)
        raise Gone("the server did not end the stream")

    async def _send(self, stream: Any) -> None:
        """Send an answer if there is one; else wait for one, or send a heartbeat."""
        answered = self._desk.take_answered()
        if answered is not None:
            job, result = answered
            asked_by = job.parcel.id
            for frame in result.answer.frames(
                self._node, f"{asked_by}:reply", asked_by, result.version
            ):
                await stream.write(frame)
            return
        try:
            async with asyncio.timeout(HEARTBEAT_SECONDS):
                await self._desk.has_changed.wait()
            self._desk.has_changed.clear()
        except TimeoutError:
            await stream.write(HEARTBEAT)


async def _read_to_end(stream: Any) -> None:
    """Wait until the server ends the stream, which it does and not we."""
    with suppress(grpc.aio.AioRpcError):
        while await stream.read() is not grpc.aio.EOF:
            pass


def _is_chunk(data: bytes) -> bool:
    """Say whether a frame is a piece of a message."""
    try:
        return bool(parse(data).WhichOneof("kind") == "chunk")
    except WireError:
        return False


def _bytes(data: Any) -> bytes:
    if data is grpc.aio.EOF:
        raise Gone("the server hung up")
    raw: bytes = data
    return raw
