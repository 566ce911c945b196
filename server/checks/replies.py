"""What clients answer is checked here, so that a fault is named where it happens.

Flower's strategies trust what they are given: one reply with other names ends the run with a
puzzle, one NaN poisons the model for good. So replies are checked before a strategy sees them,
and its answer before the experiment uses it (:mod:`fedknow.server.checks.aggregates`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from fedknow.client.learners.frames.learner import Layout
from fedknow.protocols.errors import FedknowError
from fedknow.protocols.messages import (
    CLIENT_FAILED,
    END_TASK,
    EVALUATE,
    EXTRA,
    KEPT,
    METRICS,
    OUT_OF_MEMORY,
    STATE_LOST,
    TRAIN,
    Arrays,
    Failure,
    Mean,
    Message,
    Metrics,
    Record,
    client_of,
)
from fedknow.protocols.texts import counted
from fedknow.protocols.work import (
    COSTS,
    KNOWLEDGE_BYTES,
    NUM_EXAMPLES,
    SCORE_LISTS,
)

__all__ = [
    "ClientFailure",
    "ClientLost",
    "Fault",
    "Inspector",
    "NothingAggregatedError",
    "RunError",
    "Unusable",
    "check_finite",
    "check_like",
]


class RunError(FedknowError, RuntimeError):
    """A run that cannot go on; the text says who failed, when and why. What was earned until then
    is kept."""


class NothingAggregatedError(RunError):
    """A run whose strategy never aggregated; resumed, it would end in the same way."""

    is_resumable = False


class ClientLost(RunError):
    """A run that a client without its state ends; to go on is of no use until that is mended."""

    is_resumable = False


class Fault(StrEnum):
    """What is wrong with a reply."""

    FAILED = "the client failed"
    OUT_OF_MEMORY = "the client's device lacks memory"
    STATE_LOST = "the client's state is lost"
    NOT_FINITE = "not finite"
    NAMES = "other names"
    SHAPE = "another shape"
    DTYPE = "another dtype"
    NORM = "an absurd norm"
    METRICS = "unusable metrics"


_FAULTS = {OUT_OF_MEMORY: Fault.OUT_OF_MEMORY, STATE_LOST: Fault.STATE_LOST}
"""What the codes of clients' failures say; any other is :attr:`Fault.FAILED`."""


@dataclass(frozen=True)
class ClientFailure:
    """A reply that cannot be used.

    Attributes
    ----------
    fault : Fault
    client, task, round : int
        Whose reply, and when; the client counts from 0.
    kind : str
        Kind of the message.
    tensor : str
        Name of the tensor or metric at fault, where it is one.
    reason : str
        A sentence with the particulars.
    """

    fault: Fault
    client: int
    task: int
    round: int
    kind: str
    tensor: str
    reason: str

    def __str__(self) -> str:
        return f"client {self.client}, task {self.task + 1}, round {self.round} ({self.kind}): {self.reason}"

    def event(self) -> dict[str, Any]:
        """The failure as the payload of an event."""
        return asdict(self) | {"fault": self.fault.name.lower(), "reason": str(self)}


class Unusable(Exception):
    """What is wrong with a record, and with which of its entries."""

    def __init__(self, fault: Fault, tensor: str, reason: str) -> None:
        super().__init__(reason)
        self.fault, self.tensor = fault, tensor


class Inspector:
    """Looks at every reply as it arrives (a grid's ``inspect`` hook), and turns a bad one into a
    failure.

    Every array and number must be finite, and no cost
    (:data:`~fedknow.protocols.work.COSTS`) below 0. Moreover,

    * replies to ``train`` messages hold just the arrays that were sent, with their shapes and
      dtypes, at no absurd distance, a positive ``num-examples``, and the same metrics from
      every client;
    * replies to ``train.end_task`` have a positive ``num-examples`` and a ``knowledge-bytes``
      not below 0;
    * what either brings beside the parameters has the names, dtypes and shapes that the method
      declares;
    * replies to our own scoring (:meth:`expect_scores`) have a positive ``num-examples``,
      ``correct``, ``total`` and ``losses`` of as many tasks as are scored, ``0 <= correct <=
      total`` in whole numbers with ``total`` above 0, and where they are asked for, what
      clients keep: the same names, shapes and dtypes from every client.

    Replies to an evaluation of the strategy's own may say what they like. A
    :class:`~fedknow.protocols.messages.Mean` is of parameters that an inspector has seen before
    they were added.

    Parameters
    ----------
    on_failure : callable
        Told of each failure; may raise to end the run.
    max_update_norm : float
        Largest L2 norm of an update (what came back minus what was sent), as a multiple of the
        norm of what was sent, or of 1 where that is less; 0: no bound. Integers (counters) are
        left out.
    extras : mapping, optional
        Dtype and shape (-1: any size) by name of what replies of a kind may bring in their
        ``extra`` record, by kind; by default there must be none.

    Attributes
    ----------
    failures : int
        Failures since :meth:`begin`.
    trained : list of (int, Metrics)
        Node and metrics of each good reply to a ``train`` message since :meth:`begin`, in the
        order of arrival.
    """

    def __init__(
        self,
        on_failure: Callable[[ClientFailure], None],
        max_update_norm: float = 0.0,
        extras: Mapping[str, Layout] | None = None,
    ) -> None:
        self._on_failure = on_failure
        self._extras = extras or {}
        self._max_update_norm = max_update_norm
        self._expected_norm = 0.0
        self._task = self._round = 0
        self._expected = Arrays()
        self._metrics: set[str] | None = None
        self._scored = 0
        self._collect = False
        self._kept: Arrays | None = None
        self.failures = 0
        self.trained: list[tuple[int, Metrics]] = []

    def begin(self, task: int, round: int, arrays: Arrays) -> None:
        """A round begins in which ``arrays`` are sent."""
        self._task, self._round, self._expected = task, round, arrays
        self._expected_norm = _norm(arrays.values())
        self._scored = 0
        self.failures = 0
        self.trained = []

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is asked meanwhile is no part of the round under way."""
        before = dict(vars(self))
        try:
            yield
        finally:
            vars(self).update(before)

    @property
    def position(self) -> tuple[int, int]:
        """Task and round that are under way."""
        return self._task, self._round

    def expect_scores(self, tasks: int, collect: bool) -> None:
        """From now on ``evaluate`` is our own scoring, of so many tasks; with ``collect`` also
        what clients keep."""
        self._scored, self._collect, self._kept = tasks, collect, None

    def __call__(self, reply: Message) -> Message:
        """The reply itself, or a failure in its place."""
        try:
            self._check(reply)
        except Unusable as problem:
            failure = ClientFailure(
                problem.fault,
                client_of(reply.node),
                self._task,
                self._round,
                reply.kind,
                problem.tensor,
                str(problem),
            )
            self.failures += 1
            self._on_failure(failure)
            return replace(
                reply, content={}, failure=Failure(CLIENT_FAILED, str(failure))
            )
        return reply

    def mean(self, metric: str) -> float:
        """Mean of a metric over the good replies to ``train`` messages, weighted by
        ``num-examples``; NaN without."""
        pairs = [
            (_number(metrics[NUM_EXAMPLES]), _number(metrics[metric]))
            for _, metrics in sorted(self.trained, key=lambda entry: entry[0])
            if isinstance(metrics.get(metric), int | float)
        ]
        total = sum(weight for weight, _ in pairs)
        return (
            sum(weight * value for weight, value in pairs) / total
            if total
            else float("nan")
        )

    def total(self, metric: str) -> float:
        """Sum of a metric over the good replies to ``train`` messages; NaN where one of them lacks it."""
        values = [metrics.get(metric) for _, metrics in self.trained]
        return sum(
            float(value) if isinstance(value, int | float) else float("nan")
            for value in values
        )

    def _check(self, reply: Message) -> None:
        if reply.failure is not None:
            fault = _FAULTS.get(reply.failure.code, Fault.FAILED)
            raise Unusable(fault, "", reply.failure.reason)
        norms: dict[int, float] = {}
        for record in reply.content.values():
            if isinstance(record, Arrays) and not isinstance(record, Mean):
                norms[id(record)] = _finite_norm(record)
            elif isinstance(record, Metrics):
                for name, value in record.items():
                    _check_number(name, value)
                _check_costs(record)
        if reply.kind in (TRAIN, END_TASK) and EXTRA in reply.content:
            _check_layout(reply.content[EXTRA], self._extras.get(reply.kind, {}))
        if reply.kind == TRAIN:
            arrays = reply.arrays()
            if not isinstance(arrays, Mean):
                check_like(arrays, self._expected)
                self._check_norm(arrays, norms.get(id(arrays), 0.0))
            self.trained.append((reply.node, self._check_metrics(reply)))
        elif reply.kind == END_TASK:
            metrics = _own_metrics(reply)
            size = metrics.get(KNOWLEDGE_BYTES)
            if not isinstance(size, int | float) or size < 0:
                raise Unusable(
                    Fault.METRICS,
                    KNOWLEDGE_BYTES,
                    f"{KNOWLEDGE_BYTES} must be a number not below 0, got {size!r}",
                )
        elif reply.kind == EVALUATE and self._scored:
            self._check_scores(reply)

    def _check_norm(self, arrays: Arrays, norm: float) -> None:
        limit = self._max_update_norm * max(self._expected_norm, 1.0)
        # The sum of two norms is above that of the difference, and takes no copy.
        if not limit or norm + self._expected_norm <= limit:
            return
        with np.errstate(over="ignore"):
            update = _norm(
                array - self._expected[name]
                for name, array in arrays.items()
                if array.dtype.kind == "f"
            )
        if update > limit:
            raise Unusable(
                Fault.NORM,
                "",
                f"the update's norm is {update:.4g}, that of the model sent {self._expected_norm:.4g}; "
                f"engine.max_update_norm = {self._max_update_norm:g} allows {limit:.4g}",
            )

    def _check_metrics(self, reply: Message) -> Metrics:
        metrics = next(
            (
                record
                for record in reply.content.values()
                if isinstance(record, Metrics)
            ),
            Metrics(),
        )
        _check_examples(metrics)
        if self._metrics is None:
            self._metrics = set(metrics)
        odd = sorted(self._metrics ^ metrics.keys())
        if odd:
            raise Unusable(
                Fault.METRICS,
                odd[0],
                f"metrics {', '.join(odd)} are missing or not reported by other clients; all must report the same",
            )
        return metrics

    def _check_scores(self, reply: Message) -> None:
        metrics = _own_metrics(reply)
        lists = {name: np.asarray(metrics.get(name)) for name in SCORE_LISTS}
        for name, values in lists.items():
            if values.shape != (self._scored,) or values.dtype.kind not in (
                "if" if name == "losses" else "i"
            ):
                kind = "numbers" if name == "losses" else "whole numbers"
                raise Unusable(
                    Fault.METRICS,
                    name,
                    f"{name} must be a list of {self._scored} {kind}, one a task, got {metrics.get(name)!r}",
                )
        correct, total = lists["correct"], lists["total"]
        if not ((correct >= 0) & (correct <= total) & (total > 0)).all():
            raise Unusable(
                Fault.METRICS,
                "correct",
                f"correct must lie between 0 and total, and total above 0; got {correct.tolist()} of {total.tolist()}",
            )
        if self._collect:
            kept = reply.content.get(KEPT)
            if not isinstance(kept, Arrays):
                raise Unusable(
                    Fault.NAMES,
                    KEPT,
                    "what the client keeps was asked for and is missing",
                )
            if self._kept is None:
                self._kept = kept
            check_like(kept, self._kept)


def _own_metrics(reply: Message) -> Metrics:
    """The metrics of an answer to a message of ours."""
    metrics = reply.content.get(METRICS)
    if not isinstance(metrics, Metrics):
        raise Unusable(Fault.METRICS, METRICS, f"the record {METRICS!r} is missing")
    _check_examples(metrics)
    return metrics


def _check_examples(metrics: Metrics) -> None:
    examples = metrics.get(NUM_EXAMPLES)
    if not isinstance(examples, int | float) or examples <= 0:
        raise Unusable(
            Fault.METRICS,
            NUM_EXAMPLES,
            f"{NUM_EXAMPLES} must be a positive number, got {examples!r}",
        )


def _check_costs(metrics: Metrics) -> None:
    for name in COSTS:
        cost = metrics.get(name, 0.0)
        if not isinstance(cost, int | float) or cost < 0:
            raise Unusable(
                Fault.METRICS,
                name,
                f"{name} must be a number not below 0, got {cost!r}",
            )


def _check_number(name: str, value: object) -> None:
    try:
        if isinstance(value, int | float):
            finite = math.isfinite(value)
        else:
            finite = bool(np.isfinite(np.asarray(value, dtype=np.float64)).all())
    except (TypeError, ValueError, OverflowError):
        raise Unusable(
            Fault.METRICS,
            name,
            f"metric {name} must be a number or a list of numbers, got {value!r}",
        ) from None
    if not finite:
        raise Unusable(Fault.NOT_FINITE, name, f"metric {name} is {value}")


def check_finite(name: str, array: np.ndarray) -> None:
    """Raise :class:`Unusable` if a number of an array is NaN or infinite."""
    if array.dtype.kind in "fc" and not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise Unusable(
            Fault.NOT_FINITE,
            name,
            f"{name}: NaN or infinite in {bad} of {counted(array.size, 'value')}",
        )


def check_like(
    arrays: Arrays, expected: Mapping[str, np.ndarray], dtypes: bool = True
) -> None:
    """Raise :class:`Unusable` if arrays have other names, shapes or (unless told not to) dtypes
    than expected."""
    if arrays.keys() != expected.keys():
        odd = sorted(arrays.keys() ^ expected.keys())
        lacking = [name for name in odd if name in expected]
        raise Unusable(
            Fault.NAMES,
            odd[0],
            f"arrays {', '.join(odd[:5])} are {'missing' if lacking == odd else 'missing or unknown'}",
        )
    for name, array in arrays.items():
        if array.shape != expected[name].shape:
            raise Unusable(
                Fault.SHAPE,
                name,
                f"{name} has shape {array.shape}, not {expected[name].shape}",
            )
        if dtypes and array.dtype != expected[name].dtype:
            raise Unusable(
                Fault.DTYPE,
                name,
                f"{name} has dtype {array.dtype}, not {expected[name].dtype}",
            )


def _check_layout(record: Record, layout: Layout) -> None:
    if not isinstance(record, Arrays):
        raise Unusable(
            Fault.NAMES,
            EXTRA,
            f"the record {EXTRA!r} must hold arrays, not {type(record).__name__}",
        )
    odd = sorted(record.keys() ^ layout.keys())
    if odd:
        raise Unusable(
            Fault.NAMES,
            odd[0],
            f"extra arrays {', '.join(odd[:5])} are missing, or not the method's",
        )
    for name, array in record.items():
        dtype, shape = layout[name]
        if array.dtype.name != dtype:
            raise Unusable(
                Fault.DTYPE, name, f"{name} has dtype {array.dtype}, not {dtype}"
            )
        if len(array.shape) != len(shape) or any(
            b not in (-1, a) for a, b in zip(array.shape, shape, strict=True)
        ):
            raise Unusable(
                Fault.SHAPE,
                name,
                f"{name} has shape {array.shape}, not {shape} (-1: any size)",
            )


def _norm(arrays: Iterable[np.ndarray]) -> float:
    """L2 norm of all real numbers but integers; infinite where its square is above what a float32
    holds."""
    with np.errstate(over="ignore", invalid="ignore"):
        return math.hypot(
            *(_length(array) for array in arrays if array.dtype.kind == "f")
        )


def _finite_norm(arrays: Arrays) -> float:
    """:func:`_norm` of arrays whose numbers must all be finite, in one pass over them."""
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = {
            name: _length(array)
            for name, array in arrays.items()
            if array.dtype.kind in "fc"
        }
    for name, length in lengths.items():
        if not math.isfinite(length):  # or its square was too large for a float32
            check_finite(name, arrays[name])
    return math.hypot(
        *(length for name, length in lengths.items() if arrays[name].dtype.kind == "f")
    )


def _length(array: np.ndarray) -> float:
    flat = array.ravel(order="K")
    if flat.dtype == np.float16:
        flat = flat.astype(np.float32)
    return math.sqrt(abs(np.vdot(flat, flat)))


def _number(value: int | float | list[int] | list[float]) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
