"""Who hears which clients are at work, while they are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fedknow.protocols.messages import Message

__all__ = ["Change", "Listener"]


@dataclass(frozen=True)
class Change:
    """A change of membership that a run's record tells.

    Attributes
    ----------
    kind : str
        ``ejected``, ``admitted``, ``revoked``, ``renewed`` or ``conflict``.
    client : int
    reason : str
        A sentence.
    """

    kind: str
    client: int
    reason: str


class Listener:
    """Hears what a grid does; this one does nothing with it.

    A listener is for those who watch. It must not fail, and it can change nothing.
    """

    def describe(self, devices: Sequence[str]) -> None:
        """Hear which device each client has."""

    def send(
        self,
        work: Sequence[Message],
        absent: Collection[int],
        is_pushed: bool = False,
    ) -> None:
        """Hear that clients are given work, and which others are away."""

    def answer(self, reply: Message) -> None:
        """Hear that an answer came, or a failure in its place."""

    def miss(self, work: Sequence[Message]) -> None:
        """Hear that no answer to some work is waited for any more."""

    def presence(self, absent: Collection[int]) -> None:
        """Hear that a client came or went."""
