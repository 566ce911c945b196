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

Whatever the bytes, a receiver raises :class:`WireError` and nothing else, and takes no more memory than
:class:`Limits` allow.
"""

from fedknow.protocols.wire.codec import Encoding
from fedknow.protocols.wire.errors import Code, WireError
from fedknow.protocols.wire.fedknow_pb2 import DESCRIPTOR, Frame, Hello, Refusal, Welcome
from fedknow.protocols.wire.frames import CHUNK_BYTES, Assembler, Packed, Parcel, parse
from fedknow.protocols.wire.handshake import HEARTBEAT, PROTOCOL, check_version, hello, refusal, refused, welcome
from fedknow.protocols.wire.limits import Limits
from fedknow.protocols.wire.message import pack, unpack

__all__ = [
    "CHUNK_BYTES",
    "HEARTBEAT",
    "JOIN",
    "PROTOCOL",
    "SERVICE",
    "Assembler",
    "Code",
    "Encoding",
    "Frame",
    "Hello",
    "Limits",
    "Packed",
    "Parcel",
    "Refusal",
    "Welcome",
    "WireError",
    "check_version",
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
"""The path of its one method. Register it without serialisers, so that frames pass as the bytes they are."""
