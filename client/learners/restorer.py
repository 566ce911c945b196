"""Gradient restorer: what past tasks' knowledge asks of a batch, computed as far as it is wanted.

FedKNOW (ICDE 2023), Sec. III-C: g_i is the gradient that would keep the model's answers for past task i as its
knowledge has them. At the features, where all of them begin, these gradients are cheap; each is brought to the weights
by a backward pass, and one product with the Jacobian tells how a step changes what all tasks ask
(:mod:`fedknow.client.learners.linearization`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedknow.client.learners.integrator import Vector
from fedknow.client.learners.linearization import Linearization

__all__ = ["Restorer", "restored_cotangent"]


def restored_cotangent(z: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Gradient, by the logits, of the loss that a past task's knowledge puts on a batch.

    For ``l = -1/B sum_b sum_c target log softmax(z / T)`` it is ``(softmax(z / T) - target) / (T B)``.

    Parameters
    ----------
    z : Tensor
        The model's logits of the past task's classes, float [B, c].
    target : Tensor
        What the knowledge says, float [B, c] (:func:`~fedknow.client.learners.fedknow.soft_labels`).
    temperature : float
        T.
    """
    return ((z / temperature).softmax(1) - target) / (temperature * len(z))


class Restorer:
    """Restored gradients of one batch.

    Parameters
    ----------
    at_body : Linearization
        The body at the batch.
    cotangents : Tensor
        Gradients of the restored losses by the features, float [k, B, f].
    rows : Tensor
        Memory for the gradients, float [k, p] or more; what is not written to is not taken up.
    """

    def __init__(self, at_body: Linearization, cotangents: Tensor, rows: Tensor) -> None:
        self._at_body = at_body
        self._cotangents = cotangents
        self._rows = rows
        self._built = 0
        self.lengths = cotangents.flatten(1).norm(dim=1)

    def __len__(self) -> int:
        return len(self._cotangents)

    def build(self, tasks: Sequence[int]) -> Tensor:
        """The gradients built so far, float [m, p], in the order in which they were asked for."""
        for task in tasks:
            self._at_body.pullback(self._cotangents[task], self._rows[self._built])
            self._built += 1
        return self._rows[: self._built]

    def products(self, u: Tensor) -> tuple[Vector, Vector]:
        """``<g_i, u>`` for u float [p], as ``<c_i, J u>``, and ``|c_i| |J u|``: float64 [k] each."""
        moved = self._at_body.pushforward(u)
        values = self._cotangents.flatten(1) @ moved.flatten()
        return values.double().cpu().numpy(), (self.lengths * moved.norm()).double().cpu().numpy()

    def combine(self, weights: Vector) -> Tensor:
        """``sum_i w_i g_i`` by one backward pass: float64 [k] to float [p]."""
        weights_ = torch.from_numpy(weights).to(self._cotangents)
        return self._at_body.pullback(torch.tensordot(weights_, self._cotangents, 1), self._rows[0])
