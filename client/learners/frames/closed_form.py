"""Learners that only sum over samples, and leave the rest to the server.

On a frozen network the best linear classifier has a closed form that depends on the samples by
sums alone. A client passes over its samples of a task once, without a gradient.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fedknow.client.data.stream import TaskData
from fedknow.client.learners.frames.learner import (
    Learner,
    LearnerSettings,
    Round,
    State,
    Tensors,
)
from fedknow.client.learners.frames.scoring import predict

__all__ = ["ClosedForm", "ClosedFormSettings", "factor", "triangle"]

_PASS = 256
"""Samples of one forward pass."""


class ClosedFormSettings(LearnerSettings):
    """Settings of methods with a ridge regression in closed form."""

    ridge: float = Field(1.0, gt=0)
    """gamma, the weight of the squared norm of the classifier. More is needed for many features of
    few samples."""


class ClosedForm(Learner):
    """A frame: sums over a task's samples, sent once.

    A client that no round of a task chose sums and sends when the task is over. One that answers
    neither in a round nor then is missing in the solution.
    """

    Settings = ClosedFormSettings
    settings: ClosedFormSettings
    needs_frozen_body = True
    model_train = "head"

    # --- what a method overrides

    @abstractmethod
    def sums(self, features: Tensor, labels: Tensor, round: Round) -> Tensors:
        """Sum over a task's samples.

        Parameters
        ----------
        features : Tensor of float64, shape (n, d)
            What the frozen network gives.
        labels : Tensor of int64, shape (n,)
            Of the whole head.
        round : Round
            Its seed is the source of draws.
        """

    # --- the frame

    def load_own_state(self, state: State) -> None:
        """Take over which tasks were summed, and sums that are not sent yet."""
        self.summed = [int(task) for task in state.get("summed", [])]
        self.pending: Tensors = dict(state.get("pending", {}))

    def own_state(self) -> State:
        """Give which tasks were summed, and sums that are not sent yet."""
        return {"summed": self.summed, "pending": self.pending}

    def fit(self, task: TaskData, round: Round) -> dict[str, float]:
        """Sum over the task's samples, unless that was done before.

        Returns
        -------
        dict
            ``loss`` and ``accuracy`` of the model as it was received.
        """
        self.model.eval()
        with self.meter.part():
            features = predict(self, self.body, task.train.x, _PASS)
            with torch.no_grad():
                logits = self.head(features)
            self._trained_task = max(self._trained_task, task.task)
            if task.task not in self.summed:
                self.summed = [*self.summed, task.task]
                self.pending = self.sums(features.double(), task.train.y, round)
                self.meter.add(samples=len(task.train))
        loss = F.cross_entropy(logits, task.train.y).item()
        right = (logits.argmax(1) == task.train.y).double().mean().item()
        return {"loss": loss, "accuracy": right}

    def end_task(self, task: TaskData, round: Round) -> dict[str, float]:
        """End a task; a client that was never chosen sums now."""
        return super().end_task(task, round)

    def share(self, task: TaskData, round: Round, ended: bool) -> Tensors:
        """Give the sums that are not sent yet."""
        sums, self.pending = self.pending, {}
        return sums

    @classmethod
    def strategy_options(cls, settings: LearnerSettings) -> dict[str, Any]:
        """Give the strategy's gamma."""
        assert isinstance(settings, ClosedFormSettings)
        return {"ridge": settings.ridge}


def triangle(matrix: Tensor) -> Tensor:
    """Cut a symmetric [d, d] down to its upper half, [d (d + 1) / 2]."""
    rows, columns = torch.triu_indices(len(matrix), len(matrix))
    return matrix[rows, columns]


def factor(features: Tensor) -> Tensor:
    """Give R with R'R = X'X and no more rows than X: [n, d] -> [min(n, d), d]."""
    upper: Tensor = torch.linalg.qr(features, mode="r").R
    return upper
