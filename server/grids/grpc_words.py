"""What a gRPC server tells its clients at the beginning and at the end."""

from __future__ import annotations

from dataclasses import dataclass

from fedknow.protocols.wire import welcome
from fedknow.server.grids.grpc_link import Link

__all__ = ["Farewell", "Invitation"]


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


@dataclass(frozen=True)
class Invitation:
    """What clients are told of the run.

    Attributes
    ----------
    config : str
        The experiment's configuration (TOML).
    run : str
        The run's id.
    signature : bytes
        Of the experiment, by its owner; empty without one.
    """

    config: str
    run: str
    signature: bytes = b""

    def welcome(self, link: Link) -> bytes:
        """Make the frame that greets a client."""
        return welcome(
            link.peer.node, self.config, self.run, link.fence, self.signature
        )
