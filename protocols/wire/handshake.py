"""Frames that carry no message: greeting, refusal, goodbye, heartbeat."""

from __future__ import annotations

from fedknow import __version__
from fedknow.protocols.texts import printable
from fedknow.protocols.wire import fedknow_pb2 as pb
from fedknow.protocols.wire.errors import Code, WireError

__all__ = [
    "HEARTBEAT",
    "PROTOCOL",
    "check_version",
    "goodbye",
    "hello",
    "refusal",
    "refused",
    "welcome",
]

PROTOCOL = 1
"""The version of ``fedknow.proto`` that this code speaks. A change that an older peer would
misread makes it 2."""
HEARTBEAT = pb.Frame(heartbeat=pb.Heartbeat()).SerializeToString()
"""The frame that says nothing but that the sender is there."""


def hello(node: int = 0, fence: bytes | None = None) -> bytes:
    """Make a client's first frame.

    Parameters
    ----------
    node : int
        The id that it had before; 0: none.
    fence : bytes, optional
        The secret of its last stream in this run; empty without one. None: a client that knows
        no fences.
    """
    greeting = pb.Hello(protocol=PROTOCOL, package=__version__, node=node)
    if fence is not None:
        greeting.fence = fence
    return _serialised(pb.Frame(hello=greeting))


def welcome(
    node: int,
    config: str,
    run: str = "",
    fence: bytes = b"",
    signature: bytes = b"",
) -> bytes:
    """Make the server's answer to a greeting.

    Parameters
    ----------
    node : int
        The client's node id.
    config : str
        The experiment, as TOML.
    run : str
        The run's id.
    fence : bytes
        The secret of this stream.
    signature : bytes
        Of the experiment, by its owner (:mod:`fedknow.protocols.security.signing`).
    """
    greeting = pb.Welcome(
        protocol=PROTOCOL,
        package=__version__,
        node=node,
        config=config,
        run=run,
        fence=fence,
        signature=signature,
    )
    return _serialised(pb.Frame(welcome=greeting))


def refusal(error: WireError) -> bytes:
    """Make the last frame of a stream: why it ends."""
    reason = printable(error.reason)
    return _serialised(
        pb.Frame(refusal=pb.Refusal(code=error.code.name, reason=reason))
    )


def goodbye(finished: bool, reason: str) -> bytes:
    """Make the last frame of a stream with which nothing is wrong.

    The run is over, or the server means to come back.
    """
    return _serialised(
        pb.Frame(goodbye=pb.Goodbye(finished=finished, reason=reason))
    )


def refused(refusal: pb.Refusal) -> WireError:
    """Make the error that the other side refused us with.

    Its text is bounded and printable, as it goes into logs.
    """
    # A newer peer may refuse with a code that this version does not have.
    spoken = refusal.code in Code._value2member_map_
    return WireError(
        Code(refusal.code) if spoken else Code.CODE_UNSPECIFIED,
        printable(refusal.reason),
    )


def check_version(peer: pb.Hello | pb.Welcome) -> None:
    """Whether the two sides understand each other.

    Raises
    ------
    WireError
        ``VERSION``, with the versions of both sides.
    """
    if peer.protocol != PROTOCOL:
        raise WireError(
            Code.VERSION,
            f"this side speaks protocol {PROTOCOL} (fedknow {__version__}), the other "
            f"side protocol {peer.protocol} "
            # Cut short and quoted, as the other side chose the text and it goes into the log.
            f"(fedknow {peer.package[:64]!r}); install the same version of fedknow on both",
        )


def _serialised(frame: pb.Frame) -> bytes:
    data: bytes = frame.SerializeToString()
    return data
