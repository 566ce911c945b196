"""What can be wrong with bytes from, or for, the other side."""

from __future__ import annotations

import enum

from fedknow.protocols.errors import FedknowError

__all__ = ["Code", "WireError"]


class Code(enum.IntEnum):
    """Kinds of faults, numbered as in ``fedknow.proto`` (``Refusal.Code``)."""

    CODE_UNSPECIFIED = 0
    """A kind that this version does not know."""
    MALFORMED = 1
    """Not what ``fedknow.proto`` says, or a part contradicts another."""
    TRUNCATED = 2
    """Fewer bytes than announced."""
    TOO_LARGE = 3
    """Above one of the :class:`~fedknow.protocols.wire.Limits`."""
    BAD_CHECKSUM = 4
    BAD_DTYPE = 5
    """A type that does not travel, or not in this encoding."""
    BAD_SHAPE = 6
    """A shape that does not go with the bytes."""
    BAD_VALUE = 7
    """A number or text that cannot be written or read."""
    OUT_OF_ORDER = 8
    """A chunk that is missing, comes twice, or belongs to no message."""
    VERSION = 9
    """The other side speaks another version of the protocol."""
    CREDENTIAL = 10
    """The other side cannot prove to be who it says it is."""
    REPLACED = 11
    """Another stream of the same client took this one's place."""
    FOREIGN = 12
    """An answer in another client's name."""
    NO_ROOM = 13
    """The experiment has no such client, or none left."""
    DUPLICATE = 14
    """Another holder of the same identity is connected."""
    EJECTED = 15
    """The operator took the client out of the run."""


class WireError(FedknowError, ValueError):
    """Bytes that cannot be read, or a message that cannot be written.

    Attributes
    ----------
    code : Code
        What kind of fault.
    reason : str
        A sentence a person can act on.
    """

    def __init__(self, code: Code, reason: str) -> None:
        super().__init__(f"{code.name}: {reason}")
        self.code = code
        self.reason = reason

    def __reduce__(self) -> tuple[type[WireError], tuple[Code, str]]:
        # By default pickle calls the class with the text alone, and the code is lost.
        return type(self), (self.code, self.reason)
