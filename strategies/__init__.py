"""Aggregation strategies by name, and a user's own by ``module:Class``."""

from __future__ import annotations

from fedknow.strategies.build import build_strategy
from fedknow.strategies.descriptions import describe_strategy
from fedknow.strategies.flower_log import heard_from_flower, quiet_flower
from fedknow.strategies.registry import list_strategies
from fedknow.strategies.running_mean import (
    check_running_mean,
    mean_strategies,
    needs_mean_alone,
)

__all__ = [
    "build_strategy",
    "check_running_mean",
    "describe_strategy",
    "heard_from_flower",
    "list_strategies",
    "mean_strategies",
    "needs_mean_alone",
    "quiet_flower",
]
