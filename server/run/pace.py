"""The pace of a run: how far it is, and the time that is left."""

from __future__ import annotations

import math
from collections import deque

from fedknow.protocols.config import ExperimentConfig

__all__ = ["Pace"]

WINDOW = 12
"""Rounds whose pace predicts the remaining time.

Later tasks are slower, so only the latest rounds count.
"""


class Pace:
    """How far a run is, round by round.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment, for the number of rounds to come.

    Attributes
    ----------
    total : float
        Length of the run, in rounds or in virtual seconds.
    rounds : int or None
        Rounds of a task; ``None`` where tasks last a time.
    position : float
        How far the run is; not more than ``total``.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        self.rounds: int | None = config.train.rounds
        self.total = float(config.data.tasks * config.train.rounds)
        self.position = 0.0
        self._is_timed = False
        self._latest: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        if config.data.arrival != "same" or config.data.arrival_seconds:
            # Imported where it is needed: the times bring Flower with them.
            from fedknow.server.run.task_times import TaskTimes

            times = TaskTimes.plan(config)
            # A task lasts a time, so its number of rounds is not known before.
            self.rounds = None
            self.total = float(times.ends.max())
            self._is_timed = times.is_in_seconds

    def add(
        self,
        server_round: int,
        virtual_seconds: float | None,
        time: float,
    ) -> None:
        """Take in a round that ended.

        Parameters
        ----------
        server_round : int
            The round's number in the run.
        virtual_seconds : float or None
            Virtual time since the run began; ``None`` where clients have no devices.
        time : float
            When it ended, in seconds of any clock.
        """
        position = float(server_round)
        if self._is_timed and virtual_seconds is not None:
            position = virtual_seconds
        # With tasks of a certain time the last round may end after the end of the run.
        self.position = min(position, self.total)
        self._latest.append((self.position, time))

    def seconds_left(self) -> float:
        """Estimate the time left; NaN before there is a pace."""
        if not self._latest:
            return math.nan
        start, start_time = self._latest[0]
        end, end_time = self._latest[-1]
        if end == start:
            return math.nan
        # Evaluations between these rounds count too, as they will between later ones.
        pace = (end_time - start_time) / (end - start)
        return pace * (self.total - self.position)
