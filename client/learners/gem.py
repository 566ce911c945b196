"""GEM and A-GEM: gradients that do not hurt a replay memory.

GEM: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017,
arXiv 1706.08840. A-GEM: Chaudhry, Ranzato, Rohrbach and Elhoseiny, "Efficient Lifelong Learning
with A-GEM", ICLR 2019, arXiv 1812.00420.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fedknow.client.data.stream import TaskData
from fedknow.client.learners.frames.learner import Batch, Round
from fedknow.client.learners.frames.projection import (
    Integration,
    integrate,
    integrate_one,
    integrated,
)
from fedknow.client.learners.frames.rehearsal import (
    MemorySettings,
    Rehearsal,
    Replay,
)
from fedknow.client.learners.frames.settings import ANY_HEAD
from fedknow.protocols.config import TrainConfig

__all__ = ["AGem", "AGemSettings", "Gem", "GemSettings"]


class GemSettings(MemorySettings):
    """Settings of :class:`Gem`."""

    margin: float = Field(0.5, ge=0)
    """gamma, which is added to the multipliers of a projection: it favours updates that help past
    tasks."""


class AGemSettings(MemorySettings):
    """Settings of :class:`AGem`."""

    memory_batch: int = Field(256, ge=1, le=1_000_000)
    """Samples of the memory, of all past tasks together, behind each reference gradient."""


class _Projecting(Rehearsal):
    """The common part of GEM and A-GEM: the gradient as one vector.

    It also counts how often that was turned.
    """

    heads = ANY_HEAD
    replays_alone = True

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        settings: MemorySettings,
    ) -> None:
        super().__init__(model, train, settings)
        # In one order for g and for all rows of G.
        self._parameters = list(self.trainable.values())
        self._sizes = [p.numel() for p in self._parameters]
        self._steps = self._violated = 0

    def begin(self, task: TaskData, round: Round) -> None:
        """Start counting."""
        super().begin(task, round)
        self._steps = self._violated = 0

    def gradient(self, batch: Batch) -> tuple[float, int]:
        """Leave the batch's gradient, projected where it would hurt the memory."""
        report = super().gradient(batch)
        # In the first task there is nothing to protect.
        if self.past is not None:
            g = torch.cat([_or_zero(p.grad, p) for p in self._parameters])
            self._set_gradient(self._project(g, self.past))
            self._steps += 1
        return report

    def counts(self) -> dict[str, float]:
        """``violated``: mean number of constraints that a gradient violated."""
        return {"violated": self._violated / max(1, self._steps)}

    @abstractmethod
    def _project(self, g: Tensor, memory: Replay) -> Tensor:
        """Project a gradient, float [p], so that it does not hurt the memory."""

    def _gradient_of(self, replay: Replay) -> Tensor:
        """Gradient of the mean loss on samples of the memory, float [p].

        It is zero where a parameter has no part in it.
        """
        # A forward pass of its own: the batch's graph is gone by now.
        logits = self.forward(replay.x)
        parts = torch.autograd.grad(
            replay.loss(logits), self._parameters, allow_unused=True
        )
        return torch.cat(
            [
                _or_zero(part, p)
                for part, p in zip(parts, self._parameters, strict=True)
            ]
        )

    def _set_gradient(self, g: Tensor) -> None:
        for part, parameter in zip(
            torch.split(g, self._sizes), self._parameters, strict=True
        ):
            # With a gradient of zeros, weight decay would move a parameter that has none.
            if parameter.grad is not None or part.any():
                parameter.grad = part.view(parameter.shape)


def _or_zero(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return (
        torch.zeros_like(parameter) if gradient is None else gradient
    ).reshape(-1)


class Gem(_Projecting):
    """GEM: the nearest gradient that raises no past task's loss (NIPS 2017).

    The loss is that on the task's memory.

    Before each step, with g_k the gradient on all of past task k's memory, the rows of G:

        (8)   min_{g'} 1/2 ||g - g'||^2   subject to (7)  <g', g_k> >= 0  for all k < t
        (11)  min_{v >= 0} 1/2 v^T G G^T v + (G g)^T v,    g' = G^T v* + g

    and, where a constraint was violated, ``g' = G^T (v* + gamma) + g`` (the end of their
    Section 3). The gradient of all parameters is projected, the head's included, as in the
    paper. Without gamma no past task's loss on its memory rises, to first order; with it that
    holds as long as past tasks do not oppose one another. The authors' program solves Eq. (11)
    under ``v >= gamma`` instead; this follows the paper.

    Keeps: its samples of each task (setting ``memory``), as many of each class. Sends: what
    ``exchange`` says, nothing more. Needs: one forward and backward pass over the whole memory
    for each step, and a gradient of the model's size for each past task while it trains. Valid:
    any model; made for task-incremental streams, and where class-incremental a stored sample is
    scored among all classes seen.
    """

    Settings = GemSettings
    settings: GemSettings
    search: ClassVar[dict[str, list[Any]]] = {
        "memory": [0.1, 0.25, 0.5],
        "margin": [0.0, 0.5, 1.0],
    }

    def begin(self, task: TaskData, round: Round) -> None:
        """Lay out each past task's memory."""
        super().begin(task, round)
        stored = [
            self.memory.replay_of(number, task, self.head.out_features)
            for number in sorted(self.memory.tasks)
        ]
        self._tasks = [
            Replay(self.images(replay.x), replay.y, replay.head)
            for replay in stored
        ]

    def _project(self, g: Tensor, memory: Replay) -> Tensor:
        memories = torch.stack(
            [self._gradient_of(replay) for replay in self._tasks]
        )
        # g', what was added to g, and the margin.
        result = integrated(lambda: self._nearest(g, memories), vectors=3)
        self._violated += result.violated
        return result.gradient

    def _nearest(self, g: Tensor, memories: Tensor) -> Integration:
        """Solve Eq. (11), and add gamma."""
        result = integrate(g, memories)
        if not result.violated:
            return result
        # As in the authors' program: gamma is added to every multiplier once any constraint
        # is violated.
        margin = self.settings.margin * memories.sum(0)
        return replace(result, gradient=result.gradient + margin)


class AGem(_Projecting):
    """A-GEM: the nearest gradient that raises no mean loss (ICLR 2019).

    The mean loss is that over the memory.

    With g_ref the gradient on samples drawn from all of the memory, where <g, g_ref> < 0,

        (11)  g' = g - <g, g_ref> / <g_ref, g_ref> g_ref

    The gradient of all parameters is projected, the head's included.

    Keeps: its samples of each task (setting ``memory``), as many of each class. Sends: what
    ``exchange`` says, nothing more. Needs: one forward and backward pass over ``memory_batch``
    stored samples for each step. Valid: any model; the paper reads a task descriptor, as a
    task-incremental head does; where class-incremental a stored sample is scored among all
    classes seen.
    """

    Settings = AGemSettings
    settings: AGemSettings
    search: ClassVar[dict[str, list[Any]]] = {
        "memory": [0.1, 0.25, 0.5],
        "memory_batch": [32, 256],
    }

    @property
    def _drawn(self) -> int:
        """Stored samples behind a reference gradient, if there are as many."""
        return max(self.settings.memory_batch, self.smallest_known_batch)

    def _project(self, g: Tensor, memory: Replay) -> Tensor:
        # Drawn anew for each step, as in the paper.
        reference = self._gradient_of(self.draw(memory, self._drawn))
        projected = integrate_one(g, reference)
        self._violated += projected is not g
        return projected
