"""Calls of a strategy: seeded, and named in errors."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from flwr.app import ConfigRecord

from fedknow.client.state import StateError
from fedknow.protocols.messages import Arrays
from fedknow.protocols.plugins import PASSED_ON, explain
from fedknow.protocols.seeds import integer
from fedknow.server.checks.faults import NothingAggregatedError, RunError
from fedknow.server.run.disk import is_disk_full
from fedknow.server.run.events import Warned
from fedknow.server.run.incidents import Incidents
from fedknow.server.run.parts import Parts
from fedknow.server.run.recorder import Recorder
from fedknow.server.run.state import RunState
from fedknow.strategies import heard_from_flower

__all__ = ["StrategyCalls"]

STAGES = {
    "configure_train": 0,
    "start": 0,
    "load_state_dict": 0,
    "aggregate_train": 1,
    "configure_evaluate": 2,
    "aggregate_evaluate": 3,
    "state_dict": 4,
    "aggregate_end_task": 5,
    "kept_bytes": 6,
    "extra_to_score": 7,
}
"""By hook, the number that its seeds are derived from: results depend on these numbers."""


class StrategyCalls:
    """Guards the calls of a strategy, and takes over what it aggregates.

    Parameters
    ----------
    parts : Parts
    state : RunState
        Whose parameters an aggregate replaces.
    recorder : Recorder
    incidents : Incidents
    """

    def __init__(
        self,
        parts: Parts,
        state: RunState,
        recorder: Recorder,
        incidents: Incidents,
    ) -> None:
        self._config = parts.config
        self._learner = parts.learner
        self._state = state
        self._recorder = recorder
        self._incidents = incidents
        self._heard: list[str] = []
        self._heard_before: set[str] = set()

    @property
    def name(self) -> str:
        """The strategy's name, for sentences."""
        return self._config.strategy.name

    @contextmanager
    def call(self, hook: str, task: int, round: int) -> Iterator[None]:
        """Seed what strategies draw from, and name the strategy if it fails."""
        self.seed(self._state.server_round, hook)
        try:
            # Flower only logs why it aggregates nothing, and a user must be told.
            with heard_from_flower() as self._heard:
                yield
        except (RunError, StateError, *PASSED_ON):
            raise  # these name somebody else
        # Also SystemExit, which would end the run as if it were finished.
        except BaseException as error:
            # The machine's fault and not the strategy's: it has a message of its own.
            if is_disk_full(error):
                raise
            too_small = self._incidents.too_small
            suffix = (
                f"; {self._incidents.all_failed(too_small)}" if too_small else ""
            )
            raise RunError(
                f"strategy {self.name} failed in {hook}, task {task + 1}, round {round}: "
                f"{explain(error)}{suffix}"
            ) from error

    def seed(self, server_round: int, hook: str) -> None:
        """Seed the generators that strategies draw from in a hook of a round."""
        stage = STAGES[hook]
        # Flower samples clients with Python's global generator and draws noise from NumPy's.
        random.seed(integer(self._config.seed, "strategy", server_round, stage))
        seed = integer(self._config.seed, "strategy.numpy", server_round, stage)
        np.random.seed(seed % 2**32)  # noqa: NPY002

    def settings(self, task: int, round: int) -> ConfigRecord:
        """Make the settings that every message of a round says."""
        settings = ConfigRecord(
            {
                "task": task,
                "round": round,
                "rounds": self._config.train.rounds,
                "tasks": self._config.data.tasks,
                "server-round": self._state.server_round,
            }
        )
        # Left out where nothing is frozen, so that messages stay as they are in most runs.
        if digest := self._learner.entries.frozen_digest:
            settings["frozen"] = digest
        return settings

    def adopt(self, task: int, round: int, arrays: Arrays) -> None:
        """Take over an aggregate, and record what Flower warned of.

        Each text is told once a run.
        """
        self._state.arrays = arrays
        self._state.has_aggregated = True
        for text in self._heard:
            if text not in self._heard_before:
                self._heard_before.add(text)
                self._warn(task, round, f"strategy {self.name}: {text}")

    def note_nothing(self, task: int, round: int, outcome: str) -> None:
        """Record that a round left the model alone, with Flower's reason."""
        because = f": {'; '.join(self._heard)}" if self._heard else ""
        self._warn(
            task,
            round,
            f"strategy {outcome}{because}; the global model stays as it is",
        )

    def refuse_standstill(self, moment: str) -> None:
        """Stop a run whose strategy has never aggregated anything.

        Its results would be those of the initial model, and look like any others.

        Raises
        ------
        NothingAggregatedError
        """
        if self._state.has_aggregated:
            return
        because = f" ({'; '.join(self._heard)})" if self._heard else ""
        deadline = self._config.fleet.deadline
        more_time = f", raise fleet.deadline = {deadline:g}" if deadline else ""
        raise NothingAggregatedError(
            f"strategy {self.name} has aggregated nothing {moment}{because}, so the "
            f"global model is still the initial one; change the strategy's settings{more_time} or "
            "the number of clients, and start again with another --out"
        )

    def _warn(self, task: int, round: int, reason: str) -> None:
        self._recorder.record(Warned(task=task, round=round, reason=reason))
