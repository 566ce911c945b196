"""Typed work for clients, and typed reports of it.

A :class:`~fedknow.protocols.messages.Message` carries records of named values. The classes here
give those values types: three kinds of work, and a report for each. ``to_content`` lays one out
on records, ``from_content`` reads it from them. No array is copied in either direction.

The names of all keys stand in this file. They are part of the wire format, and some of them are
Flower's, so a name never changes.
"""

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
    METRICS,
    TRAIN,
    Arrays,
    Config,
    Content,
    Metrics,
    Record,
)

__all__ = [
    "ACCURACY",
    "COSTS",
    "FLOPS",
    "FROZEN",
    "KNOWLEDGE_BYTES",
    "LOSS",
    "MEMORY",
    "NUM_EXAMPLES",
    "POSITION",
    "ROUND",
    "ROUNDS",
    "SAMPLES",
    "SCORE_LISTS",
    "SECONDS",
    "SERVER_ROUND",
    "TASK",
    "TASKS",
    "EndTaskReport",
    "EndTaskWork",
    "Position",
    "Report",
    "ScoreReport",
    "ScoreWork",
    "TaskScores",
    "TrainReport",
    "TrainWork",
    "Work",
    "merge_settings",
]

# Keys of the config record, which travels to clients.
TASK = "task"
ROUND = "round"
ROUNDS = "rounds"
TASKS = "tasks"
SERVER_ROUND = "server-round"
FROZEN = "frozen"
POSITION = (TASK, ROUND, ROUNDS, TASKS, SERVER_ROUND, FROZEN)
"""Keys of the experiment itself: :class:`Position`."""

_SCORING = "scoring"
_COLLECT = "collect"
_FORWARD = "forward"

# Keys of the metrics record, which travels back.
NUM_EXAMPLES = "num-examples"
"""A client's weight in means: Flower's strategies read it by this name."""
SAMPLES = "samples"
LOSS = "loss"
ACCURACY = "accuracy"
SECONDS = "seconds"
KNOWLEDGE_BYTES = "knowledge-bytes"
_CORRECT = "correct"
_TOTAL = "total"
_LOSSES = "losses"
SCORE_LISTS = (_CORRECT, _TOTAL, _LOSSES)
"""Lists with a value a task, of :class:`TaskScores`."""

FLOPS = "flops"
MEMORY = "memory-bytes"
COSTS = (
    FLOPS,
    MEMORY,
    "memory-weights",
    "memory-gradients",
    "memory-activations",
    "memory-knowledge",
    "memory-replay",
)
"""Metrics of every answer; ``memory-bytes`` is the sum of its parts."""


Metric = int | float | list[int] | list[float]
"""A value of the metrics record."""


def merge_settings(content: Mapping[str, Record]) -> dict[str, Any]:
    """Put a message's config records together; the earlier record wins.

    Parameters
    ----------
    content : mapping
        Records by name, as in a message.

    Returns
    -------
    dict
        All their settings.
    """
    settings: dict[str, Any] = {}
    for record in content.values():
        if isinstance(record, Config):
            settings = {**record, **settings}
    return settings


# --- work --------------------------------------------------------------------------------------


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
            return None if value is None else _whole(kind, key, value)

        return cls(
            _whole(kind, TASK, settings.get(TASK)),
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
            content[EXTRA] = self.extra
        # Settings come after the arrays: the order of records is the order on the wire.
        return {**content, **self._records(), CONFIG: self._config()}

    def _records(self) -> Mapping[str, Record]:
        """Records of this kind of work beside those that all have."""
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
        position = Position.from_settings(merge_settings(content), cls.kind)
        return cls(
            position=position,
            parameters=_parameters(content),
            extra=_arrays(content, EXTRA),
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
        parameters = _parameters(content)
        return cls(
            position=Position.from_settings(settings, cls.kind),
            parameters=parameters,
            extra=_arrays(content, EXTRA),
            settings={k: v for k, v in settings.items() if k not in POSITION},
            records=_other_records(content, parameters),
        )


@dataclass(frozen=True, kw_only=True)
class TrainWork(_LearningWork):
    """One round of local training."""

    kind = TRAIN


@dataclass(frozen=True, kw_only=True)
class EndTaskWork(_LearningWork):
    """The end of a task: take the final parameters and keep what the method keeps."""

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
    kept : Arrays, optional
        What takes the place of the parameters that the client keeps to itself.
    """

    kind = EVALUATE
    scoring: str = ""
    should_collect: bool = False
    has_forward: bool = False
    kept: Arrays | None = None

    def _records(self) -> Mapping[str, Record]:
        return {} if self.kept is None else {KEPT: self.kept}

    def _config(self) -> Config:
        config = super()._config()
        config[_SCORING] = self.scoring
        config[_COLLECT] = self.should_collect
        config[_FORWARD] = self.has_forward
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
            parameters=_parameters(content),
            extra=_arrays(content, EXTRA),
            scoring=str(settings.get(_SCORING) or ""),
            should_collect=bool(settings.get(_COLLECT)),
            has_forward=bool(settings.get(_FORWARD)),
            kept=_arrays(content, KEPT),
        )


# --- reports -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Report:
    """A client's answer to work.

    Attributes
    ----------
    examples : float
        The client's weight in means: its training samples, or those it was scored on.
    measures : mapping of str to number or list of numbers
        What the method reports, such as loss and accuracy.
    costs : mapping of str to float
        What the work cost: :data:`COSTS`.
    seconds : float, optional
        How long it took; None where nobody measures it.
    """

    examples: float
    measures: Mapping[str, Metric] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None

    def to_content(self) -> Content:
        """Lay the report out as the records of a message."""
        # The order is that on the wire. A method's own measure replaces a count of the same
        # name, and costs replace both.
        metrics = Metrics(
            {
                NUM_EXAMPLES: self.examples,
                **self._counts(),
                **self.measures,
                **self._lists(),
                **self.costs,
            }
        )
        if self.seconds is not None:
            metrics[SECONDS] = self.seconds
        return {METRICS: metrics}

    def _counts(self) -> Mapping[str, Metric]:
        """Metrics of this kind of report that stand before the measures."""
        return {}

    def _lists(self) -> Mapping[str, Metric]:
        """Metrics of this kind of report that stand after the measures."""
        return {}


@dataclass(frozen=True, kw_only=True)
class EndTaskReport(Report):
    """What a client did when a task ended.

    Attributes
    ----------
    samples : float
        Samples learned from, each as often as it was; NaN where a client does not say.
    extra : Arrays, optional
        What the learner sends to the strategy beside the parameters.
    """

    samples: float = math.nan
    extra: Arrays | None = None

    @property
    def knowledge_bytes(self) -> float:
        """Size of what the client keeps about its tasks."""
        size = self.measures.get(KNOWLEDGE_BYTES)
        return _checked(KNOWLEDGE_BYTES, size)

    def _counts(self) -> Mapping[str, Metric]:
        return {SAMPLES: self.samples}

    def to_content(self) -> Content:
        """Lay the report out as the records of a message."""
        content = super().to_content()
        if self.extra is not None:
            content[EXTRA] = self.extra
        return content

    @classmethod
    def from_content(cls, content: Mapping[str, Record]) -> Self:
        """Read the report from the records of an answer.

        Raises
        ------
        ValueError
            If a metric is missing or not a number.
        """
        metrics = _metrics(content)
        return cls(**_common(metrics), **_learned(metrics, content))


@dataclass(frozen=True, kw_only=True)
class TrainReport(EndTaskReport):
    """What came of a round of local training.

    Attributes
    ----------
    parameters : Arrays
        The trained parameters that travel.
    """

    parameters: Arrays

    def to_content(self) -> Content:
        """Lay the report out as the records of a message."""
        return {ARRAYS: self.parameters, **super().to_content()}

    @classmethod
    def from_content(cls, content: Mapping[str, Record]) -> Self:
        """Read the report from the records of an answer.

        Raises
        ------
        ValueError
            If a metric is missing or not a number.
        """
        metrics = _metrics(content)
        return cls(
            parameters=_parameters(content),
            **_common(metrics),
            **_learned(metrics, content),
        )


@dataclass(frozen=True)
class TaskScores:
    """Scores task by task, in the order of the tasks.

    Attributes
    ----------
    correct, total : list of int
        Test samples classified correctly, and all of them.
    losses : list of float
        Mean losses.
    """

    correct: list[int]
    total: list[int]
    losses: list[float]


@dataclass(frozen=True, kw_only=True)
class ScoreReport(Report):
    """Scores of the model on a client's test samples.

    Attributes
    ----------
    scores : TaskScores, optional
        Task by task, where this was asked for.
    kept : Arrays, optional
        Parameters that the client keeps to itself, where they were asked for.
    """

    scores: TaskScores | None = None
    kept: Arrays | None = None

    def _lists(self) -> Mapping[str, Metric]:
        if self.scores is None:
            return {}
        lists = (self.scores.correct, self.scores.total, self.scores.losses)
        return dict(zip(SCORE_LISTS, lists, strict=True))

    def to_content(self) -> Content:
        """Lay the report out as the records of a message."""
        content = super().to_content()
        if self.kept is not None:
            content[KEPT] = self.kept
        return content

    @classmethod
    def from_content(cls, content: Mapping[str, Record]) -> Self:
        """Read the report from the records of an answer.

        Raises
        ------
        ValueError
            If a metric is missing or not a number.
        """
        metrics = _metrics(content)
        scores = None
        if _CORRECT in metrics:
            scores = TaskScores(*(_list(metrics, name) for name in SCORE_LISTS))
        return cls(**_common(metrics), scores=scores, kept=_arrays(content, KEPT))


# --- records -----------------------------------------------------------------------------------


def _arrays(content: Mapping[str, Record], name: str) -> Arrays | None:
    """Find the arrays of a name; a record of another type is not for us."""
    record = content.get(name)
    return record if isinstance(record, Arrays) else None


def _parameters(content: Mapping[str, Record]) -> Arrays:
    """Find the model's parameters.

    A strategy may give their record another name, so that the earliest arrays stand in.
    """
    named = _arrays(content, ARRAYS)
    if named is not None:
        return named
    records = (record for record in content.values() if isinstance(record, Arrays))
    return next(records, Arrays())


def _other_records(
    content: Mapping[str, Record], parameters: Arrays
) -> dict[str, Arrays | Metrics]:
    """Gather the records that are no part of the project's own messages."""
    records: dict[str, Arrays | Metrics] = {}
    for name, record in content.items():
        is_ours = record is parameters or name in (EXTRA, KEPT)
        if isinstance(record, Metrics) or (isinstance(record, Arrays) and not is_ours):
            records[name] = record
    return records


def _metrics(content: Mapping[str, Record]) -> Metrics:
    record = content.get(METRICS)
    if not isinstance(record, Metrics):
        raise ValueError(f"the answer needs a record {METRICS!r} of metrics")
    return record


def _common(metrics: Metrics) -> dict[str, Any]:
    """Read what every report has."""
    ours = {NUM_EXAMPLES, SAMPLES, SECONDS, *COSTS, *SCORE_LISTS}
    return {
        "examples": _checked(NUM_EXAMPLES, metrics.get(NUM_EXAMPLES)),
        "measures": {
            name: value for name, value in metrics.items() if name not in ours
        },
        "costs": {
            name: _checked(name, metrics[name]) for name in COSTS if name in metrics
        },
        "seconds": _number(metrics, SECONDS),
    }


def _learned(metrics: Metrics, content: Mapping[str, Record]) -> dict[str, Any]:
    """Read what the reports of learning have."""
    # Clients of another make need not count samples, and their sum is then unknown.
    samples = _number(metrics, SAMPLES)
    return {
        "samples": math.nan if samples is None else samples,
        "extra": _arrays(content, EXTRA),
    }


def _number(metrics: Metrics, name: str) -> float | None:
    value = metrics.get(name)
    return value if isinstance(value, int | float) else None


def _checked(name: str, value: object) -> float:
    if isinstance(value, int | float):
        return value
    raise ValueError(f"the metric {name!r} must be a number, got {value!r}")


def _list(metrics: Metrics, name: str) -> list[Any]:
    value = metrics.get(name)
    if isinstance(value, list):
        return value
    raise ValueError(f"the metric {name!r} must be a list of numbers, got {value!r}")


def _whole(kind: str, key: str, value: object) -> int:
    if isinstance(value, int | float):
        return int(value)
    raise ValueError(
        f"{kind}: the config record needs a number under {key!r}, got {value!r}"
    )
