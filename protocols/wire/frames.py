"""Messages cut into frames and put together again.

A message is a header and a payload; what they say is no business of this module. Frames of
several messages may interleave, and heartbeats pass between them, so that a large message holds
up nothing.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from fedknow.protocols.texts import counted
from fedknow.protocols.wire import fedknow_pb2 as pb
from fedknow.protocols.wire.errors import Code, WireError
from fedknow.protocols.wire.limits import Limits

__all__ = [
    "ALIGNMENT",
    "CHUNK_BYTES",
    "Assembler",
    "Packed",
    "Parcel",
    "cut",
    "padding",
    "parse",
]

CHUNK_BYTES = 1 << 20
"""Largest and usual chunk. A slow link may want smaller ones: a heartbeat waits for one chunk."""
ALIGNMENT = 8
"""Where tensors begin: at multiples of the largest element."""
_SMALLEST_CHUNK = 1 << 12
"""Of a message's chunks but the last; a peer cannot make this side handle a message byte by
byte."""
_OVERHEAD = 1 << 14
"""Room in a frame for what is not data."""
# 2 is the wire type of fields that begin with their length.
_DATA_KEY = bytes([pb.Frame.DATA_FIELD_NUMBER << 3 | 2])
"""Protobuf's mark of the field ``Frame.data``."""
# One count for the process, so that no two messages of a connection share a number.
_streams = itertools.count()


@dataclass(frozen=True, eq=False)
class Packed:
    """A message as frames: serialised once, for any number of receivers.

    The frames after the first are shared by all receivers; so send a message once at a time to
    one receiver.

    Attributes
    ----------
    envelope : fedknow_pb2.Envelope
        Node, id and sizes.
    """

    envelope: pb.Envelope
    _stream: int
    _crc32: int
    _head: bytes = field(repr=False)
    _tail: tuple[bytes, ...] = field(repr=False)

    @property
    def size(self) -> int:
        """Bytes of all frames, but for those that differ by receiver."""
        return len(self._head) + sum(map(len, self._tail))

    def frames(
        self,
        node: int | None = None,
        id: str | None = None,
        reply_to: str | None = None,
        version: int = 0,
        committed: int = 0,
    ) -> Iterator[bytes]:
        """Return the frames, in order, as serialised ``Frame`` messages.

        Parameters
        ----------
        node, id, reply_to : optional
            Others than the packed message's own.
        version, committed : int
            Versions of the client's state; see ``Envelope`` in ``fedknow.proto``.
        """
        # A copy for each receiver: several threads may send the same message at once.
        envelope = pb.Envelope(version=version, committed=committed)
        envelope.MergeFrom(self.envelope)
        if node is not None:
            envelope.node = node
        if id is not None:
            envelope.id = id
        if reply_to is not None:
            envelope.reply_to = reply_to
        chunk = pb.Chunk(
            stream=self._stream, crc32=self._crc32, envelope=envelope
        )
        yield _frame(chunk, [memoryview(self._head)])
        yield from self._tail


@dataclass(frozen=True, eq=False)
class Parcel:
    """A message that has arrived whole.

    Attributes
    ----------
    node, id, reply_to
        As in :class:`~fedknow.protocols.messages.Message`.
    header, payload : memoryview
        Two parts of one buffer, which lives as long as any part of it is in use.
    version, committed : int
        Versions of the client's state; see ``Envelope`` in ``fedknow.proto``.
    """

    node: int
    id: str
    reply_to: str
    header: memoryview = field(repr=False)
    payload: memoryview = field(repr=False)
    version: int = 0
    committed: int = 0


def cut(  # noqa: PLR0913  # the fields of an envelope
    header: bytes,
    payload: Sequence[memoryview],
    *,
    node: int,
    id: str,
    reply_to: str = "",
    chunk_bytes: int = CHUNK_BYTES,
) -> Packed:
    """Cut a message into frames, copying its bytes once.

    Parameters
    ----------
    header : bytes
        Not empty.
    payload : sequence of memoryview
        The payload in pieces of bytes, read now and not needed after.
    node, id, reply_to
        The envelope.
    chunk_bytes : int
        4096 to 1048576.

    Raises
    ------
    ValueError
        If ``chunk_bytes`` is none of these.
    """
    if not _SMALLEST_CHUNK <= chunk_bytes <= CHUNK_BYTES:
        raise ValueError(
            f"chunk_bytes = {chunk_bytes}: must be {_SMALLEST_CHUNK} to {CHUNK_BYTES}"
        )
    pieces = [memoryview(header + bytes(padding(len(header)))), *payload]
    envelope = pb.Envelope(
        node=node,
        id=id,
        reply_to=reply_to,
        size=sum(map(len, pieces)),
        header_size=len(header),
        chunk_size=chunk_bytes,
    )
    # The field on the wire has 32 bits. A number comes again after all others have.
    stream = next(_streams) & 0xFFFFFFFF
    chunks = _chunks(pieces, chunk_bytes)
    # Kept without its frame, as the frame holds the receiver's own envelope.
    head = b"".join(next(chunks))
    tail = tuple(
        _frame(
            pb.Chunk(stream=stream, sequence=sequence, crc32=_crc32(chunk)), chunk
        )
        for sequence, chunk in enumerate(chunks, start=1)
    )
    return Packed(envelope, stream, zlib.crc32(head), head, tail)


def padding(size: int) -> int:
    """Bytes from ``size`` to the next multiple of :data:`ALIGNMENT`."""
    return -size % ALIGNMENT


def parse(data: bytes) -> pb.Frame:
    """Read one frame off the stream.

    Raises
    ------
    WireError
        ``TOO_LARGE`` or ``MALFORMED``.
    """
    # Before parsing, which copies the bytes.
    if len(data) > CHUNK_BYTES + _OVERHEAD:
        raise WireError(
            Code.TOO_LARGE,
            f"frame of {counted(len(data), 'byte')}; at most {CHUNK_BYTES + _OVERHEAD} are taken",
        )
    try:
        frame: pb.Frame = pb.Frame.FromString(data)
    except DecodeError as error:
        raise WireError(Code.MALFORMED, f"not a frame: {error}") from None
    kind = frame.WhichOneof("kind")
    # Data beside a heartbeat would pass all limits, as nobody looks at it.
    if kind is None or (kind != "chunk" and frame.data):
        raise WireError(
            Code.MALFORMED,
            "frame of no known kind"
            if kind is None
            else f"{kind} frame that carries data",
        )
    return frame


class Assembler:
    """Puts the messages of one peer together.

    After an error its stream is over, and so is the assembler. Memory grows with the bytes
    received, up to ``limits.message_bytes``, whatever is announced.

    Parameters
    ----------
    limits : Limits
        What is refused.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._open: dict[int, _Open] = {}

    def add(self, frame: pb.Frame) -> Parcel | None:
        """Take a chunk; give the message that it completes, if it does.

        Raises
        ------
        WireError
            ``TOO_LARGE``, ``BAD_CHECKSUM``, ``TRUNCATED``, ``OUT_OF_ORDER`` or ``MALFORMED``.
        """
        chunk, data = frame.chunk, frame.data
        if chunk.sequence == 0:
            self._begin(chunk)
        message = self._open.get(chunk.stream)
        if message is None:
            raise WireError(
                Code.OUT_OF_ORDER,
                f"chunk {chunk.sequence} of stream {chunk.stream}, which has not begun",
            )
        # gRPC keeps the order of a stream, so another number means a faulty or hostile peer.
        if chunk.sequence != message.chunks or (
            chunk.sequence > 0 and chunk.HasField("envelope")
        ):
            raise WireError(
                Code.OUT_OF_ORDER,
                f"chunk {chunk.sequence} of stream {chunk.stream}, where chunk "
                f"{message.chunks} was expected",
            )
        missing = message.envelope.size - len(message.body)
        # Every chunk but the last is full: memory and work stay in proportion to what was
        # announced.
        if len(data) != min(missing, message.envelope.chunk_size):
            raise WireError(
                Code.TRUNCATED if len(data) < missing else Code.TOO_LARGE,
                f"chunk {chunk.sequence} of stream {chunk.stream} has {counted(len(data), 'byte')} "
                f"in place of {min(missing, message.envelope.chunk_size)}",
            )
        if zlib.crc32(data) != chunk.crc32:
            raise WireError(
                Code.BAD_CHECKSUM,
                f"chunk {chunk.sequence} of stream {chunk.stream}: changed on its way",
            )
        message.body += data
        message.chunks += 1
        return self._finish(chunk.stream) if len(data) == missing else None

    # Sizes count as announced, not as arrived: a peer that fills them later must still fit.
    def _begin(self, chunk: pb.Chunk) -> None:
        if chunk.stream in self._open:
            raise WireError(
                Code.OUT_OF_ORDER,
                f"chunk 0 of stream {chunk.stream}, which is under way already",
            )
        if not chunk.HasField("envelope"):
            raise WireError(
                Code.MALFORMED,
                f"chunk 0 of stream {chunk.stream} has no envelope",
            )
        if len(self._open) >= self._limits.streams:
            raise WireError(
                Code.TOO_LARGE,
                f"more than {counted(self._limits.streams, 'message')} under way at once",
            )
        envelope, limits = chunk.envelope, self._limits
        announced = envelope.size + sum(
            message.envelope.size for message in self._open.values()
        )
        for subject, size, limit in (
            ("messages under way", announced, limits.message_bytes),
            ("message header", envelope.header_size, limits.header_bytes),
            ("chunk", envelope.chunk_size, CHUNK_BYTES),
            ("message id", len(envelope.id.encode()), limits.name_bytes),
            (
                "id of the answered message",
                len(envelope.reply_to.encode()),
                limits.name_bytes,
            ),
        ):
            if size > limit:
                raise WireError(
                    Code.TOO_LARGE,
                    f"{subject} of {counted(size, 'byte')}; at most {limit} are taken",
                )
        if envelope.chunk_size < _SMALLEST_CHUNK:
            raise WireError(
                Code.MALFORMED,
                f"chunks of {counted(envelope.chunk_size, 'byte')}; at least "
                f"{_SMALLEST_CHUNK} are taken",
            )
        padded_size = envelope.header_size + padding(envelope.header_size)
        if not 0 < padded_size <= envelope.size:
            raise WireError(
                Code.MALFORMED,
                f"message of {counted(envelope.size, 'byte')} that begins with "
                f"{envelope.header_size} of header",
            )
        self._open[chunk.stream] = _Open(envelope)

    def _finish(self, stream: int) -> Parcel:
        message = self._open.pop(stream)
        envelope, body = message.envelope, memoryview(message.body)
        return Parcel(
            envelope.node,
            envelope.id,
            envelope.reply_to,
            # The payload stays writable, so that dense arrays need no copy to be changed.
            body[: envelope.header_size].toreadonly(),
            body[envelope.header_size + padding(envelope.header_size) :],
            envelope.version,
            envelope.committed,
        )


@dataclass
class _Open:
    """A message under way."""

    envelope: pb.Envelope
    body: bytearray = field(default_factory=bytearray)
    chunks: int = 0


def _frame(chunk: pb.Chunk, data: Sequence[memoryview]) -> bytes:
    # Frame(chunk=chunk, data=b"".join(data)).SerializeToString() gives the same bytes, with two
    # more copies of them.
    return b"".join(
        (
            pb.Frame(chunk=chunk).SerializeToString(),
            _DATA_KEY,
            _varint(sum(map(len, data))),
            *data,
        )
    )


def _varint(number: int) -> bytes:
    septets = bytearray()
    while number > 0x7F:
        septets.append(number & 0x7F | 0x80)
        number >>= 7
    septets.append(number)
    return bytes(septets)


def _crc32(data: Sequence[memoryview]) -> int:
    crc = 0
    for piece in data:
        crc = zlib.crc32(piece, crc)
    return crc


def _chunks(
    pieces: Sequence[memoryview], size: int
) -> Iterator[list[memoryview]]:
    chunk: list[memoryview] = []
    room = size
    for piece in pieces:
        while len(piece) > room:
            chunk.append(piece[:room])
            yield chunk
            chunk, piece, room = [], piece[room:], size
        chunk.append(piece)
        room -= len(piece)
    yield chunk
