"""What all sections of a configuration share."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "MOST_CLASSES",
    "MOST_CLIENTS",
    "MOST_EPOCHS",
    "MOST_ROUNDS",
    "MOST_SAMPLES",
    "MOST_SCORES",
    "MOST_SECONDS",
    "MOST_TASKS",
    "Component",
    "Section",
]

# Bounds far above what anybody has run: with a zero too many a run would be endless or fill the
# memory.
MOST_CLIENTS = 1_000_000
MOST_TASKS = 10_000
MOST_CLASSES = 1_000_000
MOST_ROUNDS = 1_000_000
MOST_EPOCHS = 10_000
MOST_SAMPLES = 1_000_000
"""Of a batch."""
MOST_SECONDS = 1e9
"""Thirty years; Python's timers end at three hundred."""
MOST_SCORES = 200_000_000
"""Clients x tasks x tasks: 1.6 GB for each way of scoring."""


class Section(BaseModel):
    """A part of the configuration.

    Unknown keys are refused, and values never change once read.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


class Component(BaseModel):
    """A part chosen by ``name``, whose other keys are its settings.

    A bare string stands for the name: ``strategy = "fedadam"``. The settings are checked by
    whoever builds the part.
    """

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1)

    @property
    def options(self) -> dict[str, Any]:
        """The settings besides the name."""
        return dict(self.__pydantic_extra__ or {})
