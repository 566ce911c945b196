"""Semi-synchronous rounds: the server waits until a deadline.

Stripelis, Thompson and Ambite, "Semi-Synchronous Federated Learning for Energy-Efficient
Training and Accelerated Convergence in Cross-Silo Settings", ACM TIST 2022, synchronise clients
at fixed times. Here a client that is late goes on working, and counts, discounted as in FedBuff
(Nguyen et al., AISTATS 2022), in the round in which its answer arrives.
"""

from __future__ import annotations

from fedknow.strategies.asynchronous import ClientUpdate, Dispatcher
from fedknow.strategies.fedbuff import Buffered

__all__ = ["SemiSync"]


class SemiSync(Buffered):
    """The server makes a step of the answers that arrive within a deadline.

    Clients that are late go on. Their answers count, discounted, when they are done. If nobody
    is in time, the server waits for the first answer. The last round of a task has no deadline:
    the next task begins with everybody.

    Parameters
    ----------
    deadline : float
        Seconds of a round: virtual ones with a fleet, real ones with real clients. Elsewhere
        all clients are equally fast and none is ever late; a warning says so.
    server_lr, concurrency, staleness, staleness_a, staleness_b
        See :class:`~fedknow.strategies.fedbuff.Buffered`; by default all free clients work in
        every round.
    """

    by_clock = True

    def __init__(  # noqa: PLR0913  # the strategy's settings
        self,
        deadline: float = 60.0,
        server_lr: float = 1.0,
        concurrency: int = 0,
        staleness: str = "polynomial",
        staleness_a: float = 0.5,
        staleness_b: float = 4.0,
    ) -> None:
        super().__init__(
            server_lr, concurrency, staleness, staleness_a, staleness_b
        )
        if deadline <= 0:
            raise ValueError(
                f"deadline = {deadline!r}: must be above 0 (seconds)"
            )
        self.deadline = deadline

    def gather(
        self, dispatcher: Dispatcher, rounds_remaining: int
    ) -> list[ClientUpdate]:
        """Take the answers that arrive until the deadline, and at least one."""
        dispatcher.dispatch()
        # The deadline counts from the moment at which the work was given out.
        is_last_round = rounds_remaining == 1
        deadline = (
            None if is_last_round else dispatcher.grid.clock_time + self.deadline
        )
        updates: list[ClientUpdate] = []
        while update := dispatcher.take_update(deadline):
            updates.append(update)
        if not updates and (update := dispatcher.next_update()):
            updates.append(update)
        return updates
