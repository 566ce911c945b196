"""A quadratic penalty around an anchor.

It is what methods have in common that hold important parameters in place.

The client keeps, of all finished tasks together, an importance Omega_j >= 0 and an anchor w*_j
for each parameter, and minimises

    L(w) + strength * factor * sum_j Omega_j (w_j - w*_j)^2

What differs is where Omega comes from and how tasks add up: :mod:`~.ewc`, :mod:`~.mas`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedknow.client.data.stream import TaskData
from fedknow.client.learners.frames.learner import (
    Batch,
    ContinualSettings,
    Learner,
    Round,
    State,
    Tensors,
)
from fedknow.client.learners.frames.settings import ANY_HEAD
from fedknow.protocols.config import TrainConfig

__all__ = ["Consolidation", "ConsolidationSettings"]


class ConsolidationSettings(ContinualSettings):
    """Settings of every method with a penalty around an anchor.

    Each method has a ``strength`` of its own as well.
    """

    anchor: Literal["global", "local"] = "global"
    """The model a finished task's importance is measured at and that is returned to: the shared
    one that the task ended with, under the client's own head, or the client's own model as it
    last trained it (one more model to keep within a task). Without exchange the two are one."""


class Consolidation(Learner):
    """A learner with a quadratic penalty around an anchor.

    It is the frame for methods that measure importance.
    """

    heads = ANY_HEAD
    Settings = ConsolidationSettings
    settings: ConsolidationSettings
    factor: ClassVar[float] = 1.0

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        settings: ConsolidationSettings,
    ) -> None:
        super().__init__(model, train, settings)
        self._parameters = self.trainable

    @property
    def strength(self) -> float:
        """Lambda."""
        raise NotImplementedError

    @property
    def decay(self) -> float:
        """What is left of past tasks' importance each time a task is added."""
        return 1.0

    def measure(self, task: TaskData, round: Round) -> Tensors:
        """Measure how much each parameter matters to a task that is over.

        It is measured at the model as it is. Shapes are those of the parameters.
        """
        raise NotImplementedError

    def merge(
        self, importance: Tensors, anchor: Tensors
    ) -> tuple[Tensors, Tensors]:
        """Give importance and anchor of all tasks.

        They come from those of the task just finished, and what is kept of the others.

        The sum of the old importance, times :attr:`decay`, and the new one, at the new anchor.
        """
        if not self.importance:
            return importance, anchor
        return {
            name: self.decay * self.importance[name] + new
            for name, new in importance.items()
        }, anchor

    # --- state

    def load_own_state(self, state: State) -> None:
        """Take over importance, anchor and the model last trained here."""
        self.importance: Tensors = dict(state.get("importance", {}))
        self.anchor: Tensors = dict(state.get("anchor", {}))
        self._local: Tensors = dict(state.get("local", {}))

    def own_state(self) -> State:
        """Give importance, anchor and the model last trained here."""
        return {
            "importance": self.importance,
            "anchor": self.anchor,
            "local": self._local,
        }

    # --- training

    @property
    def remedy(self) -> str:  # type: ignore[override]
        """Too large a lambda makes a loss diverge as well."""
        return f", or lower learner.strength = {self.strength:g}"

    def end_round(self, task: TaskData, round: Round) -> dict[str, float]:
        """Keep the model last trained here, where it is the anchor."""
        if self.settings.anchor == "local":
            self._local = self.send()
        return {}

    def gradient(self, batch: Batch) -> tuple[float, int]:
        """Gradients of the batch's loss and of the penalty."""
        report = super().gradient(batch)
        scale = 2 * self.factor * self.strength
        for name, anchor in self.anchor.items():
            parameter = self._parameters[name]
            pull = scale * self.importance[name] * (parameter.detach() - anchor)
            if parameter.grad is not None:
                parameter.grad.add_(pull)
            elif (
                pull.any()
            ):  # with a gradient of zeros, weight decay would move it
                parameter.grad = pull
        return report

    @torch.no_grad()
    def penalty(self) -> float:
        """Return the penalty at the model as it is, lambda included."""
        total = 0.0
        for name, anchor in self.anchor.items():
            total += (
                (
                    self.importance[name]
                    * (self._parameters[name] - anchor).square()
                )
                .sum()
                .item()
            )
        return self.factor * self.strength * total

    def counts(self) -> dict[str, float]:
        """``penalty``: its value at the end of the round."""
        return {"penalty": self.penalty()}

    def end_task(self, task: TaskData, round: Round) -> dict[str, float]:
        """Measure importance at the anchor and add it to what is kept."""
        # Before the task ends, which may train once more and move away from the shared model.
        shared = self.send()
        super().end_task(task, round)
        self.entries.load(
            self._local if self.settings.anchor == "local" else shared
        )
        # Without dropout and batch statistics, which would make importance a matter of chance.
        self.model.eval()
        anchor = {
            name: p.detach().clone() for name, p in self._parameters.items()
        }
        self.importance, self.anchor = self.merge(
            self.measure(task, round), anchor
        )
        self._local = {}
        retained = [*self.importance.values(), *self.anchor.values()]
        return {
            "knowledge-bytes": float(sum(tensor.nbytes for tensor in retained))
        }

    def gradients(self, objective: Tensor, needs_graph: bool = False) -> Tensors:
        """Gradient of a scalar by each parameter.

        ``needs_graph``: there is more to differentiate on this graph.
        """
        parts = torch.autograd.grad(
            objective,
            list(self._parameters.values()),
            retain_graph=needs_graph,
            allow_unused=True,
            # Zeros for parameters that take no part, which are then of no importance.
            materialize_grads=True,
        )
        return dict(zip(self._parameters, parts, strict=True))
