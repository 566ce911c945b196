"""LANDER: data-free distillation, with an anchor for each class.

Tran, Le, Le, Harandi and Phung, "Text-Enhanced Data-free Approach for Federated Class-Incremental
Learning", CVPR 2024, arXiv 2403.14101. As in :mod:`~fedknow.client.learners.target` the server
makes images of the global model. Besides, each class c has an anchor e_c, near which features f
are held in training and in synthesis, but no nearer than a radius r:

    bound(x, y) = max(0, mean over samples and dimensions of (f(x) - e_y)^2 - r)              (1)
    L_cur = CE(current task's classes) + lambda bound                                       (2)
    L_pre = KD(old answers to synthetic images) + mean (f(x) - f_old(x))^2                  (3)
    L = a (1 + 1/s) / b L_cur + p s b L_pre,   s = log2(n/2 + 1),   b = sqrt(old/n)        (4)

with n classes so far, ``old`` of them of past tasks; L_cur alone in the first task. Equations are
numbered here, as the paper's were not at hand; the program meant is github.com/tmtuan1307/LANDER
at b1ea5d1. This is the client's half.

**The anchors are not the paper's.** There they are a language model's embeddings of the class
names, brought to the features' size. Here each is drawn: what a ReLU leaves of standard normal
numbers. So all of the method is here but the knowledge of which classes are alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedknow.client.data.stream import TaskData
from fedknow.client.learners.frames.batch import widen
from fedknow.client.learners.frames.learner import (
    Batch,
    LearnerSettings,
    Round,
    Tensors,
    hits,
)
from fedknow.client.learners.target import (
    Target,
    TargetSettings,
    distillation,
)
from fedknow.protocols.config import TrainConfig

__all__ = [
    "Lander",
    "LanderSettings",
    "bounding",
    "draw_anchors",
    "weights",
]

_SEED = 20_240_617
"""Server and clients must draw the same anchors, whatever the experiment's seed."""


class LanderSettings(TargetSettings):
    """Settings of :class:`Lander`.

    Defaults of the first four are the authors' for CIFAR-100.
    """

    distill: float = Field(0.4, ge=0)
    """p, the weight of L_pre."""
    current: float = Field(0.2, ge=0)
    """a, the weight of L_cur after the first task."""
    anchor_weight: float = Field(5.0, ge=0)
    """lambda, the weight of the bounding loss."""
    radius: float = Field(0.015, ge=0)
    """r, within which features are left alone."""


def draw_anchors(classes: int, width: int) -> Tensor:
    """Draw the anchors, float [classes, width]; the same everywhere."""
    # The seed is fixed, so that clients agree on anchors that never travel.
    draws = torch.Generator().manual_seed(_SEED)
    # As features that end in a ReLU have no negative numbers.
    return torch.randn(classes, width, generator=draws).relu()


def bounding(features: Tensor, anchors: Tensor, radius: float) -> Tensor:
    """Take the bounding loss, Eq. (1), of features and anchors, float [n, f]."""
    return (F.mse_loss(features, anchors) - radius).relu()


def weights(earlier: int, total: int) -> tuple[float, float]:
    """Give the factors of L_cur and L_pre in Eq. (4), without a and p.

    Parameters
    ----------
    earlier, total : int
        Classes of past tasks, one or more, and of all tasks so far.
    """
    s = math.log2(total / 2 + 1)
    b = (earlier / total) ** 0.5
    return (1 + 1 / s) / b, s * b


class Lander(Target):
    """TARGET with anchors for features, drawn in place of text (CVPR 2024).

    Tran et al.; the server makes the images, near the anchors too.

    Keeps: the synthetic images it was last sent, the answers to them and their features. Sends:
    the model, and at the end of a task its classes. Gets: the model, and once a task the images,
    answers and features, float32. Needs: what :class:`~fedknow.client.learners.target.Target`
    needs. Valid: images, any model; made for class-incremental streams. Everything is averaged.
    """

    Settings = LanderSettings
    settings: LanderSettings
    strategy = "lander"
    search: ClassVar[Mapping[str, Sequence[float | str]]] = {
        "distill": [0.1, 0.4, 1.0],
        "anchor_weight": [1.0, 5.0],
    }

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        settings: LanderSettings,
    ) -> None:
        super().__init__(model, train, settings)
        shape = (
            self.head.out_features,
            self.head.in_features,
        )
        self._anchors = draw_anchors(*shape).to(self.device)

    @classmethod
    def strategy_options(cls, settings: LearnerSettings) -> dict[str, Any]:
        """How the server makes images."""
        return super().strategy_options(settings) | settings.model_dump(
            include={"anchor_weight", "radius"}
        )

    def receive_extra(self, extra: Tensors) -> None:
        """Take what TARGET's clients take, and ``features``, float [n, f].

        Raises
        ------
        ValueError
            If they do not fit together.
        """
        extra = dict(extra)
        features = extra.pop("features", torch.zeros(0))
        super().receive_extra(extra)
        if features.shape != (
            len(extra["x"]),
            self.head.in_features,
        ):
            raise ValueError(
                f"features of synthetic images have shape {tuple(features.shape)}"
            )
        # A copy, as received arrays are views of a message's buffer.
        self._pool["features"] = features.clone()

    def begin(self, task: TaskData, round: Round) -> None:
        """Lay out the synthetic images, and weigh the two losses."""
        super().begin(task, round)
        total = len(task.seen)
        earlier = total - len(task.classes)
        # A client that joins late has no old classes of its own, and images all the same.
        self._weights = weights(max(earlier, 1), total)

    def gradient(self, batch: Batch) -> tuple[float, int]:
        """Gradients of Eq. (4), with as many synthetic images as samples."""
        count = len(batch.y)
        x = batch.x
        if self._pool:
            order = torch.randperm(len(self._images), generator=self._draws)
            index = order[:count].to(self.device)
            x = self.images(torch.cat([x, self._images[index]]))
        with self.autocast():
            answer = self.body(x)
            logits = widen(self.head(answer))
        features = widen(answer)
        names = batch.head.names(batch.y)
        # Only the task's own classes: past ones are held by the distillation alone.
        loss = F.cross_entropy(
            self._current.logits(logits[:count]),
            self._current.labels(names),
        )
        bound = bounding(
            features[:count],
            self._anchors[names],
            self.settings.radius,
        )
        objective = loss + self.settings.anchor_weight * bound
        if self._pool:
            current, previous = self._weights
            objective = (
                self.settings.current * current * objective
                + self.settings.distill
                * previous
                * self._preserve(logits[count:], features[count:], index)
            )
        objective.backward()  # type: ignore[no-untyped-call]
        z = batch.head.logits(logits[:count].detach())
        return loss.item(), hits(z, batch.y)

    def _preserve(self, z: Tensor, features: Tensor, index: Tensor) -> Tensor:
        """Take L_pre, Eq. (3), of some synthetic images."""
        answers = distillation(
            z,
            self._answers[index],
            self._slices,
            self.settings.temperature,
        )
        return answers + F.mse_loss(features, self._pool["features"][index])
