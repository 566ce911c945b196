"""The wire: messages as frames of bytes on one stream a client, and back.

Sender::

    packed = pack(message)                          # serialised once
    for node in nodes:
        for frame in packed.frames(node, id):       # only the first frame differs
            await stream.write(frame)

Receiver, one assembler a stream::

    frame = parse(data)
    if frame.WhichOneof("kind") == "chunk" and (parcel := assembler.add(frame)):
        message = unpack(parcel)

Whatever the bytes, a receiver raises :class:`WireError` and nothing else, and takes no more
memory than :class:`Limits` allow.
"""

from fedknow.protocols.wire.codec import Encoding
from fedknow.protocols.wire.errors import Code, WireError
from fedknow.protocols.wire.fedknow_pb2 import (
    DESCRIPTOR,
    Frame,
    Goodbye,
    Hello,
    Refusal,
    RenewReply,
    RenewRequest,
    StatusReply,
    StatusRequest,
    Welcome,
)
from fedknow.protocols.wire.frames import (
    CHUNK_BYTES,
    Assembler,
    Packed,
    Parcel,
    parse,
)
from fedknow.protocols.wire.handshake import (
    HEARTBEAT,
    PROTOCOL,
    check_version,
    goodbye,
    hello,
    refusal,
    refused,
    welcome,
)
from fedknow.protocols.wire.limits import Limits
from fedknow.protocols.wire.message import pack, unpack

__all__ = [
    "CHUNK_BYTES",
    "HEARTBEAT",
    "JOIN",
    "PROTOCOL",
    "RENEW",
    "SERVICE",
    "STATUS",
    "Assembler",
    "Code",
    "Encoding",
    "Frame",
    "Goodbye",
    "Hello",
    "Limits",
    "Packed",
    "Parcel",
    "Refusal",
    "RenewReply",
    "RenewRequest",
    "StatusReply",
    "StatusRequest",
    "Welcome",
    "WireError",
    "check_version",
    "goodbye",
    "hello",
    "pack",
    "parse",
    "refusal",
    "refused",
    "unpack",
    "welcome",
]

SERVICE = DESCRIPTOR.services_by_name["Fedknow"].full_name
"""The gRPC service's name."""
JOIN = f"/{SERVICE}/Join"
"""The path of the stream. Register it without serialisers, so that frames pass as the bytes
they are.
"""
RENEW = f"/{SERVICE}/Renew"
"""The path of the question for a new certificate: :class:`RenewRequest`, :class:`RenewReply`."""
STATUS = f"/{SERVICE}/Status"
"""The path of the question how the run stands: :class:`StatusRequest`, :class:`StatusReply`."""
