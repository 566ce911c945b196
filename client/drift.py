"""Drift test: whether a round's losses are larger than those before.

A sequential test on ranks, which needs no assumption about how losses are distributed. While all
losses are independent draws of one distribution, whichever it is, the rank of each new one among
those before is uniform. Small ranks in a row are evidence against it, and a bet on them grows:

    p_n = (number of losses up to the n-th that are at least as large, itself included) / n
    e_n = 1 / (2 sqrt(p_n)),    whose mean is at most 1
    R_n = (1 + R_{n-1}) e_n,    and an alarm at R_n >= 1 / false_alarms

``R`` begins at 0 with each round. ``R_n`` minus the number of losses is then a supermartingale, so
that the chance of an alarm within m losses is at most ``m * false_alarms`` (Doob). Losses that
became smaller, as a model learned, make an alarm less likely still.

Ranks as evidence: Vovk, Nouretdinov and Gammerman, "Testing exchangeability on-line", ICML 2003.
The sum of bets: Shiryaev, 1963; Roberts, "A comparison of some control chart procedures", 1966.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST_LOSSES", "DriftTest"]

MOST_LOSSES = 256
"""Losses of earlier rounds that new ones are compared with; a client keeps them, 2 kB."""


@dataclass
class DriftTest:
    """The test's state after the rounds so far.

    Attributes
    ----------
    false_alarms : float
        Most false alarms a loss, on average.
    losses : float64 [n]
        The newest losses of earlier rounds, oldest first.

    Examples
    --------
    >>> test = DriftTest(false_alarms=1e-4)
    >>> low = [0.1 + 0.001 * (k % 7) for k in range(100)]
    >>> test.find(low), test.find(low)
    (None, None)
    >>> test.find([2.0] * 50) < 20
    True
    """

    false_alarms: float
    losses: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    def find(self, losses: Sequence[float]) -> int | None:
        """Take the losses of a round, in an order drawn at random.

        After an alarm these alone are what the next round is compared with.

        Returns
        -------
        int or None
            How many losses the alarm took; ``None`` without one.
        """
        alarm = self._alarm(losses)
        new = np.asarray(losses, np.float64)
        # Of the new task they alone tell the level.
        bag = new if alarm else np.concatenate([self.losses, new])
        self.losses = bag[-MOST_LOSSES:]
        return alarm

    def _alarm(self, losses: Sequence[float]) -> int | None:
        bag = np.concatenate([self.losses, np.asarray(losses, np.float64)])
        start = len(self.losses)
        evidence = 0.0
        for count, loss in enumerate(losses, start=1):
            end = start + count
            # Itself included, so that it is at least one.
            larger = np.count_nonzero(bag[:end] >= loss)
            evidence = (1 + evidence) * _bet(larger / end)
            if evidence >= 1 / self.false_alarms:
                return count
        return None


def _bet(p: float) -> float:
    """Give what a bet on small ranks returns; 1 on average for a uniform p."""
    return float(0.5 / np.sqrt(p))
