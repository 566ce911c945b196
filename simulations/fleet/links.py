"""Links of clients: one for each, or one that all share."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedknow.protocols.config import FleetConfig
from fedknow.protocols.seeds import generator

__all__ = ["Links", "Pipe", "make_links"]


@dataclass(frozen=True)
class Links:
    """The clients' links.

    Attributes
    ----------
    down, up : sequence of float
        Bytes a second to and from each client; infinite: no limit. Where there is one link for
        all, the rates of client 0 are its own.
    is_shared : bool
        Whether there is one link for all.
    """

    down: Sequence[float]
    up: Sequence[float]
    is_shared: bool = False


def make_links(config: FleetConfig, clients: int, seed: int) -> Links:
    """Make links whose differences between clients are drawn from a seed."""
    draw = generator(seed, "fleet.links")
    factors = np.exp(config.link_sigma * draw.standard_normal(clients))
    # A rate of 0 in the configuration means no limit.
    down = ((config.down or math.inf) * factors).tolist()
    up = ((config.up or math.inf) * factors).tolist()
    return Links(down, up, config.shared)


class Pipe:
    """One direction of a shared link.

    At every moment all transfers share its rate equally (processor sharing). The pipe counts its
    *service*: the bytes that a transfer would have which is under way all the time. It grows by
    ``rate / n`` a second with ``n`` transfers under way. A transfer ends when the service has
    grown by its size.

    Parameters
    ----------
    rate : float
        Bytes a second; infinite: no limit.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._time = 0.0
        self._service = 0.0
        self._heap: list[tuple[float, int, str]] = []
        self._present: set[str] = set()
        self._joined = 0

    def join(self, id: str, size: float, time: float) -> None:
        """Begin a transfer of ``size`` bytes."""
        self._pass(time)
        self._joined += 1
        # By the service at its end: all transfers get the same service, so their order never
        # changes.
        heapq.heappush(self._heap, (self._service + size, self._joined, id))
        self._present.add(id)

    def leave(self, id: str, time: float) -> None:
        """End a transfer, complete or not."""
        if id in self._present:
            self._pass(time)
            self._present.discard(id)

    def next(self) -> tuple[float, str] | None:
        """Return when the next transfer will be complete, and its id.

        This holds if no other begins or ends until then. None: no transfer is under way.
        """
        # Transfers that were given up stay in the heap, as removing them there is slow.
        while self._heap and self._heap[0][2] not in self._present:
            heapq.heappop(self._heap)
        if not self._heap:
            # Nobody refers to it now: numbers stay small, and exact.
            self._service = 0.0
            return None
        target, _, id = self._heap[0]
        remaining = max(0.0, target - self._service)
        return self._time + remaining * len(self._present) / self._rate, id

    def _pass(self, time: float) -> None:
        if self._present and self._rate < math.inf:
            self._service += (time - self._time) * self._rate / len(self._present)
        self._time = time
