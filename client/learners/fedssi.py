"""FedSSI: synaptic intelligence of a model between global and local.

Li, Wang, Wang, Qi, Xiao and Li, "FedSSI: Rehearsal-Free Continual Federated Learning with
Synergistic Synaptic Intelligence", ICML 2025, arXiv 2412.13779. Synaptic intelligence (Zenke,
Poole and Ganguli, ICML 2017) asks how much each parameter's path lowered the loss. In a
federation the path of one client's training leads away from the model that all share. So a
*personalized surrogate model* v starts at the global model w and follows

    v <- v - eta (grad L(v) + q(lambda) (v - w)),   q = (1 - lambda) / (2 lambda)     (1)

on the client's samples: lambda near 0 keeps it global, near 1 lets it become local. It is there to
be measured alone; what is averaged is trained as ever. Along its path,

    s_j = - sum over steps of dL/dv_j (v_j after - v_j before)                        (2)
    Omega_j = s_j / ((v_j - w_j)^2 + epsilon), summed over tasks                      (3)

and later tasks are trained on L(w) + alpha sum_j Omega_j (w_j - w*_j)^2              (4)

How sure this is: equations are known from public summaries, and numbered here; in the paper (1),
(2) and (4) seem to be Eqs. (5), (6) and (2). Not known are alpha, epsilon, eta and the number of
steps, so these are settings. A path that raised the loss would make a negative Omega_j: a penalty
without a floor. Omega_j is then 0.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch.func import functional_call
from torch.nn import functional as F

from fedknow.client.data.stream import TaskData
from fedknow.client.learners.frames.batch import widen
from fedknow.client.learners.frames.batching import batches
from fedknow.client.learners.frames.consolidation import (
    Consolidation,
    ConsolidationSettings,
)
from fedknow.client.learners.frames.extra_work import (
    extra_steps,
)
from fedknow.client.learners.frames.learner import (
    HeadSlice,
    Round,
    Tensors,
)
from fedknow.protocols.seeds import integer

__all__ = ["FedSsi", "FedSsiSettings"]


class FedSsiSettings(ConsolidationSettings):
    """Settings of :class:`FedSsi`."""

    strength: float = Field(1.0, ge=0)
    """alpha, the weight of the penalty."""
    balance: float = Field(0.5, gt=0, lt=1)
    """lambda: how far the surrogate model follows the client's own samples."""
    surrogate_epochs: int = Field(1, ge=1, le=10_000)
    """Passes of the surrogate model over the task's samples."""
    surrogate_lr: float = Field(1e-2, gt=0)
    """eta, the surrogate model's learning rate."""
    damping: float = Field(1e-3, gt=0)
    """epsilon, which bounds the importance of parameters that hardly moved."""


class FedSsi(Consolidation):
    """A penalty by what parameters did for a surrogate model (ICML 2025).

    Li et al.; the importance of Eq. (3) is measured when a task is over, by one short training
    of the surrogate model in evaluation mode. The paper averages everything, ``exchange =
    "all"``, and anchors at the global model, ``anchor = "global"``.

    Keeps: importance and anchor, two models. Sends: what ``exchange`` says, nothing more.
    Needs: no stored sample; at the end of a task ``surrogate_epochs`` of training, and room for
    three more models while it lasts. Valid: any model, task- or class-incremental.
    """

    Settings = FedSsiSettings
    settings: FedSsiSettings
    search: ClassVar[dict[str, list[Any]]] = {
        "strength": [0.1, 1.0, 10.0, 100.0],
        "balance": [0.1, 0.5, 0.9],
        "surrogate_lr": [1e-3, 1e-2, 1e-1],
    }

    @property
    def strength(self) -> float:
        """Alpha."""
        return self.settings.strength

    @property
    def pull(self) -> float:
        """q(lambda), how strongly the surrogate model is held at the global one."""
        return (1 - self.settings.balance) / (2 * self.settings.balance)

    def measure(self, task: TaskData, round: Round) -> Tensors:
        """Omega of one task, Eq. (3), at the model as it is."""
        path, end = self.follow(task, round)
        # Below 0 the loss rose along the path, which tells of no importance.
        return {
            name: path[name].clamp_min(0)
            / ((end[name] - w).square() + self.settings.damping)
            for name, w in self._weights().items()
        }

    def follow(self, task: TaskData, round: Round) -> tuple[Tensors, Tensors]:
        """Train the surrogate model on a task, Eq. (1).

        Returns
        -------
        path : Tensors
            s of each parameter, Eq. (2).
        end : Tensors
            The surrogate model in the end.
        """
        head = HeadSlice(task.head, self.head.out_features, self.device)
        x, y = (
            self.images(task.train.x),
            head.labels(task.train.y),
        )
        draws = torch.Generator().manual_seed(integer(round.seed, "surrogate"))
        w = self._weights()
        # A copy: the client's own model stays as it was trained.
        v = {name: value.clone().requires_grad_() for name, value in w.items()}
        path = {name: torch.zeros_like(value) for name, value in w.items()}
        eta, size = (
            self.settings.surrogate_lr,
            self.train.batch_size,
        )
        for _ in range(self.settings.surrogate_epochs):
            # In evaluation mode a batch may be of one sample, whatever the model.
            order = batches(len(y), size, draws, self.device)
            for index in extra_steps(order, "surrogate", head.width):
                with self.autocast():
                    z = functional_call(self.model, v, (x[index],))
                loss = F.cross_entropy(head.logits(widen(z)), y[index])
                parts = torch.autograd.grad(
                    loss,
                    list(v.values()),
                    allow_unused=True,
                    materialize_grads=True,
                )
                for name, part in zip(v, parts, strict=True):
                    value = v[name].detach()
                    step = -eta * (part + self.pull * (value - w[name]))
                    path[name].sub_(part * step)
                    v[name] = (value + step).requires_grad_()
        return path, {name: value.detach() for name, value in v.items()}

    def _weights(self) -> Tensors:
        """Give the parameters as they are, without a graph."""
        return {name: p.detach() for name, p in self._parameters.items()}
