"""The interface of a tracker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from fedknow.protocols.config import ExperimentConfig

__all__ = ["Status", "TrackedRun", "Tracker", "settings"]

Status = Literal["complete", "interrupted", "failed"]
"""How a run ended."""


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker is to follow.

    Attributes
    ----------
    name : str
        Of the run folder, such as ``digits-fedknow-seed0``.
    project : str
        Under which the run is listed.
    folder : Path
        The run folder; a tracker with files of its own may store them in it.
    config : ExperimentConfig
        The complete configuration.
    step : int
        Rounds that were done before; above 0 where a run is resumed.
    former : str
        What :meth:`Tracker.start` returned before the run was resumed; else empty.
    """

    name: str
    project: str
    folder: Path
    config: ExperimentConfig
    step: int = 0
    former: str = ""


@runtime_checkable
class Tracker(Protocol):
    """Stores the numbers of one run.

    All methods are called in one thread of the tracker's own. They may take their time, block
    and raise: the run does not wait for them.
    """

    def start(self, run: TrackedRun) -> str | None:
        """Begin to follow a run.

        Returns
        -------
        str or None
            An identifier, by which the tracker knows the run again when it is resumed.
        """

    def log(self, step: int, numbers: Mapping[str, float], time: float) -> None:
        """Store numbers.

        Parameters
        ----------
        step : int
            Rounds of the run so far.
        numbers : mapping
            Finite numbers by names such as ``round/loss`` (:mod:`~.numbers`).
        time : float
            When they arose, in seconds since 1970.
        """

    def finish(self, status: Status) -> None:
        """End the run; it is the last call."""


def settings(config: ExperimentConfig) -> dict[str, Any]:
    """Give the settings of a run by their dotted keys, such as ``train.lr``."""
    tree = config.model_dump(mode="json", exclude={"tracking"})
    return dict(_flat(tree))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
