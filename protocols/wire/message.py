"""Messages as bytes: :func:`pack` and :func:`unpack`."""

from __future__ import annotations

from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from fedknow.protocols.messages import (
    Arrays,
    Config,
    Content,
    Failure,
    Message,
    Metrics,
    Record,
)
from fedknow.protocols.texts import counted
from fedknow.protocols.wire import codec
from fedknow.protocols.wire import fedknow_pb2 as pb
from fedknow.protocols.wire.checks import (
    check_header,
    check_name,
    check_sizes,
    encoded,
)
from fedknow.protocols.wire.codec import Encoding
from fedknow.protocols.wire.errors import Code, WireError
from fedknow.protocols.wire.frames import (
    CHUNK_BYTES,
    Packed,
    Parcel,
    cut,
    padding,
)
from fedknow.protocols.wire.handshake import PROTOCOL
from fedknow.protocols.wire.limits import Limits

__all__ = ["pack", "unpack"]

_INT64 = range(-(1 << 63), 1 << 63)
_UINT64 = range(1 << 64)
_SCALARS = (
    ("flag", bool),
    ("integer", int),
    ("real", float),
    ("text", str),
    ("blob", bytes),
)
"""The kinds of scalar in the order of asking: a bool is an int too."""
_LISTS = {kind: f"{kind}s" for kind, _ in _SCALARS}
_NUMBERS = ("integer", "real", "integers", "reals")


def pack(
    message: Message,
    encoding: Encoding = Encoding.DENSE,
    *,
    limits: Limits | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Packed:
    """Serialise a message, once for all its receivers.

    Parameters
    ----------
    message : Message
        Its arrays are read now; they may change after.
    encoding : Encoding
        Of its tensors. A lossy one is for float32 and float64; other tensors travel dense.
    limits : Limits, optional
        The receiver's; what it would refuse is refused here.
    chunk_bytes : int
        4096 to 1048576; see :data:`~fedknow.protocols.wire.frames.CHUNK_BYTES`.

    Raises
    ------
    WireError
        If something in it cannot be written or would be refused; names the record and the key.
    """
    limits = limits or Limits()
    for subject, text in (
        ("kind", message.kind),
        ("group", message.group),
        ("id", message.id),
        ("id", message.reply_to),
    ):
        # Refused by the sender: the receiver would end the whole stream for it.
        check_name(subject, text, limits)
    # Protobuf would raise an error of its own that names neither field nor value.
    if message.node not in _UINT64:
        raise WireError(
            Code.BAD_VALUE,
            f"node {message.node}: must be 0 or more, and below 2**64",
        )
    header = pb.Header(protocol=PROTOCOL, kind=message.kind, group=message.group)
    if message.failure is not None:
        _write_failure(header, message.failure)
    payload = _Payload()
    for name, record in message.content.items():
        check_name("record", name, limits)
        if isinstance(record, Arrays):
            arrays = header.records.add(name=name).arrays
            arrays.SetInParent()  # an empty record is a record
            for key, array in record.items():
                check_name(f"tensor of record {name!r}", key, limits)
                arrays.tensors.append(payload.add(key, array, encoding))
        else:
            _write_values(header, name, record, limits)
    # The same check as on arrival: whatever this side sends, the other side takes.
    check_header(header, payload.size, limits)
    text = header.SerializeToString()
    check_sizes(len(text), payload.size, limits)
    return cut(
        text,
        payload.pieces,
        node=message.node,
        id=message.id,
        reply_to=message.reply_to,
        chunk_bytes=chunk_bytes,
    )


class _Payload:
    """The bytes of tensors, one after the other.

    Attributes
    ----------
    pieces : list of memoryview
        The bytes.
    size : int
        How many there are.
    """

    def __init__(self) -> None:
        self.pieces: list[memoryview] = []
        self.size = 0

    def add(self, name: str, array: np.ndarray, encoding: Encoding) -> pb.Tensor:
        """Add a tensor's bytes; give its description."""
        # Counters and masks cannot lose precision, so that they travel dense beside lossy
        # weights.
        is_exact = encoding in (Encoding.DENSE, Encoding.SPARSE)
        can_travel = is_exact or codec.lossy(array.dtype)
        tensor, data = codec.encode(
            name, array, encoding if can_travel else Encoding.DENSE
        )
        tensor.offset = self.size
        # Padding keeps each tensor aligned, and the receiver can view it in place.
        self.pieces += (data, memoryview(bytes(padding(len(data)))))
        self.size += len(data) + padding(len(data))
        return tensor


def unpack(parcel: Parcel, limits: Limits | None = None) -> Message:
    """Read a message that has arrived.

    Parameters
    ----------
    parcel : Parcel
        From :meth:`Assembler.add <fedknow.protocols.wire.frames.Assembler.add>`.
    limits : Limits, optional
        What is refused, before memory is taken for it.

    Returns
    -------
    Message
        Dense arrays are views of the parcel's one buffer, which lives as long as any of them:
        copy what you keep.

    Raises
    ------
    WireError
        If the bytes are not a message of this version, or above a limit.
    """
    limits = limits or Limits()
    # Before parsing: protobuf objects take many times the memory of their bytes.
    if len(parcel.header) > limits.header_bytes:
        raise WireError(
            Code.TOO_LARGE,
            f"header of {counted(len(parcel.header), 'byte')}; at most "
            f"{limits.header_bytes} are taken",
        )
    try:
        header = pb.Header.FromString(bytes(parcel.header))
    except DecodeError as error:
        raise WireError(
            Code.MALFORMED, f"not a message header: {error}"
        ) from None
    check_header(header, len(parcel.payload), limits)
    content: Content = {}
    for record in header.records:
        # The later one would silently take the place of the other.
        if record.name in content:
            raise WireError(
                Code.MALFORMED, f"two records are called {record.name!r}"
            )
        content[record.name] = _read_record(record, parcel.payload, limits)
    failure = (
        Failure(header.failure.code, header.failure.reason)
        if header.HasField("failure")
        else None
    )
    return Message(
        header.kind,
        parcel.node,
        parcel.id,
        parcel.reply_to,
        header.group,
        content,
        failure,
    )


def _read_record(
    record: pb.Record, payload: memoryview, limits: Limits
) -> Record:
    name, kind = record.name, record.WhichOneof("kind")
    if kind == "arrays":
        return _read_arrays(name, record.arrays, payload, limits)
    if kind == "metrics":
        return Metrics(_read_values(name, record.metrics, limits, _NUMBERS))
    if kind == "config":
        return Config(_read_values(name, record.config, limits))
    # A later version's kind: this one cannot tell what it is for.
    raise WireError(Code.MALFORMED, f"record {name!r} is of no known kind")


def _write_failure(header: pb.Header, failure: Failure) -> None:
    encoded("reason of the failure", failure.reason)
    if failure.code not in _INT64:
        raise WireError(
            Code.BAD_VALUE, f"failure code {failure.code}: must fit 64 bits"
        )
    header.failure.code, header.failure.reason = failure.code, failure.reason
    # Code 0 and an empty text are protobuf's defaults; unset, the failure would not travel.
    header.failure.SetInParent()


def _write_values(
    header: pb.Header,
    name: str,
    record: Record,
    limits: Limits,
) -> None:
    if not isinstance(record, Metrics | Config):
        raise WireError(
            Code.BAD_VALUE,
            f"record {name!r} is a {type(record).__name__}; must be Arrays, Metrics or Config",
        )
    to = header.records.add(name=name)
    values = to.metrics if isinstance(record, Metrics) else to.config
    values.SetInParent()  # an empty record is a record
    for key, value in record.items():
        check_name(f"key of record {name!r}", key, limits)
        place = f"{name}.{key}"
        kind = _kind(place, value)
        if isinstance(record, Metrics) and kind not in _NUMBERS:
            raise WireError(
                Code.BAD_VALUE,
                f"{place} = {value!r:.64}: metrics are int, float, or lists of one of them",
            )
        entry = values.entries.add(name=key)
        if isinstance(value, list):
            getattr(entry, kind).SetInParent()  # an empty list is a list
            getattr(entry, kind).items.extend(value)
        else:
            setattr(entry, kind, value)


def _kind(place: str, value: object) -> str:
    """Name the field of ``Entry`` that holds a value."""
    if isinstance(value, list):
        kinds = {_kind(place, item) for item in value}
        if len(kinds) > 1 or not kinds <= _LISTS.keys():
            raise WireError(
                Code.BAD_VALUE,
                f"{place} = {value!r:.64}: a list holds scalars, all of one type",
            )
        # An empty list has no type; any list field holds it, and it is read back as [].
        return _LISTS[kinds.pop()] if kinds else "integers"
    for kind, type_ in _SCALARS:
        if isinstance(value, type_):
            # Python's integers have no end, those of the wire have.
            if type_ is int and isinstance(value, int) and value not in _INT64:
                raise WireError(
                    Code.BAD_VALUE,
                    f"{place} is an integer of {counted(value.bit_length(), 'bit')}; "
                    f"signed 64 travel",
                )
            if isinstance(value, str):
                encoded(place, value)
            return kind
    raise WireError(
        Code.BAD_VALUE,
        f"{place} = {value!r:.64} is a {type(value).__name__}; must be bool, int, float, "
        f"str, bytes, or a list of one",
    )


def _read_arrays(
    name: str,
    arrays: pb.Arrays,
    payload: memoryview,
    limits: Limits,
) -> Arrays:
    read = Arrays()
    for tensor in arrays.tensors:
        if tensor.name in read:
            raise WireError(
                Code.MALFORMED,
                f"two tensors of record {name!r} are called {tensor.name!r}",
            )
        read[tensor.name] = codec.decode(
            tensor, payload[tensor.offset : tensor.offset + tensor.length], limits
        )
    return read


def _read_values(
    name: str,
    values: pb.Values,
    limits: Limits,
    kinds: tuple[str, ...] = (),
) -> dict[str, Any]:
    read = {}
    for entry in values.entries:
        check_name(f"key of record {name!r}", entry.name, limits)
        kind = entry.WhichOneof("kind")
        if kind is None or (kinds and kind not in kinds):
            raise WireError(
                Code.MALFORMED,
                f"{name}.{entry.name} is of no known kind, or not of one that goes there",
            )
        if entry.name in read:
            raise WireError(
                Code.MALFORMED, f"record {name!r} holds {entry.name!r} twice"
            )
        value = getattr(entry, kind)
        read[entry.name] = list(value.items) if kind in _LISTS.values() else value
    return read
