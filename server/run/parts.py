"""The parts of an experiment: built and checked once, and passed on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.serverapp.strategy import Strategy

from fedknow.client.data.stream import TaskStream
from fedknow.client.learners.frames.learner import Learner
from fedknow.protocols.config import ExperimentConfig

__all__ = ["Parts"]


@dataclass(frozen=True)
class Parts:
    """All that an experiment consists of, apart from its clients.

    Attributes
    ----------
    config : ExperimentConfig
        With every setting of the learner.
    learner : Learner
        A freshly built one; its initial parameters are the global model's.
    strategy : flwr.serverapp.strategy.Strategy
        A new one: it has not aggregated anything yet.
    partition : mapping
        Which client holds what; empty where clients have data of their own.
    stream : TaskStream or None
        The clients' data, for a strategy that trains on them itself; ``None`` where clients
        have data of their own.
    """

    config: ExperimentConfig
    learner: Learner
    strategy: Strategy
    partition: Mapping[str, Any] = field(default_factory=dict)
    stream: TaskStream | None = None
