"""FLCN: local training held back where the shared model is sensitive.

The server finds out on proxy data where that is.

Yao and Sun, "Continual Local Training for Better Initialization of Federated Models", ICIP
2020, arXiv 2005.12657 (the authors call it FedCL; comparisons in federated continual learning
call it FLCN). The client's half; the server's is :class:`fedknow.strategies.flcn.Flcn`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import nn

from fedknow.client.data.stream import TaskData
from fedknow.client.learners.frames.learner import (
    Batch,
    Layout,
    Learner,
    LearnerSettings,
    Round,
    State,
    Tensors,
)
from fedknow.client.learners.frames.rehearsal import choose
from fedknow.client.learners.frames.shared import check_classes
from fedknow.protocols.config import TrainConfig
from fedknow.protocols.seeds import integer
from fedknow.protocols.texts import counted

__all__ = ["Flcn", "FlcnSettings"]


class FlcnSettings(LearnerSettings):
    """Settings of :class:`Flcn`."""

    strength: float = Field(100.0, ge=0)
    """lambda, the weight of the penalty around the global model."""
    proxy: float = Field(0.1, gt=0, le=1)
    """Fraction of each task's training samples that a client gives to the server, at least one."""
    proxy_samples: int = Field(256, ge=1, le=1_000_000)
    """Most proxy samples that the importance is estimated on in a round; drawn anew for each."""


class Flcn(Learner):
    """A penalty by importance, which the server measures (ICIP 2020).

    The authors call it continual local training; the server has proxy data.

    The paper's local objective, around the global model w_G that the round began with:

        L(w) + lambda sum_j Omega_j (w_j - w_G,j)^2

    where Omega is the diagonal Fisher information of w_G on proxy data, at their labels.
    (Stated from memory of the paper, hence without the equation's number.) The paper assumes
    that the server has such data; here each client gives a fraction of a task's samples away
    with its first answer in that task, and the bytes are counted. Until the first have come
    Omega is zero. Other than in the authors' program (github.com/thu-media/FedCL),

    - Omega is one number a weight, and travels as such; there it is one a parameter tensor, the
      sum over its weights;
    - it is the mean over samples of squared gradients; there batches' gradients are squared,
      added up and divided by the number of samples, or with MAS instead of EWC their absolute
      values are;
    - lambda is 100 by default; there it is 0.5, which weighs an Omega of another scale.

    Keeps: nothing (a number: the last task it gave samples of). Sends: the model, and once a
    task its share of the proxy data, as the client trains on them. Gets: the model and
    Omega, as much again. Needs: the server's time, a forward and backward pass for each proxy
    sample and round, and a server that samples may be shown to. Valid: any model, task- or
    class-incremental.
    """

    Settings = FlcnSettings
    settings: FlcnSettings
    strategy = "flcn"
    search: ClassVar[dict[str, list[Any]]] = {
        "strength": [1.0, 10.0, 100.0, 1e3, 1e4, 1e5],
        "proxy": [0.05, 0.1, 0.15],
    }

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        settings: FlcnSettings,
    ) -> None:
        super().__init__(model, train, settings)
        self._parameters = self.trainable
        self._shape: tuple[int, ...] = ()

    @classmethod
    def strategy_options(cls, settings: LearnerSettings) -> dict[str, Any]:
        """How many proxy samples the server looks at."""
        assert isinstance(settings, FlcnSettings)
        return {"proxy_samples": settings.proxy_samples}

    def load_own_state(self, state: State) -> None:
        """Take over the last task that samples were given of."""
        self._shown_task = int(state.get("shown_task", -1))
        # What the server sends is for this message alone, and is not kept.
        self._importance: Tensors = {}
        self._anchor: Tensors = {}

    def own_state(self) -> State:
        """Give the last task that samples were given of."""
        return {"shown_task": self._shown_task}

    # --- what travels

    def receive_extra(self, extra: Tensors) -> None:
        """Omega, for every parameter to train."""
        # A server of another model would otherwise fail in the middle of a step.
        if {n: v.shape for n, v in extra.items()} != {
            n: p.shape for n, p in self._parameters.items()
        }:
            raise ValueError(
                f"importance weights of {counted(len(extra), 'tensor')} do not fit the "
                f"model's parameters"
            )
        self._importance = extra

    def share(self, task: TaskData, round: Round, ended: bool) -> Tensors:
        """Give the server samples, with the first answer in a task.

        With them go their labels, and the classes they are told from.
        """
        if ended or self._shown_task >= task.task:
            return {}
        # Kept in the state, so that a resumed client does not send its samples twice.
        self._shown_task = task.task
        # One sample at least, or a small client would have no part in the importance.
        count = max(1, int(self.settings.proxy * len(task.train)))
        index = choose(
            task.train.y,
            count,
            torch.Generator().manual_seed(integer(round.seed, "proxy")),
        )
        return {
            "x": task.train.x[index],
            "y": task.train.y[index],
            # With the samples, as the server must take the same slice of the head.
            "classes": torch.tensor(task.head),
        }

    @property
    def _layout(self) -> tuple[str, tuple[int, ...]]:
        """Type and shape of proxy samples."""
        if self.spec is None:
            return "float32", (-1, -1, -1, -1)
        dtype = str(self.spec.input_dtype).removeprefix("torch.")
        return dtype, (-1, *self.spec.shape)

    def shares(self, ended: bool) -> Layout:
        """Draw samples with labels and classes, any number of them."""
        return (
            {}
            if ended
            else {
                "x": self._layout,
                "y": ("int64", (-1,)),
                "classes": ("int64", (-1,)),
            }
        )

    def check_share(self, shared: Mapping[str, np.ndarray]) -> None:
        """Refuse samples without a label each, or with one of no class told."""
        x, y, classes = shared["x"], shared["y"], shared["classes"]
        check_classes("classes", classes, self.head.out_features)
        if len(x) != len(y) or not len(x):
            raise ValueError(
                f"{counted(len(x), 'sample')} with {counted(len(y), 'label')}"
            )
        if (
            len(np.unique(classes)) < len(classes)
            or not np.isin(y, classes).all()
        ):
            raise ValueError(
                "a label that is none of the classes, or a class twice"
            )

    # --- training

    def begin(self, task: TaskData, round: Round) -> None:
        """Note the global model."""
        super().begin(task, round)
        # The received model: the penalty holds what the server measured.
        self._anchor = {
            name: self._parameters[name].detach().clone()
            for name in self._importance
        }

    def gradient(self, batch: Batch) -> tuple[float, int]:
        """Gradients of the loss and of the penalty."""
        report = super().gradient(batch)
        for name, omega in self._importance.items():
            parameter = self._parameters[name]
            if parameter.grad is not None:
                parameter.grad.addcmul_(
                    omega,
                    parameter.detach() - self._anchor[name],
                    value=2 * self.settings.strength,
                )
        return report
