"""Ends of a client's connection, and of the client."""

from __future__ import annotations

from fedknow.protocols.errors import FedknowError
from fedknow.protocols.wire import WireError

__all__ = ["EdgeError", "Gone", "Refused"]


class EdgeError(FedknowError, RuntimeError):
    """A client that gave up; the text says why."""


class Refused(Exception):
    """The server ended the stream with a reason.

    Attributes
    ----------
    error : WireError
        The reason.
    """

    def __init__(self, error: WireError) -> None:
        super().__init__(str(error))
        self.error = error


class Gone(Exception):
    """The connection is of no use any more; the text says why."""
