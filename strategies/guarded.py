"""Flower's strategies, where one client's numbers would end a run.

Each gives what Flower's own gives for all other numbers, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from logging import WARNING
from typing import Any

from flwr.app import ArrayRecord, MetricRecord
from flwr.app import Message as FlowerMessage
from flwr.serverapp import strategy as flower
from flwr.supercore import log

__all__ = ["AdaptiveClipping", "FixedClipping", "QFedAvg"]

LARGEST_LOSS = 1e6
"""Loss above which a client has no say in q-FedAvg."""


class _Bound(float):
    """A bound of norms, under which an update of norm 0 is at any scale."""

    def __truediv__(self, norm: float) -> float:
        return float(self) / norm if norm else math.inf


class _Clipping:
    """Clips an update of norm 0, which Flower divides by its norm."""

    @property
    def clipping_norm(self) -> float:
        """Norm to which updates are clipped."""
        return _Bound(vars(self)["clipping_norm"])

    @clipping_norm.setter
    def clipping_norm(self, value: float) -> None:
        # A plain number, under this name: checkpoints read it there.
        vars(self)["clipping_norm"] = float(value)


class FixedClipping(_Clipping, flower.DifferentialPrivacyServerSideFixedClipping):
    """Central differential privacy with a fixed bound of norms.

    A client that returns what it was sent counts as an update of norm 0.
    """


class AdaptiveClipping(
    _Clipping, flower.DifferentialPrivacyServerSideAdaptiveClipping
):
    """Central differential privacy with a bound that follows a quantile.

    A client that returns what it was sent counts as an update of norm 0.
    """


class QFedAvg(flower.QFedAvg):
    """q-FedAvg without clients whose loss has no power.

    A loss below 0, or above :data:`LARGEST_LOSS`, would make the model not finite.

    Parameters
    ----------
    client_learning_rate : float
        Learning rate of the clients' training, from which their gradients are guessed.
    q : float
        Power of the losses: the larger, the more a client with a large loss counts. 0 is FedAvg.
    train_loss_key : str
        Name of the loss in a client's answer.
    """

    def aggregate_train(
        self, server_round: int, replies: Iterable[FlowerMessage]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the replies with a usable loss."""
        every = list(replies)
        usable = [reply for reply in every if self._has_usable_loss(reply)]
        if len(usable) < len(every):
            log(
                WARNING,
                "%d of %d replies are left out: their loss is below 0 or above %g",
                len(every) - len(usable),
                len(every),
                LARGEST_LOSS,
            )
        return super().aggregate_train(server_round, usable)

    def _has_usable_loss(self, reply: FlowerMessage) -> bool:
        if not reply.has_content():
            return True
        records: list[Any] = list(reply.content.metric_records.values())
        loss = records[0].get(self.train_loss_key) if records else None
        if not isinstance(loss, int | float):
            # A missing loss is Flower's to complain about.
            return True
        return 0 <= loss <= LARGEST_LOSS
