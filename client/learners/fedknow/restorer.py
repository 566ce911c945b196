"""Gradient restorer: what past tasks' knowledge asks of a batch, computed as far as it is wanted.

FedKNOW (ICDE 2023), Sec. III-C: g_i is the gradient that would keep the model's answers for
past task i as its knowledge has them. At the features, where all of them begin, these gradients
are cheap; each is brought to the weights by a backward pass, and one product with the Jacobian
tells how a step changes what all tasks ask
(:mod:`fedknow.client.learners.fedknow.linearization`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn import functional as F

from fedknow.client.compute.cost import Meter
from fedknow.client.learners.fedknow.linearization import Linearization
from fedknow.client.learners.fedknow.settings import FedKnowSettings
from fedknow.client.learners.frames.projection import Vector

__all__ = ["Restorer", "restored_cotangent", "soft_labels"]


def restored_cotangent(z: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Gradient, by the logits, of the loss that a past task's knowledge puts on a batch.

    For ``l = -1/B sum_b sum_c target log softmax(z / T)`` it is ``(softmax(z / T) - target) /
    (T B)``.

    Parameters
    ----------
    z : Tensor
        The model's logits of the past task's classes, float [B, c].
    target : Tensor
        What the knowledge says, float [B, c]
        (:func:`~fedknow.client.learners.fedknow.restorer.soft_labels`).
    temperature : float
        T.
    """
    return ((z / temperature).softmax(1) - target) / (temperature * len(z))


def soft_labels(logits: Tensor, settings: FedKnowSettings) -> Tensor:
    """What knowledge says of samples, as a distribution: logits float [n, c] -> probabilities [n, c]."""
    if settings.labels == "hard":
        return F.one_hot(logits.argmax(1), logits.shape[1]).to(logits)
    return (logits / settings.temperature).softmax(1)


class Restorer:
    """Restored gradients of one batch.

    Parameters
    ----------
    at_body : Linearization
        The body at the batch.
    at_logits : Tensor
        Gradients of the restored losses by the logits, p_i: float [k, B, classes], zero outside
        a task's classes.
    head : Tensor
        The head's weight W, float [classes, f]: at the features a gradient is ``c_i = p_i W``.
    rows : Tensor
        Memory for the gradients, float [k, size] or more; what is not written to is not taken up.
    meter : Meter
        Told what is computed.
    """

    def __init__(
        self,
        at_body: Linearization,
        at_logits: Tensor,
        head: Tensor,
        rows: Tensor,
        meter: Meter,
    ) -> None:
        self._at_body = at_body
        self._at_logits = at_logits
        self._head = head
        self._rows = rows
        self._meter = meter
        self._built = 0
        self._turned = at_logits.new_zeros(0)

    def build(self, tasks: Sequence[int]) -> Tensor:
        """The gradients built so far, float [m, size], in the order in which they were asked for."""
        for task in tasks:
            row = self._rows[self._built]
            self._meter.add(memory=row.nbytes)
            with self._part("pullback"):
                self._at_body.pullback(self._at_logits[task] @ self._head, row)
            self._built += 1
        return self._rows[: self._built]

    def combine(self, weights: Vector) -> Tensor:
        """``sum_i w_i g_i`` by one backward pass: float64 [k] to float [size]."""
        self._meter.add(memory=self._rows[0].nbytes)
        with self._part("combine"):
            combined = torch.tensordot(
                torch.from_numpy(weights).to(self._at_logits), self._at_logits, 1
            )
            return self._at_body.pullback(combined @ self._head, self._rows[0])

    def turn(self, cotangent: Tensor, weights: Vector, out: Tensor) -> Tensor:
        """``g + sum_i w_i g_i`` by one backward pass, from g's own cotangent at the features,
        float [B, f].

        Afterwards :meth:`products` can be asked for.
        """
        with self._part("turn"):
            combined = torch.tensordot(
                torch.from_numpy(weights).to(self._at_logits), self._at_logits, 1
            )
            self._turned = cotangent + combined @ self._head
            return self._at_body.pullback(self._turned, out, forward=True)

    def products(self, u: Tensor) -> tuple[Vector, Vector]:
        """``<g_i, u>`` for u float [size], as ``<p_i, J u W^T>``, and ``|p_i| |J u W^T|``: float64
        [k] each."""
        with self._part("products"):
            moved = (self._at_body.pushforward(u) @ self._head.T).flatten()
            p = self._at_logits.flatten(1)
            return _numbers(p @ moved), _numbers(p.norm(dim=1) * moved.norm())

    def _part(self, what: str) -> AbstractContextManager[None]:
        return self._meter.part((what, self._at_logits.shape))

    def lengths(self, turned: Tensor | None = None) -> Vector:
        """``|c_i|``, from which a gradient's length differs by what the body does: float64 [k].

        With the result of :meth:`turn` they are made longer by as much as its cotangent was:
        estimates of ``|g_i|``.
        """
        with self._part("lengths"):
            squares = (
                (self._at_logits @ (self._head @ self._head.T))
                .mul_(self._at_logits)
                .flatten(1)
                .sum(1)
            )
            lengths = squares.clamp_min(0).sqrt()
            return _numbers(
                lengths
                if turned is None
                else lengths * turned.norm() / self._turned.norm().clamp_min(1e-30)
            )


def _numbers(x: Tensor) -> Vector:
    numbers: Vector = x.double().cpu().numpy()
    return numbers
