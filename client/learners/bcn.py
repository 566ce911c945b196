"""BCN: a game between generalisation and forgetting.

Its name is balanced continual learning.

Raghavan and Balaprakash, "Formalizing the Generalization-Forgetting Trade-off in Continual
Learning", NeurIPS 2021, arXiv 2109.14035. Called BCL there and BCN in FedKNOW's comparison. The
cost of a task has three parts,

    H(theta) = beta J(theta) + [J(theta_B) - J(theta)] + [J(theta; x') - J(theta)],

J being the mean loss over new and remembered samples together (b_PN in their Algorithm 1).
Player 1 moves the samples to x' by zeta steps of gradient *ascent*: what the model does not
generalise to. Player 2 moves the weights to theta_B by zeta steps of gradient *descent*: what
there is to regain by remembering better. The weights then step along dH/dtheta, and the game is
balanced where neither player can gain.

How sure this is. Theory and roles are the paper's, Algorithm 1; the equation is stated from
memory, hence without its number. Step sizes and zeta are settings, for what is known of them
comes from the authors' published code. There theta_B lives on a copy of the model, so that its
term has no gradient at all and the second player no influence. Here the gradient of J(theta_B)
is taken to first order, d theta_B / d theta = 1, as first-order meta-learning does: it is the
gradient of J at theta_B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from fedknow.client.data.stream import TaskData
from fedknow.client.learners.frames.learner import (
    Batch,
    Round,
    Tensors,
    hits,
    widen,
)
from fedknow.client.learners.frames.rehearsal import (
    MemorySettings,
    Rehearsal,
    Replay,
)
from fedknow.protocols.config import TrainConfig

__all__ = ["Bcn", "BcnSettings"]


class BcnSettings(MemorySettings):
    """Settings of :class:`Bcn`."""

    beta: float = Field(2.0, ge=0)
    """Weight of J(theta). At 2 the two players' gradients alone are left, at equal weight; as it
    grows the game fades and plain experience replay is left."""
    zeta: int = Field(2, ge=1, le=1_000)
    """Steps that each player takes before each step of the weights."""
    epsilon: float = Field(0.01, gt=0)
    """Length of player 1's step, for each sample, in units of the normalised image."""
    theta_lr: float = Field(1e-3, gt=0)
    """Learning rate of player 2's plain gradient descent."""


class Bcn(Rehearsal):
    """A player against generalisation and one for memory (NeurIPS 2021).

    Raghavan and Balaprakash.

    Keeps: its samples of each task (setting ``memory``). Sends: what ``exchange`` says, nothing
    more. Needs: 2 zeta + 3 passes forward and backward over a batch and as many remembered
    samples for each step, where plain training needs one over the batch. The first task, where
    nothing can be forgotten, is trained plainly. Valid: samples other than tokens, any model,
    task- or class-incremental; its passes move BatchNorm's statistics each time, which the
    paper does not consider.
    """

    Settings = BcnSettings
    settings: BcnSettings
    # Player 1 moves samples along gradients, which token ids do not have.
    kinds = ("image", "series", "waveform", "table")
    search: ClassVar[Mapping[str, Sequence[float | str]]] = {
        "memory": [0.1, 0.25, 0.5],
        "beta": [2.0, 3.0, 5.0],
        "epsilon": [0.01, 0.1, 1.0],
    }

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        settings: BcnSettings,
    ) -> None:
        super().__init__(model, train, settings)
        self._parameters = self.trainable
        self._steps, self._ascent, self._descent = (
            0,
            0.0,
            0.0,
        )

    def begin(self, task: TaskData, round: Round) -> None:
        """Start counting."""
        super().begin(task, round)
        self._steps, self._ascent, self._descent = (
            0,
            0.0,
            0.0,
        )

    def counts(self) -> dict[str, float]:
        """``ascent``, ``descent``: what the players gained, mean over steps.

        They are J(theta; x') - J(theta) and J(theta) - J(theta_B).
        """
        steps = max(1, self._steps)
        return {
            "ascent": self._ascent / steps,
            "descent": self._descent / steps,
        }

    def gradient(self, batch: Batch) -> tuple[float, int]:
        """dH/dtheta over the batch and as many remembered samples."""
        if self.past is None:
            return super().gradient(batch)
        joint = self.join(batch, self.draw(self.past, len(batch.y)))
        worse_samples = self._worse_samples(joint)
        better_weights = self._better_weights(joint)
        weights: Tensors = dict(self._parameters)
        z = self._logits(weights, joint.x)
        cost = joint.loss(z)
        cost_worse = joint.loss(self._logits(weights, worse_samples))
        cost_better = joint.loss(self._logits(better_weights, joint.x))
        # -2, as J(theta) is taken away once in each of the two players' terms.
        direct = self._gradients(
            (self.settings.beta - 2) * cost + cost_worse,
            weights,
        )
        for parameter, a, b in zip(
            weights.values(),
            direct,
            self._gradients(cost_better, better_weights),
            strict=True,
        ):
            parameter.grad = None if a is None or b is None else a + b
        self._steps += 1
        self._ascent += (cost_worse - cost).item()
        self._descent += (cost - cost_better).item()
        z = z.detach()[: len(batch.y)]
        # The loss of the batch alone, as other learners report it.
        truth = batch.head.names(batch.y)
        own_loss = Replay(batch.x, truth, joint.head[: len(truth)]).loss(z)
        return own_loss.item(), hits(batch.head.logits(z), batch.y)

    def _worse_samples(self, joint: Replay) -> Tensor:
        """Move samples up their loss: x', float [n, ...].

        Each takes zeta steps of length epsilon.
        """
        x = joint.x
        weights = {name: p.detach() for name, p in self._parameters.items()}
        for _ in range(self.settings.zeta):
            # Detached: each step is a gradient at one place, not through the steps before it.
            x = x.detach().requires_grad_()
            (uphill,) = torch.autograd.grad(
                joint.loss(self._logits(weights, x)), [x]
            )
            # A sample whose loss is flat has a gradient of zero, and stays where it is.
            length = (
                uphill.flatten(1).norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
            )
            each = length.view(-1, *[1] * (x.dim() - 1))
            x = x + self.settings.epsilon * uphill / each
        return x.detach()

    def _better_weights(self, joint: Replay) -> Tensors:
        """theta_B: the weights after zeta plain gradient steps down the loss."""
        # Copies, as the steps of this player must not move the model.
        weights = {
            name: p.detach().clone() for name, p in self._parameters.items()
        }
        for _ in range(self.settings.zeta):
            weights = {name: w.requires_grad_() for name, w in weights.items()}
            downhill = self._gradients(
                joint.loss(self._logits(weights, joint.x)),
                weights,
            )
            pairs = zip(weights.items(), downhill, strict=True)
            weights = {
                name: w.detach()
                if g is None
                else w.detach() - self.settings.theta_lr * g
                for (name, w), g in pairs
            }
        return {name: w.requires_grad_() for name, w in weights.items()}

    def _logits(self, weights: Tensors, x: Tensor) -> Tensor:
        with self.autocast():
            return widen(functional_call(self.model, weights, (x,)))

    def _gradients(self, cost: Tensor, weights: Tensors) -> list[Tensor | None]:
        """Gradient by each weight, None where it takes no part."""
        return list(
            torch.autograd.grad(
                cost,
                list(weights.values()),
                allow_unused=True,
            )
        )
