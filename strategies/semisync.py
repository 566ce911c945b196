"""Semi-synchronous rounds: the server waits until a deadline, and who is late counts in the next
round."""

from __future__ import annotations

from fedknow.strategies.asynchronous import Crew, Update
from fedknow.strategies.fedbuff import Buffered

__all__ = ["SemiSync"]


class SemiSync(Buffered):
    """A step of whatever arrived within ``deadline`` seconds; who is late goes on, and counts,
    discounted, when done.

    If nobody is in time, the first answer is waited for. The last round of a task has no
    deadline: the next task begins with everybody.

    Parameters
    ----------
    deadline : float
        Seconds of a round: virtual ones with a fleet, real ones with real clients. Elsewhere
        all clients are equally fast and none is ever late, of which a warning tells.
    server_lr, concurrency, staleness, staleness_a, staleness_b
        See :class:`~fedknow.strategies.fedbuff.Buffered`; by default all free clients work in
        every round.
    """

    by_clock = True

    def __init__(
        self,
        deadline: float = 60.0,
        server_lr: float = 1.0,
        concurrency: int = 0,
        staleness: str = "polynomial",
        staleness_a: float = 0.5,
        staleness_b: float = 4.0,
    ) -> None:
        super().__init__(server_lr, concurrency, staleness, staleness_a, staleness_b)
        if deadline <= 0:
            raise ValueError(f"deadline = {deadline!r}: must be above 0 (seconds)")
        self.deadline = deadline

    def gather(self, crew: Crew, left: int) -> list[Update]:
        """What arrives until the deadline."""
        crew.hand_out()
        until = crew.grid.now + self.deadline if left > 1 else None
        updates: list[Update] = []
        while update := crew.take(until):
            updates.append(update)
        if not updates and (first := crew.next()):
            updates.append(first)
        return updates
