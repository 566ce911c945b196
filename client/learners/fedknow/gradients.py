"""The current gradient of one batch, computed as it is needed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedknow.client.learners.fedknow.flat import (
    flatten_present,
    free_parameters,
    set_gradients,
)
from fedknow.client.learners.fedknow.linearization import Linearization
from fedknow.client.learners.fedknow.restored import RestoredGradients
from fedknow.client.learners.fedknow.traits import BodyTraits
from fedknow.client.learners.frames.gradient_buffer import GradientBuffer
from fedknow.client.learners.frames.learner import Autocast, Batch, hits, widen
from fedknow.client.learners.frames.projection import Vector

__all__ = [
    "CurrentGradient",
    "PartOfBatch",
    "Student",
    "WholeBatch",
    "current_gradient",
]

Report = tuple[float, int]
"""Mean loss of a batch, and how many samples were classified rightly."""


@dataclass(frozen=True)
class Student:
    """The model in training, and what its gradients are computed with.

    Attributes
    ----------
    body : nn.Module
        Images to features [n, f].
    head : nn.Linear
        Features to logits [n, classes].
    autocast : callable
        Makes the context of a forward pass.
    traits : BodyTraits
        What the body's operations allow.
    buffer : GradientBuffer
        Where flat gradients are written.
    """

    body: nn.Module
    head: nn.Linear
    autocast: Autocast
    traits: BodyTraits
    buffer: GradientBuffer


class CurrentGradient(ABC):
    """g, the gradient by the body of the current task's loss at one batch.

    Attributes
    ----------
    student : Student
        The model.
    at_body : Linearization
        The body at the samples that gradients are restored from.
    logits : Tensor
        The model's logits of these, float [n, classes], without a graph.
    index : Tensor
        Their places in the task, int64 [n].
    pullbacks : int
        Backward passes so far, for the gradient and to choose signature tasks.
    """

    student: Student
    at_body: Linearization
    logits: Tensor
    index: Tensor
    pullbacks: int

    def __init__(self) -> None:
        self._is_forward = False
        # Whether g itself lies in the buffer, without a margin.
        self._is_alone = False

    @property
    @abstractmethod
    def report(self) -> Report:
        """Mean loss of the batch, and how many samples were classified rightly."""

    @abstractmethod
    def alone(self) -> Tensor:
        """Compute g, float [size], where the signature tasks are yet to be chosen."""

    @abstractmethod
    def with_margin(self, restored: RestoredGradients, margin: float) -> Tensor:
        """Compute ``g + margin * sum_i g_i``, float [size]."""

    @abstractmethod
    def put(self, gradient: Tensor) -> None:
        """Leave a gradient, float [size], in the body's parameters."""

    @abstractmethod
    def _direction(self, restored: RestoredGradients) -> Tensor:
        """Give the cotangent whose pullback prepares for products, float [n, f]."""

    def can_push_forward(self, restored: RestoredGradients) -> bool:
        """Whether a vector can be multiplied by all restored gradients."""
        return self.student.traits.can_push_forward(
            self.at_body, lambda: self._direction(restored), self.student.buffer
        )

    def lay_out(self, count: int) -> None:
        """Make room in the buffer for g and ``count`` restored gradients."""
        at_body = self.at_body
        self.student.buffer.lay_out(count, at_body.size, at_body.parameters[0])

    def prepare(self, restored: RestoredGradients, is_forward: bool) -> None:
        """Prepare to compute it in the buffer's current place.

        Parameters
        ----------
        restored : RestoredGradients
            Those that it is compared with.
        is_forward : bool
            Whether :meth:`RestoredGradients.products` will be asked for.
        """
        self._is_forward = is_forward
        self.student.buffer.use_current()

    def _add_margin(self, restored: RestoredGradients, margin: float) -> Tensor:
        """Add ``margin * sum_i g_i`` to g by a backward pass of its own."""
        g = self.student.buffer.current
        if margin:
            g.add_(restored.combine(np.ones(len(restored))), alpha=margin)
            self.pullbacks += 1
        return g


def current_gradient(
    student: Student,
    batch: Batch,
    share: float,
    train_plainly: Callable[[Batch], Report],
) -> CurrentGradient:
    """Take the current gradient of a batch.

    Parameters
    ----------
    student : Student
        The model.
    batch : Batch
        Samples of one step.
    share : float
        How many of the samples to restore gradients from, in (0, 1].
    train_plainly : callable
        Leaves the plain gradients of a batch in the parameters.
    """
    # A forward pass of its own for the part, whose price only a smaller share wins back.
    if share < 1:
        return PartOfBatch(student, batch, share, train_plainly)
    return WholeBatch(student, batch)


class WholeBatch(CurrentGradient):
    """g where gradients are restored from all samples of the batch.

    One forward pass serves all: with c the gradient by the features, g = J^T c. The head's
    gradient is left in its parameters at once.

    Parameters
    ----------
    student : Student
        The model.
    batch : Batch
        Samples of one step.
    """

    def __init__(self, student: Student, batch: Batch) -> None:
        super().__init__()
        self.student = student
        self.index = batch.index
        self.pullbacks = 0
        self.at_body = Linearization(
            student.body, batch.x, student.autocast(), student.traits.factored
        )
        features = self.at_body.features.requires_grad_()
        with student.autocast():
            logits = widen(student.head(features))
        self._z = batch.head.logits(logits)
        self._y = batch.y
        self._loss = F.cross_entropy(self._z, batch.y)
        of_head = free_parameters(student.head)
        # Stops at the features: the body's backward pass waits until it is known what to pull
        # back.
        self._cotangent, *gradients = torch.autograd.grad(
            self._loss, [features, *of_head]
        )
        # The head's gradient is never turned: its rows belong to one task each.
        for parameter, gradient in zip(of_head, gradients, strict=True):
            parameter.grad = gradient
        # Restored gradients start from numbers: their own graph begins at the features.
        self.logits = logits.detach()

    @property
    def report(self) -> Report:
        """See :attr:`CurrentGradient.report`."""
        return self._loss.item(), hits(self._z, self._y)

    def alone(self) -> Tensor:
        """See :meth:`CurrentGradient.alone`."""
        self._is_alone = True
        return self._pull(self._cotangent)

    def with_margin(self, restored: RestoredGradients, margin: float) -> Tensor:
        """See :meth:`CurrentGradient.with_margin`."""
        if self._is_alone:
            return self._add_margin(restored, margin)
        # J^T is linear, so the sum is pulled back at the price of g alone.
        if margin:
            return self._pull(self._cotangent + restored.cotangent(margin))
        return self._pull(self._cotangent)

    def turn(self, restored: RestoredGradients, weights: Vector) -> Tensor:
        """Compute ``g + sum_i w_i g_i``, float [size], from w, float64 [k]."""
        self.pullbacks += 1
        return restored.turn(
            self._cotangent, weights, self.student.buffer.current
        )

    def put(self, gradient: Tensor) -> None:
        """See :meth:`CurrentGradient.put`."""
        parts = self.at_body.expand(gradient)
        set_gradients(self.at_body.parameters, parts, self.at_body.reached)

    def _direction(self, restored: RestoredGradients) -> Tensor:
        return self._cotangent

    def _pull(self, cotangent: Tensor) -> Tensor:
        self.pullbacks += 1
        return self.at_body.pullback(
            cotangent, self.student.buffer.current, forward=self._is_forward
        )


class PartOfBatch(CurrentGradient):
    """g where gradients are restored from the first samples of the batch.

    g itself comes from plain training on the whole batch. The body is at the part, so g is no
    pullback of it. What is pulled back is the sum of the restored gradients.

    Parameters
    ----------
    student : Student
        The model.
    batch : Batch
        Samples of one step.
    share : float
        How many of them to restore from, in (0, 1).
    train_plainly : callable
        Leaves the plain gradients of a batch in the parameters.
    """

    def __init__(
        self,
        student: Student,
        batch: Batch,
        share: float,
        train_plainly: Callable[[Batch], Report],
    ) -> None:
        super().__init__()
        self.student = student
        self._report = train_plainly(batch)
        parameters = free_parameters(student.body)
        self._plain, self._reached = flatten_present(
            [parameter.grad for parameter in parameters], parameters
        )
        # Rounded up, so that the part is never empty.
        count = math.ceil(share * len(batch.y))
        self.index = batch.index[:count]
        # Nothing is factored: coordinates in the span of the part's inputs cannot hold g.
        self.at_body = Linearization(
            student.body, batch.x[:count], student.autocast()
        )
        with student.autocast(), torch.no_grad():
            self.logits = widen(student.head(self.at_body.features))
        # The plain gradient's; the pass that only prepares for products is not counted.
        self.pullbacks = 1

    @property
    def report(self) -> Report:
        """See :attr:`CurrentGradient.report`."""
        return self._report

    def prepare(self, restored: RestoredGradients, is_forward: bool) -> None:
        """See :meth:`CurrentGradient.prepare`."""
        self._total = restored.cotangent()
        super().prepare(restored, is_forward)

    def alone(self) -> Tensor:
        """See :meth:`CurrentGradient.alone`."""
        self._is_alone = True
        g = self.student.buffer.current
        if self._is_forward:
            # The result is not used: the pass prepares for products of the restored gradients.
            self.at_body.pullback(self._total, g, forward=True)
        return g.copy_(self._plain)

    def with_margin(self, restored: RestoredGradients, margin: float) -> Tensor:
        """See :meth:`CurrentGradient.with_margin`."""
        if not self._is_alone and not self._is_forward:
            self.alone()
        if self._is_alone:
            return self._add_margin(restored, margin)
        # The pass that prepares for products gives the sum of the restored gradients as well.
        g = self.at_body.pullback(
            self._total, self.student.buffer.current, forward=True
        )
        return (
            g.mul_(margin).add_(self._plain) if margin else g.copy_(self._plain)
        )

    def put(self, gradient: Tensor) -> None:
        """See :meth:`CurrentGradient.put`."""
        # Not needed any more, and freed before memory is taken for the parts.
        del self._total
        parts = self.at_body.expand(gradient)
        set_gradients(self.at_body.parameters, parts, self._reached)

    def _direction(self, restored: RestoredGradients) -> Tensor:
        return restored.cotangent()
