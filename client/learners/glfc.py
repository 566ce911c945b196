"""GLFC without its proxy: compensated gradients, distilled relations.

Dong, Wang, Fang, Sun, Xu, Wang and Zhu, "Federated Class-Incremental Learning", CVPR 2022, arXiv
2203.11473. A client trains on its task's samples and on stored ones. With sigmoid answers p(x), a
label y, the old model's answers p_old(x) to old classes, and b samples in the batch,

    G_i = |p(x_i)_y - 1|,   weights w_i = G_i / mean of G over the batch's old or new samples  (1)
    L_GC = 1/b sum_i w_i BCE(p(x_i), onehot(y_i))                                          (2)
    L_RD = 1/b sum_i BCE(p(x_i), onehot(y_i) with p_old(x_i) in the old classes' places)   (3)
    L    = lambda_1 L_GC + lambda_2 L_RD                                                   (4)

so old classes forget at one pace, and new classes are learned at one pace. BCE is a mean over
classes. Equations are numbered here, as the paper's were not at hand.

Two parts of the paper are left out, and its name is kept for what remains:

- The proxy server chooses the best old model, on samples that it restores from clients'
  gradients. That is an attack on privacy, however perturbed. Here the old model is the shared one
  that the last task ended with, under the client's own head.
- Clients find out by the entropy of answers that a task is new. Here they are told.

The paper writes softmax and a divergence. Its program (github.com/conditionWang/FCIL) has sigmoid
and BCE, with which the target of Eq. (3) is a distribution for each class; so it is here.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedknow.client.data.stream import TaskData
from fedknow.client.learners.frames.learner import (
    Batch,
    HeadSlice,
    Round,
    Samples,
    State,
    Tensors,
)
from fedknow.client.learners.frames.rehearsal import (
    MemorySettings,
)
from fedknow.client.learners.frames.scoring import predict
from fedknow.client.learners.joint import UnionTraining
from fedknow.protocols.config import TrainConfig

__all__ = ["Glfc", "GlfcSettings", "compensation"]

_PASS = 256
"""Samples of one forward pass."""


class GlfcSettings(MemorySettings):
    """Settings of :class:`Glfc`."""

    compensate: float = Field(0.5, ge=0)
    """lambda_1, the weight of the compensated loss."""
    distill: float = Field(0.5, ge=0)
    """lambda_2, the weight of the relation distillation."""


def compensation(z: Tensor, y: Tensor, is_old: Tensor) -> Tensor:
    """Take the weights of Eq. (1), float [n].

    Parameters
    ----------
    z : Tensor
        Logits of the classes in use, float [n, c].
    y : Tensor
        Labels, as places among them, int64 [n].
    is_old : Tensor
        Whether a sample is of a class of past tasks, bool [n].
    """
    pull = 1 - z.detach().sigmoid().gather(1, y[:, None])[:, 0]
    weights = torch.ones_like(pull)
    for group in (is_old, ~is_old):
        mean = pull[group].mean()
        # A group that is told perfectly has no pull, and nothing to share out.
        if group.any() and mean > 0:
            weights[group] = pull[group] / mean
    return weights


class Glfc(UnionTraining):
    """Gradient compensation and relation distillation (CVPR 2022).

    Dong et al.; without the proxy server and its inversion of gradients.

    Keeps: its samples of each task (setting ``memory``), and the old model. Sends: what
    ``exchange`` says, nothing more; the paper averages everything, ``exchange = "all"``. Needs:
    training on the stored samples besides, and a forward pass a round over all of them. Valid:
    any model, class-incremental.
    """

    Settings = GlfcSettings
    settings: GlfcSettings
    scenarios = ("class-incremental",)
    search: ClassVar[dict[str, list[Any]]] = {
        "memory": [0.1, 0.25, 0.5],
        "compensate": [0.5, 1.0],
        "distill": [0.5, 1.0, 5.0],
    }

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        settings: GlfcSettings,
    ) -> None:
        super().__init__(model, train, settings)
        self._scratch = copy.deepcopy(model)  # the old model speaks in here

    # --- state

    def load_own_state(self, state: State) -> None:
        """Take over the memory, the old model and the classes that it knows."""
        super().load_own_state(state)
        self.old: Tensors = dict(state.get("old", {}))
        self.old_classes = [int(label) for label in state.get("old_classes", [])]
        self._answers = torch.zeros(0)
        self._head: HeadSlice | None = None

    def own_state(self) -> State:
        """Give the memory, the old model and the classes that it knows."""
        return super().own_state() | {
            "old": self.old,
            "old_classes": self.old_classes,
        }

    # --- training

    def training_data(self, task: TaskData, round: Round) -> Samples:
        """Give the task's samples and the stored ones."""
        union = self.union(task)
        return self.sample(union, len(union), round)

    def begin(self, task: TaskData, round: Round) -> None:
        """Record the old model's answers to all samples of the round."""
        super().begin(task, round)
        classes = self._classes(task)
        self._head = HeadSlice(classes, self.head.out_features, self.device)
        if self.old:
            self._scratch.load_state_dict(self.model.state_dict() | self.old)
            self._scratch.eval()
            # Once a round, as the old model answers the same each epoch.
            x = self.union(task).x
            self._answers = predict(self, self._scratch, x, _PASS).sigmoid()

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss of Eq. (4), and the compensated one to report."""
        assert self._head is not None
        z = self._head.logits(batch.outputs)
        labels = batch.head.names(batch.y)
        y = self._head.labels(labels)
        target = F.one_hot(y, self._head.width).to(z)
        old = torch.tensor(
            self.old_classes,
            dtype=torch.int64,
            device=z.device,
        )
        weights = compensation(z, y, torch.isin(labels, old))
        losses = F.binary_cross_entropy_with_logits(z, target, reduction="none")
        compensated = (weights * losses.mean(1)).mean()
        if not self.old:
            return compensated, compensated
        places = self._head.labels(old)
        mixed = target.index_copy(1, places, self._answers[batch.index][:, old])
        distilled = F.binary_cross_entropy_with_logits(z, mixed)
        total = (
            self.settings.compensate * compensated
            + self.settings.distill * distilled
        )
        return total, compensated

    def _classes(self, task: TaskData) -> list[int]:
        """List the classes of past tasks and of this one, each once."""
        return list(dict.fromkeys([*self.old_classes, *task.seen]))

    # --- the end of a task

    def end_task(self, task: TaskData, round: Round) -> dict[str, float]:
        """Keep a part of the samples, and the model that the task ended with."""
        # Before the task ends, which may train once more and move away from the shared model.
        shared = self.send()
        report = super().end_task(task, round)
        self.entries.load(shared)
        self.old = self.send() | self.local_parameters()
        self.old_classes = self._classes(task)
        size = sum(value.nbytes for value in self.old.values())
        return {"knowledge-bytes": report["knowledge-bytes"] + size}
