"""Clients' parameters, averaged as they arrive (``engine.running_mean``).

A server that hands its strategy every client's answer holds them all at once. A simulation also
copies each of them from a worker's process to the server's. Most strategies then take a weighted
mean and look at nothing else. This mean can just as well be taken on the way: by each worker over
its own clients, and by the server over the answers that arrive.

The strategy is given one answer, with the mean of the parameters and metrics and the sum of the
samples. It is the same up to rounding, as it is summed in another order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch

from fedknow.client.tensors import as_tensors
from fedknow.protocols.messages import (
    ARRAYS,
    METRICS,
    TRAIN,
    Arrays,
    Mean,
    Message,
    Metrics,
    Record,
    nbytes,
)
from fedknow.protocols.texts import counted
from fedknow.protocols.work import NUM_EXAMPLES
from fedknow.server.checks.faults import RunError
from fedknow.server.checks.replies import Inspector

__all__ = ["RunningMean", "averaged"]


class RunningMean:
    """A mean of parameters, weighted by ``num-examples``.

    Answers are added one by one. It takes the memory of one model.

    Attributes
    ----------
    weight : float
        Sum of the weights so far.
    clients : int
        Number of answers so far.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self.clients = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._added: Mean | None = None
        self._expected = 0

    def add(self, arrays: Arrays, weight: float) -> None:
        """Add parameters, all of the same names and shapes."""
        self.weight += weight
        for name, value in as_tensors(arrays, is_only_read=True).items():
            # Sums need more digits than half precision has, and integers have no fractions.
            if value.element_size() < 4 and value.is_floating_point():
                value = value.float()
            elif not (value.is_floating_point() or value.is_complex()):
                value = value.double()
            if name in self._sums:
                self._sums[name].add_(value, alpha=weight)
            else:
                self._sums[name] = value * weight

    def take(self, reply: Message) -> Message:
        """Add the parameters of an answer.

        Returns
        -------
        Message
            The answer without its parameters. A failure stays as it is.
        """
        if reply.failure is not None:
            return reply
        arrays = reply.arrays()
        self.clients += 1
        if not isinstance(arrays, Mean):
            self.add(arrays, _weight(reply))
        else:
            # The answers of one mean come one after the other; only one of them adds it.
            if arrays is not self._added:
                self.add(arrays, arrays.weight)
                self._added = arrays
                self._expected += arrays.clients
            self._expected -= 1
        content: dict[str, Record] = {
            name: record
            for name, record in reply.content.items()
            if not isinstance(record, Arrays)
        }
        return replace(reply, content=content)

    def mean(self, into: Mean | None = None) -> Mean:
        """Return the mean of all answers so far, as read-only arrays.

        Parameters
        ----------
        into : Mean, optional
            A mean to fill; by default a new one.

        Raises
        ------
        RunError
            If a worker's mean holds an answer that cannot be used.
        """
        # A worker's mean holds all of its clients: one of them cannot be taken out of it again.
        if self._expected:
            raise RunError(
                f"{counted(self._expected, 'answer')} of a worker's mean cannot be used; "
                "see metrics.jsonl, and set "
                "engine.running_mean=false to have such clients left out"
            )
        mean = Mean() if into is None else into
        mean.weight = self.weight
        mean.clients = self.clients
        for name, total in self._sums.items():
            # Divided once at the end: a mean that is updated at each answer would round each
            # time.
            array = (total / self.weight).numpy()
            array.flags.writeable = False
            mean[name] = array
        return mean

    def reply(self, replies: Sequence[Message]) -> Message:
        """Return one answer for all: means, and the sum of the samples.

        Parameters
        ----------
        replies : sequence of Message
            The answers that :meth:`take` returned. The new one is in the name of the earliest.
        """
        content: dict[str, Record] = {
            ARRAYS: self.mean(),
            METRICS: _mean_metrics(replies),
        }
        return replace(replies[0], content=content)


def averaged(
    work: Iterable[Message],
    answers: Iterable[tuple[Message, int]],
    inspector: Inspector,
) -> Iterator[tuple[Message, int]]:
    """Put one :class:`Mean` in the place of clients' parameters.

    It is complete when all answers were given.

    Parameters
    ----------
    work : iterable of Message
        The clients' work.
    answers : iterable of (Message, int)
        An answer to each, in order, with the version of the client's state. An answer that is
        not to training, or does not pass the inspector, is given as it is. So the server sees
        its fault.
    inspector : Inspector
        Looks at each answer before it is added.
    """
    running = RunningMean()
    mean = Mean()
    sent: Arrays | None = None
    for request, (reply, version) in zip(work, answers, strict=True):
        # The inspector compares shapes with the parameters that were sent.
        if request.kind == TRAIN and request.arrays() is not sent:
            sent = request.arrays()
            inspector.begin(0, 0, sent)
        # Checked here, in the worker: the server never sees the arrays of a single client.
        if request.kind == TRAIN and inspector(reply).failure is None:
            running.take(reply)
            # The same for all, as shapes and dtypes are.
            mean.bytes = nbytes({ARRAYS: reply.arrays()})
            content: dict[str, Record] = {
                name: mean if isinstance(record, Arrays) else record
                for name, record in reply.content.items()
            }
            reply = replace(reply, content=content)
        yield reply, version
    if running.clients:
        # In place: the answers that were yielded before hold this object.
        running.mean(mean)


def _metrics(reply: Message) -> Metrics:
    return next(
        record for record in reply.content.values() if isinstance(record, Metrics)
    )


def _weight(reply: Message) -> float:
    # The inspector has refused answers without a number of samples.
    return float(cast("int | float", _metrics(reply)[NUM_EXAMPLES]))


def _mean_metrics(replies: Sequence[Message]) -> Metrics:
    """Return clients' mean numbers, weighted by samples, and all samples."""
    metrics = [_metrics(reply) for reply in replies]
    weights = np.array([_weight(reply) for reply in replies])
    means = Metrics()
    # The inspector has seen to it that all report the same metrics.
    for name in metrics[0]:
        values = [np.asarray(numbers[name], np.float64) for numbers in metrics]
        if len({value.shape for value in values}) > 1:
            lengths = sorted({str(value.size) for value in values})
            raise RunError(
                f"engine.running_mean = true: there is no mean of the clients' metric {name!r}. "
                f"Its lengths differ: {', '.join(lengths)}; report as many values from each client"
            )
        means[name] = (weights @ np.stack(values) / weights.sum()).tolist()
    examples = [numbers[NUM_EXAMPLES] for numbers in metrics]
    means[NUM_EXAMPLES] = sum(cast("list[int]", examples))
    return means
