"""Checks of numbers among a client's metrics."""

from __future__ import annotations

import math

import numpy as np

from fedknow.protocols.messages import Metrics
from fedknow.protocols.work import COSTS
from fedknow.server.checks.faults import Fault, Unusable

__all__ = ["check_costs", "check_number"]


def check_costs(metrics: Metrics) -> None:
    """Raise :class:`Unusable` if a cost is no number, or below 0."""
    for name in COSTS:
        cost = metrics.get(name, 0.0)
        if not isinstance(cost, int | float) or cost < 0:
            raise Unusable(
                Fault.METRICS,
                name,
                f"{name} must be a number not below 0, got {cost!r:.200}",
            )


def check_number(name: str, value: object) -> None:
    """Raise :class:`Unusable` if a metric is no finite number or list of them."""
    try:
        if isinstance(value, int | float):
            finite = math.isfinite(value)
        else:
            # Texts and lists of unequal length fail here, and not in a strategy.
            finite = bool(np.isfinite(np.asarray(value, dtype=np.float64)).all())
    except (TypeError, ValueError, OverflowError):
        raise Unusable(
            Fault.METRICS,
            name,
            f"metric {name} must be a number or a list of numbers, got {value!r:.200}",
        ) from None
    if not finite:
        raise Unusable(Fault.NOT_FINITE, name, f"metric {name} is {value}")
