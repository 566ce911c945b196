"""A strategy of your own: an ordinary Flower strategy in an ordinary file.

Run it from this folder::

    fedknow simulate digits --set strategy=my_strategy:MyStrategy --set strategy.fraction_train=0.5

Any key under ``strategy`` is an argument of the constructor. The experiment calls the hooks;
the strategy neither knows nor cares how clients are reached, so the same class runs under
Flower itself.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg


class MyStrategy(FedAvg):
    """FedAvg in which no client moves the model further than a typical one.

    Each client's update is shortened to at most ``slack`` times the median norm of the round's
    updates. With many tasks and little data a single client that runs away would otherwise undo
    what the others remember.

    Parameters
    ----------
    slack : float
        How much longer than the median an update may be.
    fraction_train : float
        Share of the clients that train in a round.
    """

    def __init__(self, slack: float = 1.0, fraction_train: float = 1.0) -> None:
        super().__init__(
            fraction_train=fraction_train,
            fraction_evaluate=0.0,
            min_train_nodes=1,
            min_available_nodes=1,
        )
        self.slack = slack
        self.current: dict[str, np.ndarray] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember what the clients start from."""
        self.current = {name: array.numpy() for name, array in arrays.items()}
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Shorten long updates, then let FedAvg average."""
        replies = [reply for reply in replies if not reply.has_error()]
        norms = []
        for reply in replies:
            local = self._record(reply)
            norms.append(
                np.sqrt(
                    sum(
                        np.sum((local[name].numpy() - w) ** 2)
                        for name, w in self.current.items()
                    )
                )
            )
        limit = self.slack * np.median(norms) if norms else 0.0
        for reply, norm in zip(replies, norms, strict=True):
            if norm > limit:
                local = self._record(reply)
                for name, w in self.current.items():
                    local[name] = Array(
                        w + (limit / norm).astype(w.dtype) * (local[name].numpy() - w)
                    )
        return super().aggregate_train(server_round, replies)

    def _record(self, reply: Message) -> ArrayRecord:
        return reply.content.array_records[self.arrayrecord_key]
