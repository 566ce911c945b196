"""FedBuff: the server makes a step when so many answers are there, whoever still works (Nguyen et
al. 2022)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict

from fedknow.protocols.flower import to_arrays, to_record
from fedknow.strategies.asynchronous import Asynchronous, Crew, Update, combine, whole

__all__ = ["Buffered", "FedBuff"]


class Buffered(Asynchronous):
    """Frame for strategies whose server gathers answers and makes one step of them, which is a round.

    A client's change since the model it began with, ``y - x'``, is added to the present model
    ``x``, times the server's learning rate and the discount of its staleness; the step is the
    mean of these, weighted by samples. So where nobody is late it is Flower's FedAvg, to the
    last bit.

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
    def gather(self, crew: Crew, left: int) -> list[Update]:
        """Answers for the next step; ``left`` rounds, this one included."""

    def round(self, crew: Crew, left: int) -> MetricRecord | None:
        """Gather answers and make a step."""
        updates = sorted(
            self.gather(crew, left),
            key=lambda update: update.reply.metadata.src_node_id,
        )
        if not updates:
            return None
        late = [update.staleness for update in updates]
        replies = [self._moved(update, crew) for update in updates]
        metrics: MetricRecord | None = MetricRecord()
        arrays = crew.arrays
        if arrays:  # where nothing travels there is nothing to average
            averaged, metrics = self.aggregate_train(crew.version + 1, replies)
            assert averaged is not None  # there are replies, all of them good
            now = to_arrays(arrays)
            arrays = to_record(
                {
                    name: _cast(value, now[name].dtype)
                    for name, value in to_arrays(averaged).items()
                }
            )
        crew.step(arrays)
        numbers = {"staleness": float(np.mean(late)), "staleness-max": max(late)}
        return MetricRecord({**(metrics or {}), **numbers})

    def _moved(self, update: Update, crew: Crew) -> Message:
        """The reply with the client's change on top of the present model, as far as it counts."""
        factor = np.float32(self.server_lr * self.discount(update.staleness))
        reply = update.reply
        if factor == 1 and update.base is crew.arrays:
            return reply  # the client's model is just that
        name, model = next(iter(reply.content.array_records.items()))
        moved = combine(
            lambda x, base, y: x + factor * (y - base), crew.arrays, update.base, model
        )
        reply.content = RecordDict({**reply.content, name: moved})
        return reply


class FedBuff(Buffered):
    """A step from every ``buffer`` answers (algorithm 1), which is a round: a task is
    ``train.rounds`` such steps.

    As many answers are asked for as a task's steps take, and no more. With as many clients in
    the buffer as there are, it is synchronous.

    Parameters
    ----------
    buffer : int
        Answers a step, K; at most as many as there are clients.
    server_lr, concurrency, staleness, staleness_a, staleness_b
        See :class:`Buffered`; the paper's discount is ``1 / sqrt(1 + d)``, the default.
    """

    def __init__(
        self,
        buffer: int = 10,
        server_lr: float = 1.0,
        concurrency: int = 0,
        staleness: str = "polynomial",
        staleness_a: float = 0.5,
        staleness_b: float = 4.0,
    ) -> None:
        super().__init__(server_lr, concurrency, staleness, staleness_a, staleness_b)
        whole("buffer", buffer, 1)
        self.buffer = buffer

    def gather(self, crew: Crew, left: int) -> list[Update]:
        """As many as the buffer takes; fewer if nobody is left to ask."""
        crew.wanted = left * self.buffer
        updates: list[Update] = []
        while len(updates) < self.buffer and (update := crew.next()):
            updates.append(update)
        return updates


def _cast(value: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Flower's mean makes floats of whole numbers, which clients would not take."""
    return (
        value
        if value.dtype == dtype
        else (np.rint(value) if dtype.kind in "iu" else value).astype(dtype)
    )
