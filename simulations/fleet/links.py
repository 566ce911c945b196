"""Links: how long bytes take. Each client has one of its own, or all share one."""

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
        all, its rates.
    shared : bool
        Whether there is one link for all.
    """

    down: Sequence[float]
    up: Sequence[float]
    shared: bool = False


def make_links(config: FleetConfig, clients: int, seed: int) -> Links:
    """What the configuration says, with the differences between clients drawn from the seed."""
    draw = generator(seed, "fleet.links")
    factors = np.exp(config.link_sigma * draw.standard_normal(clients))
    down, up = (
        ((rate or math.inf) * factors).tolist() for rate in (config.down, config.up)
    )
    return Links(down, up, config.shared)


class Pipe:
    """One way of a shared link: at every moment its rate is shared equally by all that use it
    (processor sharing).

    Counted is the *service*, the bytes that a transfer gets that is there all the time: it
    grows by ``rate / n`` a second with ``n`` transfers under way, and a transfer ends when the
    service has grown by its size.

    Parameters
    ----------
    rate : float
        Bytes a second; infinite: no limit.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._time = self._service = 0.0
        self._heap: list[tuple[float, int, str]] = []
        self._present: set[str] = set()
        self._joined = 0

    def join(self, id: str, size: float, time: float) -> None:
        """A transfer of ``size`` bytes begins."""
        self._pass(time)
        self._joined += 1
        # By the service at its end: all transfers get the same service, so their order never
        # changes.
        heapq.heappush(self._heap, (self._service + size, self._joined, id))
        self._present.add(id)

    def leave(self, id: str, time: float) -> None:
        """A transfer ends, done or not."""
        if id in self._present:
            self._pass(time)
            self._present.discard(id)

    def next(self) -> tuple[float, str] | None:
        """When the first transfer will be done, if nothing else happens, and which it is; None:
        there is none."""
        while self._heap and self._heap[0][2] not in self._present:
            heapq.heappop(self._heap)
        if not self._heap:
            self._service = 0.0  # nobody refers to it: numbers stay small, and exact
            return None
        target, _, id = self._heap[0]
        return self._time + max(0.0, target - self._service) * len(
            self._present
        ) / self._rate, id

    def _pass(self, time: float) -> None:
        if self._present and self._rate < math.inf:
            self._service += (time - self._time) * self._rate / len(self._present)
        self._time = time
