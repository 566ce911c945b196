"""How much a peer may ask of this side."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """What is refused, before memory is taken for it.

    The peak of memory that one peer can cause is about ``message_bytes`` (its messages under
    way) plus ``decoded_bytes`` (the arrays of the message being read), plus 10 bytes for each
    element of the largest sparse tensor while that is read.

    Raises
    ------
    ValueError
        If a limit is below 1, or ``elements`` above 2**31 (positions in a sparse tensor are
        read as 32 bits).
    """

    message_bytes: int = 1 << 30
    """All messages that one peer has under way together, as announced."""
    header_bytes: int = 1 << 20
    """The header of one message: everything but its tensors' bytes. Configs and metrics are
    in it."""
    decoded_bytes: int = 1 << 30
    """All arrays of one message, once read; what sparse and quantised tensors may grow to."""
    streams: int = 8
    """Messages that one peer has under way at once."""
    records: int = 64
    """Records of one message."""
    tensors: int = 16384
    """Tensors of one message."""
    dims: int = 16
    """Dimensions of one tensor."""
    elements: int = 1 << 28
    """Elements of one tensor; a dimension of 0 counts as 1."""
    name_bytes: int = 512
    """Any name, id, kind or group, as UTF-8."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"limit {field.name} = {getattr(self, field.name)}: must be 1 or more"
                )
        # Keeps the sums of distances within int64, and each distance within five bytes.
        if self.elements > 1 << 31:
            raise ValueError(
                f"limit elements = {self.elements}: must be 2**31 = {1 << 31} or less"
            )
