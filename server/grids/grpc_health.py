"""The standard health service of gRPC, which strangers may ask.

It needs no credential, as load balancers and orchestrators have none. So it has few streams, and
none of them takes a client's place.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import grpc
from grpc_health.v1 import health

from fedknow.server.grids.grpc_doors import Crowded, Doors
from fedknow.server.grids.grpc_gate import address_of

__all__ = ["Health"]

WATCHERS = 4
"""Streams of health from one address."""
WATCHERS_OF_ALL = 32
"""Streams of health from all addresses."""


class Health(health.aio.HealthServicer):  # type: ignore[misc]  # it has no types
    """Says whether the server serves.

    Parameters
    ----------
    doors : Doors
        Count calls by address.
    """

    def __init__(self, doors: Doors) -> None:
        super().__init__()
        self._doors = doors
        self._watchers: Counter[str] = Counter()

    async def Check(self, request: Any, context: Any) -> Any:
        """Answer once; see the protocol of gRPC."""
        await self._knock(context)
        return await super().Check(request, context)

    async def Watch(self, request: Any, context: Any) -> None:
        """Answer with each change; see the protocol of gRPC."""
        await self._knock(context)
        address = address_of(context)
        is_full = self._watchers.total() >= WATCHERS_OF_ALL
        if is_full or self._watchers[address] >= WATCHERS:
            reason = "too many watch already; ask by Check"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
        self._watchers[address] += 1
        try:
            await super().Watch(request, context)
        finally:
            self._watchers[address] -= 1
            if not self._watchers[address]:
                del self._watchers[address]

    async def _knock(self, context: Any) -> None:
        try:
            # Apart from the calls of clients at this address.
            self._doors.knock(f"health of {address_of(context)}")
        except Crowded as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
