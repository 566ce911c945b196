"""TARGET: class-continual learning by distillation, without exemplars.

Zhang, Chen, Zhuang and Lyu, ICCV 2023, arXiv 2303.06937. When a task is over the server,
without any data, makes images that the global model takes for its classes
(:class:`fedknow.strategies.target.Target`). In the next task each client has them with the
global model's answers, and learns its own samples while it keeps those answers:

    (11)  L(w) = CE(current task's classes) + alpha sum_x -softmax(z_old(x) / T) . log
          softmax(z(x) / T)

the second over a batch of synthetic images x and the logits of the classes of past tasks: but
for what does not depend on w, the paper's divergence. Eq. (11) has no T, the authors' program
has T = 2. This is the client's half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fedknow.client.data.stream import TaskData
from fedknow.client.learners.frames.learner import (
    Batch,
    HeadSlice,
    Layout,
    Learner,
    LearnerSettings,
    Round,
    State,
    Tensors,
    hits,
)
from fedknow.client.learners.frames.shared import check_classes
from fedknow.protocols.seeds import integer

__all__ = ["Target", "TargetSettings", "distillation"]


class TargetSettings(LearnerSettings):
    """Settings of :class:`Target`.

    The first two are the authors' for CIFAR-100, as far as they are known.
    """

    distill: float = Field(25.0, ge=0)
    """alpha, the weight of the distillation loss on synthetic images."""
    temperature: float = Field(2.0, gt=0)
    """T, which divides logits before answers are distilled."""
    samples: int = Field(256, ge=1, le=1_000_000)
    """Synthetic images after each task, of all past classes together; the authors make 8000."""
    generator_steps: int = Field(30, ge=1, le=1_000_000)
    """Steps of the generator for each batch of images."""
    student_steps: int = Field(20, ge=0, le=1_000_000)
    """Steps of the student that the generator is to find weak spots of, after each batch of
    images."""


def distillation(
    z: Tensor,
    target: Tensor,
    slices: Sequence[Tensor],
    temperature: float,
) -> Tensor:
    """Cross-entropy of softened answers, a mean.

    It is over samples and over slices of the head.

    Parameters
    ----------
    z, target : Tensor
        Logits of the model that learns and of the one to keep, float [n, classes].
    slices : sequence of Tensor
        Columns that belong together, int64 [k] each; a softmax is taken in each.
    temperature : float
        T.
    """
    losses = [
        -(
            (target[:, columns] / temperature).softmax(1)
            * (z[:, columns] / temperature).log_softmax(1)
        )
        .sum(1)
        .mean()
        for columns in slices
    ]
    return torch.stack(losses).mean()


class Target(Learner):
    """Distillation on images made of the global model (ICCV 2023).

    Zhang et al.; the server makes them.

    Keeps: the synthetic images it was last sent, and the answers to them. Sends: the model, and
    at the end of a task its classes. Gets: the model, and once a task the images with their
    answers, float32. Needs: the server's time, and a forward and backward pass over as many
    synthetic images as a batch has for each step. No real sample is kept or sent. Valid: images,
    any model; made for class-incremental streams. Where task-incremental, answers are distilled in
    each past task's slice. Everything is averaged: the server must have the whole model.

    As in the authors' program, the first term is taken among the current task's classes alone,
    also where all classes seen compete in the end, and the paper's images are augmented again
    on the clients, which is left out here.
    """

    Settings = TargetSettings
    settings: TargetSettings
    strategy = "target"
    kinds = ("image",)
    search: ClassVar[Mapping[str, Sequence[float | str]]] = {
        "distill": [1.0, 5.0, 25.0]
    }

    @classmethod
    def strategy_options(cls, settings: LearnerSettings) -> dict[str, Any]:
        """How the server makes images."""
        return settings.model_dump(
            include={"samples", "temperature", "generator_steps", "student_steps"}
        )

    # --- state, and what travels

    def load_own_state(self, state: State) -> None:
        """Take over the synthetic images."""
        self._pool: Tensors = dict(state.get("pool", {}))

    def own_state(self) -> State:
        """Give the synthetic images."""
        return {"pool": self._pool}

    replay = ("pool",)

    def receive_extra(self, extra: Tensors) -> None:
        """Take synthetic images and the global model's answers to them.

        ``x`` float [n, C, H, W], ``logits`` [n, k] of ``classes`` int64 [k], and the ``slice``
        that each class is in.
        """
        has_names = extra.keys() == {"x", "logits", "classes", "slice"}
        if not has_names or extra["logits"].shape != (
            len(extra["x"]),
            len(extra["classes"]),
        ):
            raise ValueError(
                f"synthetic images with {', '.join(extra)} do not fit together"
            )
        # A copy, as received arrays are views of a message's buffer.
        self._pool = {name: value.clone() for name, value in extra.items()}

    def share(self, task: TaskData, round: Round, ended: bool) -> Tensors:
        """When a task is over, its classes."""
        return {"classes": torch.tensor(task.classes)} if ended else {}

    def shares(self, ended: bool) -> Layout:
        """Return the classes of a task."""
        return {"classes": ("int64", (-1,))} if ended else {}

    def check_share(self, shared: Mapping[str, np.ndarray]) -> None:
        """Refuse classes that the model does not have, or has once."""
        classes = shared["classes"]
        check_classes("classes", classes, self.head.out_features)
        if len(np.unique(classes)) < len(classes):
            raise ValueError("a class is named twice")

    # --- training

    def begin(self, task: TaskData, round: Round) -> None:
        """Lay out the synthetic images."""
        super().begin(task, round)
        # Draws of their own, so that images change nothing in the order of batches.
        self._draws = torch.Generator().manual_seed(
            integer(round.seed, "synthetic")
        )
        self._current = HeadSlice(
            task.classes, self.head.out_features, self.device
        )
        if self._pool:
            self._images = self.images(self._pool["x"])
            self._answers = torch.zeros(
                len(self._images), self.head.out_features, device=self.device
            )
            # Laid out over the whole head, so that slices can be taken by class.
            self._answers[:, self._pool["classes"]] = self._pool["logits"]
            group = self._pool["slice"]
            self._slices = [
                self._pool["classes"][group == number]
                for number in range(int(group.max()) + 1)
            ]

    def gradient(self, batch: Batch) -> tuple[float, int]:
        """Gradients of the batch's loss and of the distillation.

        There are as many synthetic images as samples.
        """
        if not self._pool:
            return super().gradient(batch)
        count = len(batch.y)
        index = torch.randperm(len(self._images), generator=self._draws)[
            :count
        ].to(self.device)
        logits = self.forward(
            self.images(torch.cat([batch.x, self._images[index]]))
        )
        own_logits = logits[:count]
        # Only the task's own classes: past ones are held by the distillation alone.
        loss = F.cross_entropy(
            self._current.logits(own_logits),
            self._current.labels(batch.head.names(batch.y)),
        )
        distillation_loss = distillation(
            logits[count:],
            self._answers[index],
            self._slices,
            self.settings.temperature,
        )
        (loss + self.settings.distill * distillation_loss).backward()  # type: ignore[no-untyped-call]
        return loss.item(), hits(batch.head.logits(own_logits.detach()), batch.y)

    def end_task(self, task: TaskData, round: Round) -> dict[str, float]:
        """Do nothing: nothing is personal.

        So a client that was never chosen in the task need not train for itself.
        """
        return {
            "knowledge-bytes": float(
                sum(value.nbytes for value in self._pool.values())
            )
        }
