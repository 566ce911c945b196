"""Reports of clients about their work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from fedknow.protocols.messages import (
    ARRAYS,
    EXTRA,
    KEPT,
    METRICS,
    Arrays,
    Content,
    Metrics,
    Record,
)
from fedknow.protocols.work.keys import (
    CORRECT,
    COSTS,
    KNOWLEDGE_BYTES,
    NUM_EXAMPLES,
    SAMPLES,
    SCORE_LISTS,
    SECONDS,
)
from fedknow.protocols.work.records import find_arrays, find_parameters

__all__ = ["EndTaskReport", "Report", "ScoreReport", "TaskScores", "TrainReport"]

Metric = int | float | list[int] | list[float]
"""A value of the metrics record."""


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
            # Scoring has none: it is no work of the method.
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
        # The method measures it, as it alone knows what it keeps.
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
            parameters=find_parameters(content),
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
    local_parameters : Arrays, optional
        Parameters that the client keeps to itself, where they were asked for.
    """

    scores: TaskScores | None = None
    local_parameters: Arrays | None = None

    def _lists(self) -> Mapping[str, Metric]:
        if self.scores is None:
            return {}
        # In the order of SCORE_LISTS.
        lists = (self.scores.correct, self.scores.total, self.scores.losses)
        return dict(zip(SCORE_LISTS, lists, strict=True))

    def to_content(self) -> Content:
        """Lay the report out as the records of a message."""
        content = super().to_content()
        if self.local_parameters is not None:
            content[KEPT] = self.local_parameters
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
        # Absent where only means were asked for, as Flower's strategies do.
        if CORRECT in metrics:
            scores = TaskScores(*(_list(metrics, name) for name in SCORE_LISTS))
        return cls(
            **_common(metrics),
            scores=scores,
            local_parameters=find_arrays(content, KEPT),
        )


def _metrics(content: Mapping[str, Record]) -> Metrics:
    record = content.get(METRICS)
    if not isinstance(record, Metrics):
        raise ValueError(f"the answer needs a record {METRICS!r} of metrics")
    return record


def _common(metrics: Metrics) -> dict[str, Any]:
    """Read what every report has."""
    # All else is the method's own, whatever it is called.
    typed_names = {NUM_EXAMPLES, SAMPLES, SECONDS, *COSTS, *SCORE_LISTS}
    return {
        "examples": _checked(NUM_EXAMPLES, metrics.get(NUM_EXAMPLES)),
        "measures": {
            name: value
            for name, value in metrics.items()
            if name not in typed_names
        },
        "costs": {
            name: _checked(name, metrics[name])
            for name in COSTS
            if name in metrics
        },
        "seconds": _number(metrics, SECONDS),
    }


def _learned(metrics: Metrics, content: Mapping[str, Record]) -> dict[str, Any]:
    """Read what the reports of learning have."""
    # Clients of another make need not count samples, and their sum is then unknown.
    samples = _number(metrics, SAMPLES)
    return {
        "samples": math.nan if samples is None else samples,
        "extra": find_arrays(content, EXTRA),
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
    raise ValueError(
        f"the metric {name!r} must be a list of numbers, got {value!r}"
    )
