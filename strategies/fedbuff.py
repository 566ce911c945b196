"""FedBuff: the server makes a step from every K answers.

Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek and Huba, "Federated Learning with Buffered
Asynchronous Aggregation", AISTATS 2022, algorithm 1. With the present model ``x``, a client's
model ``y`` that began with ``x'`` and is ``d`` steps late, a step is

    x <- x + server_lr * mean of s(d) (y - x')
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from fedknow.protocols.flower import to_arrays, to_record
from fedknow.strategies.asynchronous import (
    Asynchronous,
    ClientUpdate,
    Dispatcher,
    check_whole_number,
    combine,
    staleness_metrics,
)

__all__ = ["Buffered", "FedBuff"]


class Buffered(Asynchronous):
    """Frame for strategies whose server makes one step of several answers.

    A step is a round. A client's change since the model it began with, ``y - x'``, is added to
    the present model ``x``, times the server's learning rate and the discount of its staleness.
    The step is the mean of these, weighted by samples. So where nobody is late it is Flower's
    FedAvg, to the last bit.

    Parameters
    ----------
    server_lr : float
        The server's learning rate.
    concurrency, staleness, staleness_a, staleness_b
        See :class:`~fedknow.strategies.asynchronous.Asynchronous`.
    """

    def __init__(
        self,
        server_lr: float = 1.0,
        concurrency: int = 0,
        staleness: str = "polynomial",
        staleness_a: float = 0.5,
        staleness_b: float = 4.0,
    ) -> None:
        super().__init__(concurrency, staleness, staleness_a, staleness_b)
        if server_lr <= 0:
            raise ValueError(f"server_lr = {server_lr!r}: must be above 0")
        self.server_lr = server_lr

    @abstractmethod
    def gather(
        self, dispatcher: Dispatcher, rounds_remaining: int
    ) -> list[ClientUpdate]:
        """Gather the answers for the next step.

        ``rounds_remaining`` counts the rounds to go, this one included.
        """

    def round(
        self, dispatcher: Dispatcher, rounds_remaining: int
    ) -> MetricRecord | None:
        """Gather answers and make a step."""
        updates = self.gather(dispatcher, rounds_remaining)
        if not updates:
            return None
        # In the order of clients: a sum of floats depends on the order of arrival otherwise.
        updates.sort(key=lambda update: update.reply.metadata.src_node_id)
        staleness = [update.staleness for update in updates]
        # Bounded again: the weights of later answers were not known when the first came.
        dispatcher.grid.bound_weights([update.reply for update in updates])
        replies = [self._rebase(update, dispatcher) for update in updates]
        metrics: MetricRecord | None = MetricRecord()
        arrays = dispatcher.arrays
        # Where nothing travels there is nothing to average.
        if arrays:
            averaged, metrics = self.aggregate_train(
                dispatcher.version + 1, replies
            )
            assert averaged is not None  # there are replies, all of them good
            arrays = _cast_like(averaged, arrays)
        dispatcher.step(arrays)
        return MetricRecord({**(metrics or {}), **staleness_metrics(staleness)})

    def _rebase(self, update: ClientUpdate, dispatcher: Dispatcher) -> Message:
        """Put a client's discounted change on top of the present model."""
        factor = np.float32(self.server_lr * self.discount(update.staleness))
        reply = update.reply
        if factor == 1 and update.base is dispatcher.arrays:
            # The client's model is that already; computing it would change its last bits.
            return reply
        name, model = next(iter(reply.content.array_records.items()))

        def add_change(
            x: np.ndarray, base: np.ndarray, y: np.ndarray
        ) -> np.ndarray:
            result: np.ndarray = x + factor * (y - base)
            return result

        moved = combine(add_change, dispatcher.arrays, update.base, model)
        reply.content = RecordDict({**reply.content, name: moved})
        return reply


class FedBuff(Buffered):
    """The server makes a step from every ``buffer`` answers (algorithm 1).

    A step is a round, so a task is ``train.rounds`` steps. The server asks for as many answers
    as a task's steps take, and no more. With as many clients in the buffer as there are, it is
    synchronous.

    Parameters
    ----------
    buffer : int
        Answers a step, K; at most as many as there are clients.
    server_lr, concurrency, staleness, staleness_a, staleness_b
        See :class:`Buffered`; the paper's discount is ``1 / sqrt(1 + d)``, the default.
    """

    def __init__(  # noqa: PLR0913  # the strategy's settings
        self,
        buffer: int = 10,
        server_lr: float = 1.0,
        concurrency: int = 0,
        staleness: str = "polynomial",
        staleness_a: float = 0.5,
        staleness_b: float = 4.0,
    ) -> None:
        super().__init__(
            server_lr, concurrency, staleness, staleness_a, staleness_b
        )
        check_whole_number("buffer", buffer, minimum=1)
        self.buffer = buffer

    def gather(
        self, dispatcher: Dispatcher, rounds_remaining: int
    ) -> list[ClientUpdate]:
        """Take as many answers as the buffer holds, or all that come."""
        dispatcher.remaining = rounds_remaining * self.buffer
        updates: list[ClientUpdate] = []
        while len(updates) < self.buffer and (update := dispatcher.next_update()):
            updates.append(update)
        return updates


def _cast_like(averaged: ArrayRecord, model: ArrayRecord) -> ArrayRecord:
    """Give averaged arrays the model's data types.

    Flower's mean turns whole numbers into floats, which clients would refuse.
    """
    present = to_arrays(model)
    cast = {
        name: _cast(array, present[name].dtype)
        for name, array in to_arrays(averaged).items()
    }
    return to_record(cast)


def _cast(array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    if array.dtype == dtype:
        return array
    if dtype.kind in "iu":
        array = np.rint(array)
    return array.astype(dtype)
