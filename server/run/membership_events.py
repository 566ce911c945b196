"""The event of a change among the real clients of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedknow.server.run.event_base import Event

__all__ = ["MembershipChanged"]


@dataclass(frozen=True, kw_only=True)
class MembershipChanged(Event):
    """A real client was taken out or let in, or two hold one identity.

    Attributes
    ----------
    change : str
        ``ejected``, ``admitted``, ``revoked``, ``renewed`` or ``conflict``.
    client : int
    reason : str
        A sentence.
    """

    event: ClassVar[str] = "membership"

    change: str
    client: int
    reason: str
