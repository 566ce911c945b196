"""Pieces of work for clients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from fedknow.protocols.messages import (
    ARRAYS,
    CONFIG,
    END_TASK,
    EVALUATE,
    EXTRA,
    KEPT,
    TRAIN,
    Arrays,
    Config,
    Content,
    Metrics,
    Record,
)
from fedknow.protocols.work.keys import (
    COLLECT,
    FORWARD,
    FROZEN,
    POSITION,
    ROUND,
    ROUNDS,
    SCORING,
    SERVER_ROUND,
    TASK,
    TASKS,
)
from fedknow.protocols.work.records import (
    find_arrays,
    find_parameters,
    merge_settings,
    other_records,
)

__all__ = ["EndTaskWork", "Position", "ScoreWork", "TrainWork", "Work"]


@dataclass(frozen=True)
class Position:
    """The place of a piece of work in the experiment.

    Attributes
    ----------
    task : int
        From 0.
    round : int, optional
        Round within the task, from 1. None where a task ends or is scored.
    rounds, tasks : int, optional
        How many rounds each task has, and how many tasks there are.
    server_round : int, optional
        Round of the whole run, from 1.
    frozen : str
        Digest of the frozen parameters, which do not travel; empty without any.
    """

    task: int
    round: int | None = None
    rounds: int | None = None
    tasks: int | None = None
    server_round: int | None = None
    frozen: str = ""

    def to_config(self) -> Config:
        """Lay the position out as settings; what is not known is left out."""
        values = (
            self.task,
            self.round,
            self.rounds,
            self.tasks,
            self.server_round,
            self.frozen or None,
        )
        config = Config()
        # Left out and not 0: Flower's records cannot hold None.
        for key, value in zip(POSITION, values, strict=True):
            if value is not None:
                config[key] = value
        return config

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], kind: str) -> Self:
        """Read the position from settings.

        Parameters
        ----------
        settings : mapping
            As :func:`merge_settings` gives them.
        kind : str
            Kind of the message, for errors.

        Raises
        ------
        ValueError
            If there is no task, or a value is not a number.
        """

        def number(key: str) -> int | None:
            value = settings.get(key)
            return None if value is None else _integer(kind, key, value)

        return cls(
            _integer(kind, TASK, settings.get(TASK)),
            number(ROUND),
            number(ROUNDS),
            number(TASKS),
            number(SERVER_ROUND),
            str(settings.get(FROZEN, "")),
        )


@dataclass(frozen=True, kw_only=True)
class Work:
    """One piece of work for a client.

    Attributes
    ----------
    kind : str
        Kind of the message that carries it.
    position : Position
        The place of the work in the experiment.
    parameters : Arrays
        The global model's parameters that travel.
    extra : Arrays, optional
        What the strategy sends beside the parameters, for the learner.
    """

    kind: ClassVar[str]
    position: Position
    parameters: Arrays
    extra: Arrays | None = None

    def to_content(self) -> Content:
        """Lay the work out as the records of a message.

        Returns
        -------
        dict
            Records by name. The arrays in it are those of this object.
        """
        content: Content = {ARRAYS: self.parameters}
        if self.extra is not None:
            # An empty record would still count as traffic.
            content[EXTRA] = self.extra
        # Settings come after the arrays: the order of records is the order on the wire.
        return {**content, **self._records(), CONFIG: self._config()}

    def _records(self) -> Mapping[str, Record]:
        """Return the records of this kind of work beside the common ones."""
        return {}

    def _config(self) -> Config:
        """All settings."""
        return self.position.to_config()

    @classmethod
    def from_content(cls, content: Mapping[str, Record]) -> Self:
        """Read the work from the records of a message.

        Raises
        ------
        ValueError
            If the task is missing, or a key of the experiment is not a number.
        """
        # A strategy may spread its settings over several records.
        position = Position.from_settings(merge_settings(content), cls.kind)
        return cls(
            position=position,
            parameters=find_parameters(content),
            extra=find_arrays(content, EXTRA),
        )


@dataclass(frozen=True, kw_only=True)
class _LearningWork(Work):
    """Work in which a client learns, by a strategy's settings.

    Attributes
    ----------
    settings : mapping
        All other settings: how to train, and what the learner alone reads.
    records : mapping
        Arrays and metrics that a strategy sends under names of its own, for the learner.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    records: Mapping[str, Arrays | Metrics] = field(default_factory=dict)

    def _records(self) -> Mapping[str, Record]:
        return self.records

    def _config(self) -> Config:
        return Config({**super()._config(), **self.settings})

    @classmethod
    def from_content(cls, content: Mapping[str, Record]) -> Self:
        settings = merge_settings(content)
        parameters = find_parameters(content)
        return cls(
            position=Position.from_settings(settings, cls.kind),
            parameters=parameters,
            extra=find_arrays(content, EXTRA),
            # The position is the experiment's own, and no learner is to take it for a setting.
            settings={k: v for k, v in settings.items() if k not in POSITION},
            records=other_records(content, parameters),
        )


@dataclass(frozen=True, kw_only=True)
class TrainWork(_LearningWork):
    """One round of local training."""

    kind = TRAIN


@dataclass(frozen=True, kw_only=True)
class EndTaskWork(_LearningWork):
    """The end of a task, with its final parameters."""

    kind = END_TASK


@dataclass(frozen=True, kw_only=True)
class ScoreWork(Work):
    """Scoring of the model on the tasks up to the one of the position.

    Attributes
    ----------
    scoring : str
        ``personal`` or ``global``; empty where only the means are wanted, as Flower's
        strategies want them.
    should_collect : bool
        Send the parameters that the client keeps to itself.
    has_forward : bool
        Score the tasks that are not learned yet, too.
    local_parameters : Arrays, optional
        What takes the place of the parameters that the client keeps to itself.
    """

    kind = EVALUATE
    scoring: str = ""
    should_collect: bool = False
    has_forward: bool = False
    local_parameters: Arrays | None = None

    def _records(self) -> Mapping[str, Record]:
        return (
            {} if self.local_parameters is None else {KEPT: self.local_parameters}
        )

    def _config(self) -> Config:
        config = super()._config()
        config[SCORING] = self.scoring
        config[COLLECT] = self.should_collect
        config[FORWARD] = self.has_forward
        return config

    @classmethod
    def from_content(cls, content: Mapping[str, Record]) -> Self:
        """Read the work from the records of a message.

        Raises
        ------
        ValueError
            If the task is missing, or a key of the experiment is not a number.
        """
        settings = merge_settings(content)
        return cls(
            position=Position.from_settings(settings, cls.kind),
            parameters=find_parameters(content),
            extra=find_arrays(content, EXTRA),
            scoring=str(settings.get(SCORING) or ""),
            # A strategy's own evaluation sends none of these keys.
            should_collect=bool(settings.get(COLLECT)),
            has_forward=bool(settings.get(FORWARD)),
            local_parameters=find_arrays(content, KEPT),
        )


def _integer(kind: str, key: str, value: object) -> int:
    # A strategy may compute a number as float, which is a whole one still.
    if isinstance(value, int | float) and math.isfinite(value):
        return int(value)
    raise ValueError(
        f"{kind}: the config record needs a number under {key!r}, got {value!r}"
    )
