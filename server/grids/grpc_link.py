"""Clients on a gRPC server: the work and the stream that each one has."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc.aio

from fedknow.protocols.transport import HEARTBEAT_SECONDS, SILENCE_SECONDS
from fedknow.protocols.wire import (
    HEARTBEAT,
    Assembler,
    Code,
    Frame,
    Limits,
    Packed,
    Parcel,
    WireError,
    parse,
    refusal,
    refused,
)
from fedknow.server.grids.grpc_membership import Guest

__all__ = ["Link", "LinkOwner", "Peer", "StreamOver", "Work"]


@dataclass(frozen=True, eq=False)
class Work:
    """A serialised message for one client.

    Clients share the bytes of records that their messages share.
    """

    id: str
    node: int
    packed: Packed
    version: int
    committed: int

    def frames(self) -> Iterator[bytes]:
        """Yield the frames to write on the client's stream."""
        return self.packed.frames(
            self.node, self.id, version=self.version, committed=self.committed
        )


@dataclass(eq=False)
class Peer:
    """One client of the experiment, connected or not.

    Attributes
    ----------
    node : int
    work : Work or None
        The work that it has to do.
    link : Link or None
        The stream that it has now.
    since : float
        When that stream began, in seconds since 1970.
    joined : int
        How often it has connected.
    received, sent : int
        Bytes of messages, over all its streams.
    conflict : list of str
        Addresses of two that held its identity.
    """

    node: int
    work: Work | None = None
    link: Link | None = None
    since: float = 0.0
    joined: int = 0
    received: int = 0
    sent: int = 0
    conflict: list[str] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """Describe the client for the server's status."""
        return {
            "connected": self.link is not None,
            "since": round(self.since, 1),
            "joined": self.joined,
            "bytes_in": self.received,
            "bytes_out": self.sent,
        }


class LinkOwner(Protocol):
    """The service that a link reports to."""

    limits: Limits
    """How much a client may send."""

    def take(self, link: Link, parcel: Parcel) -> None:
        """Take in a complete message."""
        ...

    def refused_by(self, link: Link, error: WireError) -> None:
        """Note that a link refused what came in."""
        ...


class StreamOver(Exception):
    """A stream has come to its end; the text says why."""


@dataclass(eq=False)
class Link:
    """One stream of one client."""

    service: LinkOwner
    peer: Peer
    context: Any
    guest: Guest
    """What the client has shown."""
    fence: bytes
    """The secret of this stream."""
    expires: float = math.inf
    """When the credential expires, in seconds since 1970."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    last_frame: bytes | None = None
    """The frame with which the stream ends."""

    def end(self, frame: bytes) -> None:
        """End the stream with a frame, after the one that is being written."""
        # The earliest reason counts: it is the one that the client can act on.
        if self.last_frame is None:
            self.last_frame = frame
        self.wake.set()

    async def run(self) -> str:
        """Read and write until the stream ends.

        Returns
        -------
        str
            Why it ended.
        """
        reading = asyncio.create_task(self._read())
        writing = asyncio.create_task(self._write())
        try:
            # Whichever half ends, the stream is over: half a stream cannot do any work.
            await asyncio.wait(
                (reading, writing), return_when=asyncio.FIRST_COMPLETED
            )
            if reading.done() and self.last_frame is not None:
                # A refusal is still to be written.
                await asyncio.wait((writing,), timeout=HEARTBEAT_SECONDS)
            return reading.result() if reading.done() else writing.result()
        except grpc.aio.BaseError as error:
            return f"the connection broke: {error}"
        finally:
            for task in (reading, writing):
                task.cancel()
            # Both must have ended before gRPC takes the context back.
            await asyncio.gather(reading, writing, return_exceptions=True)

    async def _read(self) -> str:
        assembler = Assembler(self.service.limits)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(SILENCE_SECONDS) as silence:
                while True:
                    data = await self.context.read()
                    # Any frame is a sign of life, heartbeats too.
                    silence.reschedule(loop.time() + SILENCE_SECONDS)
                    if data is grpc.aio.EOF:
                        return "hung up"
                    self.peer.received += len(data)
                    self._hear(parse(data), assembler)
        except TimeoutError:
            return f"not heard for {SILENCE_SECONDS:.0f} s"
        except StreamOver as end:
            return str(end)
        except WireError as error:
            self.service.refused_by(self, error)
            self.end(refusal(error))
            return f"refused: {error}"

    def _hear(self, frame: Frame, assembler: Assembler) -> None:
        """Act on a frame that came in."""
        match frame.WhichOneof("kind"):
            case "chunk":
                parcel = assembler.add(frame)
                if parcel is not None:
                    self.service.take(self, parcel)
            case "heartbeat":
                pass
            case "refusal":
                raise StreamOver(f"it refuses: {refused(frame.refusal)}")
            case kind:
                raise WireError(
                    Code.OUT_OF_ORDER, f"a {kind} frame in the midst of a stream"
                )

    async def _write(self) -> str:
        sent: Work | None = None
        while True:
            # Read anew each time: work that was taken back meanwhile is not sent at all.
            if self.last_frame is not None:
                await self.context.write(self.last_frame)
                return "told why"
            work = self.peer.work
            # A newer stream of the client may have replaced this one; the work goes there.
            if work is not None and work is not sent and self.peer.link is self:
                sent = work
                for frame in work.frames():
                    await self._send(frame)
                continue
            # Before the wait: work that comes after this line sets it again, and none is
            # missed.
            self.wake.clear()
            try:
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    await self.wake.wait()
            except TimeoutError:
                # Routers forget connections that nothing passes through.
                await self._send(HEARTBEAT)

    async def _send(self, frame: bytes) -> None:
        await self.context.write(frame)
        self.peer.sent += len(frame)
