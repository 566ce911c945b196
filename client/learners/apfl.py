"""APFL: a personal model mixed with the shared one.

Each client learns the share of its own model.

Deng, Kamani and Mahdavi, "Adaptive Personalized Federated Learning", 2020, arXiv 2003.13461.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedknow.client.compute.sizes import tensor_bytes
from fedknow.client.data.stream import TaskData
from fedknow.client.learners.frames.learner import (
    Batch,
    Learner,
    LearnerSettings,
    Predictor,
    Round,
    State,
    Tensors,
    hits,
    make_optimizer,
    widen,
)
from fedknow.protocols.config import TrainConfig

__all__ = ["Apfl", "ApflSettings"]


class ApflSettings(LearnerSettings):
    """Settings of :class:`Apfl`."""

    alpha: float = Field(0.5, ge=0, le=1)
    """Share of the personal model in the mixture, to begin with."""
    adaptive: bool = True
    """Whether the share is learned."""
    alpha_lr: float = Field(0.0, ge=0)
    """Step size of the share; 0: ``train.lr``, as in the paper."""


class Apfl(Learner):
    """Predict with a mixture of a shared and a personal model (2020).

    Algorithm 1: for the shared model w, the personal v and the mixture m = alpha v + (1 -
    alpha) w, each step is

        w <- w - eta grad f(w),    v <- v - eta grad_v f(m) = v - eta alpha grad f(m)

    and in the first step of each round, Eq. (10), alpha <- alpha - eta <v - w, grad f(m)>, kept
    within [0, 1]. Models are mixed by their parameters, not by their answers; the term that the
    authors' code adds to alpha's gradient is not in the paper, and is left out. The step of v
    holds for plain SGD: Adam divides a gradient by its own running size, so that the factor
    alpha nearly cancels and v moves as far whatever its share.

    Keeps: v and alpha, one model, which knows nothing of tasks. Sends: w. Needs: two forward
    and backward passes a step. Valid: any model, task- or class-incremental. Scored as the
    purely global model it is w alone.
    """

    Settings = ApflSettings
    settings: ApflSettings
    search: ClassVar[dict[str, list[Any]]] = {
        "alpha": [0.25, 0.5, 0.75],
        "alpha_lr": [0.0, 0.01, 0.1],
    }

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        settings: ApflSettings,
    ) -> None:
        super().__init__(model, train, settings)
        self._initial = {
            name: self.entries[name].detach().clone()
            for name in (*self.entries.names, *self.entries.counters)
        }

    # --- state

    def load_own_state(self, state: State) -> None:
        """Take over the personal model and its share."""
        # state.get("own", {}) | A new client starts from the initial model, as the shared one
        # does.
        personal: Tensors = self._initial | state.get("own", {})
        self._own = {
            name: nn.Parameter(personal[name].clone()) for name in self.trainable
        }
        self._own_buffers = {
            name: value.clone()
            for name, value in personal.items()
            if name not in self.trainable
        }
        self.alpha = float(state.get("alpha", self.settings.alpha))
        self._alpha_gradient: float | None = None
        self._mixed = True

    def own_state(self) -> State:
        """Give the personal model and its share."""
        personal = {n: p.detach().clone() for n, p in self._own.items()}
        personal |= {
            n: b.clone()
            for n, b in self._own_buffers.items()
            # Counters begin anew with each message, as the model's own do.
            if n not in self.entries.counters
        }
        return {"own": personal, "alpha": self.alpha}

    def local_parameters(self) -> Tensors:
        """Return the share of the personal model.

        That model itself has no place in a purely global one.
        """
        return {"alpha": torch.tensor(self.alpha)}

    def load_local_parameters(self, arrays: Tensors) -> None:
        """From now on predict with the shared model alone."""
        self._mixed = False

    # --- training

    def begin(self, task: TaskData, round: Round) -> None:
        """Return an optimizer for either model."""
        super().begin(task, round)
        self._own_optimizer = make_optimizer(
            self.train, self._own_part("body."), self._own_part("head.")
        )
        self._alpha_gradient = None
        # Alpha moves once a round, at its first batch.
        self._first = True

    def _own_part(self, prefix: str) -> Iterator[nn.Parameter]:
        return (
            parameter
            for name, parameter in self._own.items()
            if name.startswith(prefix)
        )

    def mixture(self) -> Tensors:
        """Parameters of the mixture, alpha v + (1 - alpha) w."""
        shared = self.trainable
        return {
            name: torch.lerp(shared[name].detach(), personal.detach(), self.alpha)
            for name, personal in self._own.items()
        }

    def gradient(self, batch: Batch) -> tuple[float, int]:
        """Gradients of the shared model, and of the personal one at the mixture."""
        super().gradient(batch)
        # Leaves of their own: the gradient at the mixture must not flow into either model.
        mixture = {
            name: value.requires_grad_() for name, value in self.mixture().items()
        }
        with self.autocast():
            logits = functional_call(
                self.model, mixture | self._own_buffers, (batch.x,)
            )
        z = batch.head.logits(widen(logits))
        loss = F.cross_entropy(z, batch.y)
        parts = torch.autograd.grad(
            loss, list(mixture.values()), allow_unused=True
        )
        gradients = {
            name: g
            for name, g in zip(mixture, parts, strict=True)
            if g is not None
        }
        if self._first:
            self._alpha_gradient = sum(
                float(
                    ((self._own[name] - self.trainable[name]).detach() * g).sum()
                )
                for name, g in gradients.items()
            )
            self._first = False
        for name, personal in self._own.items():
            # The chain rule: the mixture holds alpha times the personal model.
            personal.grad = (
                self.alpha * gradients[name] if name in gradients else None
            )
        return loss.item(), hits(z, batch.y)

    def step(self) -> None:
        """Move both models, and in the first step of a round the share."""
        super().step()
        if self.train.clip_norm:
            nn.utils.clip_grad_norm_(self._own.values(), self.train.clip_norm)
        self._own_optimizer.step()
        if self._alpha_gradient is not None and self.settings.adaptive:
            moved = (
                self.alpha
                - (self.settings.alpha_lr or self.train.lr) * self._alpha_gradient
            )
            # A share outside of 0 to 1 would be no mixture any more.
            self.alpha = min(1.0, max(0.0, moved))
        self._alpha_gradient = None

    def counts(self) -> dict[str, float]:
        """``alpha``: the share of the personal model."""
        return {"alpha": self.alpha}

    def end_task(self, task: TaskData, round: Round) -> dict[str, float]:
        """End a task (:meth:`Learner.end_task`); the personal model is kept."""
        super().end_task(task, round)
        return {"knowledge-bytes": float(tensor_bytes(self.own_state()["own"]))}

    # --- scoring

    def predictors(self, count: int) -> list[Predictor]:
        """Return the mixture, or the shared model alone, for every task."""
        if not self._mixed:
            return [self.model] * count
        return [partial(self._answer, self.mixture() | self._own_buffers)] * count

    def _answer(self, weights: Tensors, x: Tensor) -> Tensor:
        return cast(Tensor, functional_call(self.model, weights, (x,)))
