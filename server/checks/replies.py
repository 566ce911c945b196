"""Checks of clients' answers, so that a fault is named where it happens.

Flower's strategies trust what they are given: one reply with other names ends the run with a
puzzle, one NaN poisons the model for good. So replies are checked before a strategy sees them,
and its answer before the experiment uses it (:mod:`fedknow.server.checks.aggregates`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from fedknow.client.learners.frames.learner import Layout
from fedknow.protocols.messages import (
    CLIENT_FAILED,
    END_TASK,
    EVALUATE,
    KEPT,
    METRICS,
    TRAIN,
    Arrays,
    Failure,
    Mean,
    Message,
    Metrics,
    Record,
    client_of,
)
from fedknow.protocols.secure.rounds import MASKED
from fedknow.protocols.texts import printable
from fedknow.protocols.work import (
    KNOWLEDGE_BYTES,
    NUM_EXAMPLES,
)
from fedknow.server.checks.arrays import (
    check_like,
    finite_norm,
    longest_noise,
    norm,
)
from fedknow.server.checks.claims import Claims
from fedknow.server.checks.faults import ClientFailure, Fault, Unusable, fault_of
from fedknow.server.checks.numbers import check_costs, check_number
from fedknow.server.checks.scores import check_hits, read_score_lists
from fedknow.server.checks.sharing import Sharing

__all__ = ["KNOWLEDGE_BYTES", "NUM_EXAMPLES", "Inspector"]


class Inspector:
    """Looks at every reply as it arrives, and turns a bad one into a failure.

    It is the ``inspect`` hook of a wave's options.

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
      total`` in whole numbers with ``total`` above 0 (0 for tasks after the client's last),
      and where they are asked for, what clients keep: the same names, shapes and dtypes from
      every client.

    Replies to a strategy's own evaluation may say what they like. The parts of a
    :class:`~fedknow.protocols.messages.Mean` were inspected before they were added.

    Parameters
    ----------
    on_failure : callable
        Told of each failure; may raise to end the run.
    max_update_norm : float
        Largest L2 norm of an update, without integers, as a multiple of the norm of what was
        sent, or of 1 where that is less; 0: no bound.
    extras : mapping, optional
        Layouts of the ``extra`` records that replies of a kind may bring; by default none.
    claims : Claims, optional
        What is known of the sizes of clients' data; by default nothing.
    noise : float
        Standard deviation of the noise that clients add; its length comes on top.

    Attributes
    ----------
    sharing : Sharing
        What is declared of ``extra`` records.
    failures : int
        Failures since :meth:`begin`.
    trained : list of (int, Metrics)
        Node and metrics of each good ``train`` reply since :meth:`begin`, as they arrived.
    """

    def __init__(
        self,
        on_failure: Callable[[ClientFailure], None],
        max_update_norm: float = 0.0,
        extras: Mapping[str, Layout] | None = None,
        claims: Claims | None = None,
        noise: float = 0.0,
    ) -> None:
        self._on_failure = on_failure
        self.sharing = Sharing(extras or {})
        self._claims = claims or Claims()
        self._max_update_norm = max_update_norm
        self._noise = noise
        self._task = self._round = 0
        self._expected = Arrays()
        self._metrics: set[str] | None = None
        self._expected_norm, self._scored = 0.0, 0
        self._should_collect = False
        self._kept: Arrays | None = None
        self.failures = 0
        self.trained: list[tuple[int, Metrics]] = []

    def begin(self, task: int, round: int, arrays: Arrays) -> None:
        """Begin a round in which ``arrays`` are sent."""
        self._task = task
        self._round = round
        self._expected = arrays
        self._expected_norm = norm(arrays.values())
        self._scored = self.failures = 0
        self.trained = []

    @contextmanager
    def outside_the_round(self) -> Iterator[None]:
        """Keep what is asked meanwhile out of the round under way."""
        # All attributes: a list of names would miss the one that is added next.
        round_under_way = dict(vars(self))
        try:
            yield
        finally:
            vars(self).update(round_under_way)

    @property
    def position(self) -> tuple[int, int]:
        """Task and round that are under way."""
        return self._task, self._round

    def expect_scores(self, tasks: int, should_collect: bool) -> None:
        """Check ``evaluate`` answers from now on as our own scoring.

        Parameters
        ----------
        tasks : int
            How many tasks are scored.
        should_collect : bool
            Whether clients send the parameters that they keep, too.
        """
        self._scored = tasks
        self._should_collect = should_collect
        self._kept = None

    def expect_masked(self, arrays: Arrays) -> None:
        """Expect masked answers like these arrays, until the round is over."""
        self._expected = arrays

    def __call__(self, reply: Message) -> Message:
        """Return the reply itself, or a failure in its place."""
        try:
            self._check(reply)
        except Unusable as problem:
            failure = ClientFailure(
                problem.fault,
                client_of(reply.node),
                self._task,
                self._round,
                reply.kind,
                # The client chose these words.
                printable(problem.tensor, 200),
                printable(str(problem)),
            )
            self.failures += 1
            self._on_failure(failure)
            return replace(
                reply, content={}, failure=Failure(CLIENT_FAILED, str(failure))
            )
        return reply

    def mean(self, metric: str) -> float:
        """Return the mean of a metric over the good replies to ``train`` messages.

        It is weighted by ``num-examples``; NaN without replies.
        """
        # In the order of nodes: the order of arrival differs from run to run, and a sum of
        # floats depends on the order.
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
        """Return the sum of a metric over the good replies to ``train`` messages.

        It is NaN where one of them lacks the metric.
        """
        return sum(_number(metrics.get(metric)) for _, metrics in self.trained)

    def _check(self, reply: Message) -> None:
        if reply.failure is not None:
            fault = fault_of(reply.failure.code)
            raise Unusable(fault, "", reply.failure.reason)
        norms = _check_numbers(reply)
        self.sharing.inspect(reply)
        if reply.kind == TRAIN:
            self._check_training(reply, norms)
        elif reply.kind == END_TASK:
            metrics = _check_end_of_task(reply, self._expected)
            self._check_claim(reply, metrics)
        elif reply.kind == EVALUATE and self._scored:
            self._check_scores(reply)
        elif reply.kind == EVALUATE:
            _check_evaluation(reply, self._claims)

    def _check_claim(self, reply: Message, metrics: Metrics) -> None:
        examples = _number(metrics[NUM_EXAMPLES])
        self._claims.check_training(client_of(reply.node), examples)

    def _check_training(self, reply: Message, norms: Mapping[int, float]) -> None:
        arrays = reply.arrays()
        # The arrays of a mean were checked by the worker that averaged them.
        if not isinstance(arrays, Mean):
            check_like(arrays, self._expected)
            self._check_norm(arrays, norms.get(id(arrays), 0.0))
        metrics = self._check_metrics(reply)
        # A mean stands for several clients, whose answers a worker inspected.
        if not isinstance(arrays, Mean):
            self._check_claim(reply, metrics)
        self.trained.append((reply.node, metrics))

    def _check_norm(self, arrays: Arrays, length: float) -> None:
        # At least 1, or a model of zeros would allow no update at all.
        limit = self._max_update_norm * max(self._expected_norm, 1.0)
        if limit and self._noise:
            limit += longest_noise(self._noise, arrays)
        # The sum of two norms is above that of the difference, and takes no copy.
        if not limit or length + self._expected_norm <= limit:
            return
        update = _distance(arrays, self._expected)
        if update > limit:
            raise Unusable(
                Fault.NORM,
                "",
                f"the update's norm is {update:.4g}, that of the model sent "
                f"{self._expected_norm:.4g}; "
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
        mismatched = sorted(self._metrics ^ metrics.keys())
        if mismatched:
            raise Unusable(
                Fault.METRICS,
                mismatched[0],
                f"metrics {', '.join(mismatched)} are missing or not reported by other "
                f"clients; all must report the same",
            )
        return metrics

    def _check_scores(self, reply: Message) -> None:
        lists = read_score_lists(_own_metrics(reply), self._scored)
        check_hits(lists["correct"], lists["total"])
        self._claims.check_totals(client_of(reply.node), lists["total"].tolist())
        if self._should_collect:
            self._check_kept(reply.content.get(KEPT))

    def _check_kept(self, record: Record | None) -> None:
        if not isinstance(record, Arrays):
            raise Unusable(
                Fault.NAMES,
                KEPT,
                "what the client keeps was asked for and is missing",
            )
        # All clients keep the same; the first answer says what.
        if self._kept is None:
            self._kept = record
        check_like(record, self._kept)


def _check_numbers(reply: Message) -> dict[int, float]:
    """Check that all numbers are finite.

    Returns
    -------
    dict of int to float
        Norms of the records of arrays, by the records' identities.
    """
    norms: dict[int, float] = {}
    for record in reply.content.values():
        if isinstance(record, Arrays) and not isinstance(record, Mean):
            # By identity, as one answer may hold several records.
            norms[id(record)] = finite_norm(record)
        elif isinstance(record, Metrics):
            for name, value in record.items():
                check_number(name, value)
            check_costs(record)
    return norms


def _distance(arrays: Arrays, expected: Arrays) -> float:
    # An overflow is infinity, and above any limit.
    with np.errstate(over="ignore"):
        return norm(
            array - expected[name]
            for name, array in arrays.items()
            if array.dtype.kind == "f"
        )


def _check_end_of_task(reply: Message, expected: Arrays) -> Metrics:
    # Only under masks does such an answer have an array that all must send.
    if expected.keys() == {MASKED}:
        check_like(reply.arrays(), expected)
    metrics = _own_metrics(reply)
    size = metrics.get(KNOWLEDGE_BYTES)
    if not isinstance(size, int | float) or size < 0:
        raise Unusable(
            Fault.METRICS,
            KNOWLEDGE_BYTES,
            f"{KNOWLEDGE_BYTES} must be a number not below 0, got {size!r:.200}",
        )
    return metrics


def _check_evaluation(reply: Message, claims: Claims) -> None:
    """Check the weight of an answer to a strategy's own evaluation."""
    for record in reply.content.values():
        if isinstance(record, Metrics):
            examples = record.get(NUM_EXAMPLES)
            # A strategy may ask for metrics without a weight.
            if isinstance(examples, int | float):
                claims.check_evaluation(client_of(reply.node), examples)


def _own_metrics(reply: Message) -> Metrics:
    """Return the metrics of an answer to a message of ours."""
    metrics = reply.content.get(METRICS)
    if not isinstance(metrics, Metrics):
        raise Unusable(
            Fault.METRICS, METRICS, f"the record {METRICS!r} is missing"
        )
    _check_examples(metrics)
    return metrics


def _check_examples(metrics: Metrics) -> None:
    examples = metrics.get(NUM_EXAMPLES)
    if not isinstance(examples, int | float) or examples <= 0:
        raise Unusable(
            Fault.METRICS,
            NUM_EXAMPLES,
            f"{NUM_EXAMPLES} must be a positive number, got {examples!r:.200}",
        )


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
