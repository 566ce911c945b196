"""Restored gradients, computed as far as they are needed.

FedKNOW (ICDE 2023), Sec. III-C. At the features, where all restored gradients begin, they are
cheap. A backward pass brings one of them to the weights. One product with the Jacobian tells how
a step changes the loss of every past task
(:mod:`fedknow.client.learners.fedknow.linearization`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from fedknow.client.learners.fedknow.linearization import Linearization
from fedknow.client.learners.frames.extra_work import on_demand
from fedknow.client.learners.frames.gradient_buffer import GradientBuffer
from fedknow.client.learners.frames.projection import Vector

__all__ = ["RestoredGradients"]

TASKS = 16
"""Past tasks whose gradients at the features are multiplied at once."""


class RestoredGradients:
    """The restored gradients g_i of one batch, the rows of G.

    Parameters
    ----------
    at_body : Linearization
        The body at the batch.
    at_logits : Tensor
        Gradients of the restored losses by the logits, p_i: float [k, B, classes], zero outside
        a task's classes.
    head : Tensor
        The head's weight W, float [classes, f]: at the features a gradient is ``c_i = p_i W``.
    tasks : list of int
        The k past tasks.
    buffer : GradientBuffer
        Memory for the gradients.
    """

    def __init__(
        self,
        at_body: Linearization,
        at_logits: Tensor,
        head: Tensor,
        tasks: list[int],
        buffer: GradientBuffer,
    ) -> None:
        self.at_body = at_body
        self.tasks = tasks
        self._at_logits = at_logits
        self._head = head
        self._buffer = buffer
        self._built = 0
        self._cotangent = at_logits.new_zeros(0)

    def __len__(self) -> int:
        return len(self.tasks)

    def select(self, places: Sequence[int]) -> RestoredGradients:
        """Keep the gradients at some places among the tasks."""
        return RestoredGradients(
            self.at_body,
            self._at_logits[places],
            self._head,
            [self.tasks[place] for place in places],
            self._buffer,
        )

    def cotangent(self, weight: float = 1.0) -> Tensor:
        """Give ``weight * sum_i c_i``, float [B, f]."""
        total = self._at_logits.sum(0)
        if weight != 1:
            # Scaled at the logits, which are fewer than the features.
            total = weight * total
        return total @ self._head

    def one_by_one(self) -> Iterator[Tensor]:
        """Give each g_i in full length, float [p].

        Only one is in memory at a time.
        """
        return map(self._full_length, self._at_logits @ self._head)

    def _full_length(self, cotangent: Tensor) -> Tensor:
        """Pull one cotangent, float [B, f], back to float [p]."""
        with on_demand("candidate", cotangent.shape):
            row = self.at_body.pullback(cotangent, self._buffer.restored[0])
            return self.at_body.full_length(row)

    def build(self, places: Iterable[int]) -> Tensor:
        """Compute some gradients.

        Parameters
        ----------
        places : iterable of int
            Their places among the tasks. None is asked for twice.

        Returns
        -------
        Tensor
            All gradients built so far, float [m, size], in the order of the requests.
        """
        for place in places:
            row = self._buffer.use_restored(self._built)
            with self._on_demand("pullback"):
                self.at_body.pullback(self._at_logits[place] @ self._head, row)
            self._built += 1
        return self._buffer.restored[: self._built]

    def combine(self, weights: Vector, is_again: bool = False) -> Tensor:
        """Compute ``sum_i w_i g_i`` by one backward pass.

        Parameters
        ----------
        weights : ndarray
            w, float64 [k].
        is_again : bool
            Whether the place has been charged already, and its content is not needed any more.

        Returns
        -------
        Tensor
            Float [size], in the buffer's first place.
        """
        place = self._buffer.restored[0]
        row = place if is_again else self._buffer.use_restored(0)
        with self._on_demand("combine"):
            combined = self._combined(weights)
            return self.at_body.pullback(combined @ self._head, row)

    def turn(self, cotangent: Tensor, weights: Vector, out: Tensor) -> Tensor:
        """Compute ``g + sum_i w_i g_i`` by one backward pass.

        Afterwards :meth:`products` can be asked for.

        Parameters
        ----------
        cotangent : Tensor
            That of g at the features, float [B, f].
        weights : ndarray
            w, float64 [k].
        out : Tensor
            Where to write, float [size].
        """
        with self._on_demand("turn"):
            combined = self._combined(weights)
            # Kept for lengths(), which needs its norm.
            self._cotangent = cotangent + combined @ self._head
            return self.at_body.pullback(self._cotangent, out, forward=True)

    def products(self, u: Tensor) -> tuple[Vector, Vector]:
        """Multiply all restored gradients by one vector.

        Parameters
        ----------
        u : Tensor
            Float [size].

        Returns
        -------
        products : ndarray
            ``<g_i, u> = <p_i, J u W^T>``, float64 [k].
        sizes : ndarray
            ``|p_i| |J u W^T|``, float64 [k].
        """
        with self._on_demand("products"):
            moved = (self.at_body.pushforward(u) @ self._head.T).flatten()
            p = self._at_logits.flatten(1)
            return _to_numpy(p @ moved), _to_numpy(p.norm(dim=1) * moved.norm())

    def lengths(self, result: Tensor | None = None) -> Vector:
        """Estimate ``|g_i|`` up to a common factor by ``|c_i|``: float64 [k].

        The two differ by what the body does. With the result of :meth:`turn`, the factor is
        taken from how much longer it is than its cotangent.
        """
        with self._on_demand("lengths"):
            squares = (
                (self._at_logits @ (self._head @ self._head.T))
                .mul_(self._at_logits)
                .flatten(1)
                .sum(1)
            )
            # Rounding may leave the square of a vanishing gradient below zero.
            lengths = squares.clamp_min(0).sqrt()
            if result is not None:
                lengths = (
                    lengths
                    * result.norm()
                    / self._cotangent.norm().clamp_min(1e-30)
                )
            return _to_numpy(lengths)

    def gram(self) -> Vector:
        """Multiply all pairs at the features: ``<c_i, c_j>``, float64 [k, k].

        What the body does to them is left out.
        """
        with self._on_demand("gram"):
            p, between = self._at_logits, self._head @ self._head.T
            flat = p.flatten(1).T
            # Some at a time, so that the memory for it does not grow with the tasks.
            parts = [
                (part @ between).flatten(1) @ flat
                for part in torch.split(p, TASKS)
            ]
            gram = _to_numpy(torch.cat(parts))
            # To the last bit, as the dual's solution supposes.
            return (gram + gram.T) / 2

    def _combined(self, weights: Vector) -> Tensor:
        """Give ``sum_i w_i p_i``, float [B, classes]."""
        w = torch.from_numpy(weights).to(self._at_logits)
        combined: Tensor = torch.tensordot(w, self._at_logits, 1)
        return combined

    def _on_demand(self, name: str) -> AbstractContextManager[None]:
        # All of it costs by the number of tasks, samples and classes.
        return on_demand(name, self._at_logits.shape)


def _to_numpy(x: Tensor) -> Vector:
    # In double, as the dual is solved in it.
    numbers: Vector = x.double().cpu().numpy()
    return numbers
