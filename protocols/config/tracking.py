"""The section ``tracking``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from fedknow.protocols.config.base import MOST_SECONDS, Section

__all__ = ["TrackingConfig"]


def _split(value: Any) -> Any:
    """Let text with commas stand for a list."""
    if not isinstance(value, str):
        return value
    return [name.strip() for name in value.split(",") if name.strip()]


class TrackingConfig(Section):
    """Trackers that follow a run. Nothing here changes a result.

    A bare string or list stands for the names: ``tracking = "mlflow"``. The section is stored
    neither in run folders nor sent to clients.
    """

    to: Annotated[list[str], BeforeValidator(_split)] = Field(
        default=[], max_length=16
    )
    """``tensorboard``, ``mlflow``, ``wandb``, ``trackio`` (``fedknow list trackers``), or
    ``module:Class``. Empty: none, or those that a resumed run had before; ``none``: none."""
    project: str = ""
    """Under which the tracker lists the run; empty: the experiment's name."""
    wait: float = Field(5.0, ge=0, le=MOST_SECONDS)
    """Seconds that the end of a run waits for a tracker to take the last numbers."""
