"""Clients' parameters, averaged as they arrive (``engine.running_mean``), for strategies that ask
for no more.

A server that hands its strategy every client's answer holds them all at once, and a simulation
copies each of them from a worker's process to the server's. Most strategies then take a
weighted mean and look at nothing else, which can just as well be taken on the way: by each
worker of its own clients' parameters, by the server of what arrives. The strategy is given one
answer, with the mean of the parameters and metrics and the sum of the samples. That is the same
number up to rounding, as it is summed in another order.
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
    nbytes,
)
from fedknow.protocols.texts import counted
from fedknow.protocols.work import NUM_EXAMPLES
from fedknow.server.checks.faults import RunError
from fedknow.server.checks.replies import Inspector

__all__ = ["RunningMean", "averaged"]


class RunningMean:
    """A mean of parameters, weighted by ``num-examples``, to which answers are added one by one;
    memory for one model.

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
        self._last: Mean | None = None
        self._expected = 0

    def add(self, arrays: Arrays, weight: float) -> None:
        """Add parameters, all of the same names and shapes."""
        self.weight += weight
        for name, value in as_tensors(arrays, is_only_read=True).items():
            if value.element_size() < 4 and value.is_floating_point():
                value = value.float()
            elif not (value.is_floating_point() or value.is_complex()):
                value = value.double()
            if name in self._sums:
                self._sums[name].add_(value, alpha=weight)
            else:
                self._sums[name] = value * weight

    def take(self, reply: Message) -> Message:
        """Add the parameters of an answer; the answer without them. Failures stay as they are."""
        if reply.failure is not None:
            return reply
        arrays = reply.arrays()
        self.clients += 1
        if not isinstance(arrays, Mean):
            self.add(arrays, _weight(reply))
        else:
            if (
                arrays is not self._last
            ):  # the answers of one mean come one after the other
                self.add(arrays, arrays.weight)
                self._last = arrays
                self._expected += arrays.clients
            self._expected -= 1
        return replace(
            reply,
            content={
                n: r for n, r in reply.content.items() if not isinstance(r, Arrays)
            },
        )

    def mean(self, into: Mean | None = None) -> Mean:
        """What has been added so far, as a mean; read-only arrays.

        Raises
        ------
        RunError
            If a mean was taken of which not all answers could be used.
        """
        if self._expected:
            raise RunError(
                f"{counted(self._expected, 'answer')} of a worker's mean cannot be used; "
                "see metrics.jsonl, and set "
                "engine.running_mean=false to have such clients left out"
            )
        found = Mean() if into is None else into
        found.weight, found.clients = self.weight, self.clients
        for name, total in self._sums.items():
            array = (total / self.weight).numpy()
            array.flags.writeable = False
            found[name] = array
        return found

    def reply(self, replies: Sequence[Message]) -> Message:
        """One answer in the name of the first of these, which :meth:`take` gave: means, and the
        sum of the samples."""
        return replace(
            replies[0], content={ARRAYS: self.mean(), METRICS: _mean_metrics(replies)}
        )


def averaged(
    work: Iterable[Message],
    answers: Iterable[tuple[Message, int]],
    inspector: Inspector,
) -> Iterator[tuple[Message, int]]:
    """Put one :class:`Mean` in the place of clients' parameters; it is complete when the last
    answer has been given.

    Parameters
    ----------
    work : iterable of Message
        What was asked for.
    answers : iterable of (Message, int)
        An answer to each, in order, with the version of the client's state. What is not
        training, or does not pass the inspector, is given as it is, for the server to see what
        is wrong with it.
    inspector : Inspector
        Looks at each answer before it is added.
    """
    running, mean = RunningMean(), Mean()
    sent: Arrays | None = None
    for asked, (reply, version) in zip(work, answers, strict=True):
        if asked.kind == TRAIN and asked.arrays() is not sent:
            sent = asked.arrays()
            inspector.begin(0, 0, sent)
        if asked.kind == TRAIN and inspector(reply).failure is None:
            running.take(reply)
            mean.bytes = nbytes(
                {ARRAYS: reply.arrays()}
            )  # the same for all, as shapes and dtypes are
            content = {
                name: mean if isinstance(record, Arrays) else record
                for name, record in reply.content.items()
            }
            reply = replace(reply, content=content)
        yield reply, version
    if running.clients:
        running.mean(mean)


def _weight(reply: Message) -> float:
    metrics = next(
        record for record in reply.content.values() if isinstance(record, Metrics)
    )
    return float(cast("int | float", metrics[NUM_EXAMPLES]))  # the inspector saw to it


def _mean_metrics(replies: Sequence[Message]) -> Metrics:
    """Means of clients' numbers, weighted by their samples, and the sum of these."""
    metrics = [
        next(r for r in reply.content.values() if isinstance(r, Metrics))
        for reply in replies
    ]
    weights = np.array([_weight(reply) for reply in replies])
    found = Metrics()
    for name in metrics[0]:
        values = [np.asarray(numbers[name], np.float64) for numbers in metrics]
        if len({value.shape for value in values}) > 1:
            lengths = sorted({str(value.size) for value in values})
            raise RunError(
                f"engine.running_mean = true: there is no mean of the clients' metric {name!r}. "
                f"Its lengths differ: {', '.join(lengths)}; report as many values from each client"
            )
        found[name] = (weights @ np.stack(values) / weights.sum()).tolist()
    examples = [numbers[NUM_EXAMPLES] for numbers in metrics]
    found[NUM_EXAMPLES] = sum(cast("list[int]", examples))
    return found
