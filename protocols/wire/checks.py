"""Checks of messages, the same before sending and on arrival."""

from __future__ import annotations

from fedknow import __version__
from fedknow.protocols.texts import counted
from fedknow.protocols.wire import codec
from fedknow.protocols.wire import fedknow_pb2 as pb
from fedknow.protocols.wire.errors import Code, WireError
from fedknow.protocols.wire.frames import padding
from fedknow.protocols.wire.handshake import PROTOCOL
from fedknow.protocols.wire.limits import Limits

__all__ = ["check_header", "check_name", "check_sizes", "encoded"]


def check_sizes(header: int, payload: int, limits: Limits) -> None:
    """Refuse a message that is larger than its receiver takes."""
    for subject, size, limit in (
        ("header", header, limits.header_bytes),
        ("message", header + padding(header) + payload, limits.message_bytes),
    ):
        if size > limit:
            raise WireError(
                Code.TOO_LARGE,
                f"{subject} of {counted(size, 'byte')}; at most {limit} are taken",
            )


def check_header(header: pb.Header, payload: int, limits: Limits) -> None:
    """Check all that can be known before a byte of the payload is read.

    Parameters
    ----------
    header : Header
    payload : int
        The payload's length in bytes.
    limits : Limits
        What a receiver takes.

    Raises
    ------
    WireError
        If the header contradicts itself or the payload, or is above a limit.
    """
    # First of all: in another version the other fields may mean something else.
    if header.protocol != PROTOCOL:
        raise WireError(
            Code.VERSION,
            f"message of protocol {header.protocol}; this is fedknow {__version__}, "
            f"which speaks protocol {PROTOCOL}: "
            "install the same version of fedknow on both sides",
        )
    for subject, text in (("kind", header.kind), ("group", header.group)):
        check_name(subject, text, limits)
    # Counted before any is read, as each costs time whatever its size.
    tensors = sum(len(record.arrays.tensors) for record in header.records)
    for subject, number, limit in (
        ("records", len(header.records), limits.records),
        ("tensors", tensors, limits.tensors),
    ):
        if number > limit:
            raise WireError(
                Code.TOO_LARGE,
                f"message of {number} {subject}; at most {limit} are taken",
            )
    offset = decoded = 0
    for record in header.records:
        check_name("record", record.name, limits)
        for tensor in record.arrays.tensors:
            check_name(f"tensor of record {record.name!r}", tensor.name, limits)
            decoded += codec.check(tensor, limits)
            if tensor.offset != offset:  # so they cannot overlap either
                raise WireError(
                    Code.MALFORMED,
                    f"tensor {tensor.name!r} lies at {tensor.offset}, where {offset} was expected",
                )
            offset += tensor.length + padding(tensor.length)
    if decoded > limits.decoded_bytes:
        raise WireError(
            Code.TOO_LARGE,
            f"arrays of {counted(decoded, 'byte')}; at most {limits.decoded_bytes} are taken",
        )
    if offset != payload:
        raise WireError(
            Code.TRUNCATED if offset > payload else Code.MALFORMED,
            f"payload of {counted(payload, 'byte')}, of which tensors announce {offset}",
        )


def check_name(subject: str, name: object, limits: Limits) -> None:
    """Refuse a name that is no text, or longer than a receiver takes."""
    if not isinstance(name, str):
        # Protobuf would raise a TypeError that does not say where.
        raise WireError(Code.BAD_VALUE, f"{subject} {name!r}: must be text")
    size = len(encoded(subject, name))
    if size > limits.name_bytes:
        raise WireError(
            Code.TOO_LARGE,
            f"{subject} {name[:32]!r}... has {counted(size, 'byte')}; at most "
            f"{limits.name_bytes} are taken",
        )


def encoded(subject: str, text: str) -> bytes:
    """Return a text as UTF-8, or refuse it."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise WireError(
            Code.BAD_VALUE, f"{subject} {text[:32]!r}: cannot be written as UTF-8"
        ) from None
