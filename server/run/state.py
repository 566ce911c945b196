"""The state of a run that changes from round to round."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedknow.protocols.messages import Arrays
from fedknow.protocols.work import MEMORY
from fedknow.server.run.evaluation import Scores

__all__ = ["RunState"]


@dataclass
class RunState:
    """How far a run is.

    Attributes
    ----------
    arrays : Arrays
        The global model's parameters.
    scores : Scores
        All raw results so far.
    server_round : int
        Rounds that are done, or that under way.
    last_complete : tuple of int, or None
        Task and round that the last checkpoint is of; ``None`` before the first.
    client_memory : float
        Most memory that a client's work has needed so far, bytes; 0: no client has said.
    has_aggregated : bool
        Whether the strategy has ever changed the model.
    """

    arrays: Arrays
    scores: Scores
    server_round: int = 0
    last_complete: tuple[int, int] | None = None
    client_memory: float = 0.0
    has_aggregated: bool = False

    @property
    def client_memory_bytes(self) -> float:
        """Most memory that any client needed; NaN: no client has said."""
        return self.client_memory or math.nan

    def note_memory(self, answers: Iterable[Mapping[str, object]]) -> None:
        """Note the most memory that a client's work has needed.

        Clients of other make may not say.
        """
        for record in answers:
            memory = record.get(MEMORY)
            if isinstance(memory, int | float):
                self.client_memory = max(self.client_memory, float(memory))
