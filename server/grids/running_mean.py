"""Clients' parameters, averaged as they arrive (``engine.running_mean``).

A server that hands its strategy every client's answer holds them all at once. A simulation also
copies each of them from a worker's process to the server's. Most strategies then take a weighted
mean and look at nothing else. This mean can just as well be taken on the way: by each worker over
its own clients, and by the server over the answers that arrive.

The strategy is given one answer, with the mean of the parameters and metrics and the sum of the
samples. Sums are exact (:mod:`fedknow.server.grids.exact_sum`) and divided once. So the mean is the
same to the bit for any order of arrival and any number of workers. It is the mean of the plain way
up to the rounding of that way, which rounds at each client.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import cast

import numpy as np

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
from fedknow.server.grids.exact_sum import ExactSum

__all__ = ["RunningMean", "averaged", "mean_metrics"]


FEWEST_AVERAGED = 6
"""Answers that a worker sends as they are: exact sums take as much as six models in float32."""


class _Sums(Mean):
    """A mean on its way from a worker, not divided yet so as not to round.

    Attributes
    ----------
    running : RunningMean or None
        The sums; none until all clients of the batch have answered.
    """

    running: RunningMean | None = None


class RunningMean:
    """A mean of parameters, weighted by ``num-examples``.

    Answers are added one by one, in any order. It takes 24 bytes a parameter.

    Attributes
    ----------
    clients : int
        Number of answers so far.
    """

    def __init__(self) -> None:
        self.clients = 0
        # Exact, as a sum of floats would depend on the order.
        self._weight = Fraction(0)
        self._sums: dict[str, ExactSum] = {}
        self._dtypes: dict[str, np.dtype] = {}
        self._added: Mean | None = None
        self._expected = 0

    @property
    def weight(self) -> float:
        """Sum of the weights so far."""
        return float(self._weight)

    def add(self, arrays: Arrays, weight: float) -> None:
        """Add parameters, all of the same names and shapes.

        Raises
        ------
        RunError
            If a number is so large that its sum could overflow.
        """
        self._weight += Fraction(weight)
        for name, value in arrays.items():
            if name not in self._sums:
                self._dtypes[name] = _mean_dtype(value.dtype)
                self._sums[name] = ExactSum(_real(value).shape)
            try:
                self._sums[name].add(_real(value), weight)
            except OverflowError as error:
                raise RunError(
                    f"engine.running_mean = true: no exact mean of {name!r}: {error}; set "
                    "engine.running_mean=false"
                ) from error

    def _merge(self, addend: RunningMean) -> None:
        """Add the sums of another mean; its answers are counted one by one."""
        self._weight += addend._weight
        for name, total in addend._sums.items():
            if name not in self._sums:
                self._dtypes[name] = addend._dtypes[name]
                self._sums[name] = ExactSum(total.shape)
            self._sums[name].merge(total)

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
        if not isinstance(arrays, _Sums):
            self.add(arrays, _weight(reply))
        else:
            # The answers of one mean come one after the other; only one of them adds it.
            if arrays is not self._added and arrays.running is not None:
                self._merge(arrays.running)
                self._added = arrays
                self._expected += arrays.clients
            self._expected -= 1
        content: dict[str, Record] = {
            name: record
            for name, record in reply.content.items()
            if not isinstance(record, Arrays)
        }
        return replace(reply, content=content)

    def mean(self) -> Mean:
        """Return the mean of all answers so far, as read-only arrays.

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
        mean = Mean()
        mean.weight = self.weight
        mean.clients = self.clients
        for name, total in self._sums.items():
            # Divided once at the end: a mean that is updated at each answer would round each
            # time.
            # NumPy makes a number of an array without a shape.
            ratio = np.asarray(total.value() / self.weight)
            array = _as_dtype(ratio, self._dtypes[name])
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
            METRICS: mean_metrics(replies),
        }
        return replace(replies[0], content=content)


def averaged(
    work: Sequence[Message],
    answers: Iterable[tuple[Message, int]],
    inspector: Inspector,
) -> Iterator[tuple[Message, int]]:
    """Put one :class:`Mean` in the place of clients' parameters.

    It is complete when all answers were given. A few answers are given as they are: their sums
    would take more room, and the mean is the same.

    Parameters
    ----------
    work : sequence of Message
        The clients' work.
    answers : iterable of (Message, int)
        An answer to each, in order, with the version of the client's state. An answer that is
        not to training, or does not pass the inspector, is given as it is. So the server sees
        its fault.
    inspector : Inspector
        Looks at each answer before it is added.
    """
    if len(work) <= FEWEST_AVERAGED:
        yield from answers
        return
    running = RunningMean()
    sums = _Sums()
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
            sums.bytes = nbytes({ARRAYS: reply.arrays()})
            content: dict[str, Record] = {
                name: sums if isinstance(record, Arrays) else record
                for name, record in reply.content.items()
            }
            reply = replace(reply, content=content)
        yield reply, version
    if running.clients:
        # In place: the answers that were yielded before hold this object.
        sums.running = running
        sums.weight, sums.clients = running.weight, running.clients


def _real(array: np.ndarray) -> np.ndarray:
    """View complex numbers as pairs of real ones; others stay as they are."""
    if array.dtype.kind != "c":
        return array
    return np.stack((array.real, array.imag))


def _mean_dtype(dtype: np.dtype) -> np.dtype:
    """Return the type of a mean."""
    # Sums of half precision need more digits, and means of counters fractions.
    if dtype.kind == "f":
        return np.dtype(np.float32) if dtype.itemsize < 4 else dtype
    return dtype if dtype.kind == "c" else np.dtype(np.float64)


def _as_dtype(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "c":
        array = np.asarray(array[0] + 1j * array[1])
    return array.astype(dtype)


def _metrics(reply: Message) -> Metrics:
    return next(
        record for record in reply.content.values() if isinstance(record, Metrics)
    )


def _weight(reply: Message) -> float:
    # The inspector has refused answers without a number of samples.
    return float(cast("int | float", _metrics(reply)[NUM_EXAMPLES]))


def mean_metrics(replies: Sequence[Message]) -> Metrics:
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
