"""What a body's operations allow, found once when it first meets data."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedknow.client.learners.fedknow.flat import free_parameters
from fedknow.client.learners.fedknow.linearization import (
    Linearization,
    factorable,
)
from fedknow.client.learners.frames.extra_work import once_for_all
from fedknow.client.learners.frames.gradient_buffer import GradientBuffer

log = logging.getLogger(__name__)

__all__ = ["BodyTraits"]


class BodyTraits:
    """Which gradients of a body are short, and if it is pushed forward.

    Both are properties of the model alone. So clients that share a learner do not influence
    each other, and none of them is charged with finding out.

    Parameters
    ----------
    body : nn.Module
        The body in training.
    scratch : nn.Module
        A copy of it to try; it is put in evaluation mode.
    precision : str
        ``train.precision``.

    Attributes
    ----------
    factored : frozenset of Parameter
        Weights whose gradients are kept as coordinates
        (:class:`~fedknow.client.learners.fedknow.linearization.Linearization`).
    """

    def __init__(
        self,
        body: nn.Module,
        scratch: nn.Module,
        precision: str,
    ) -> None:
        self._body = body
        self._scratch = scratch
        # The relative error of <c, J g> that rounding explains.
        self._tolerance = 1e-3 if precision == "fp32" else 5e-2
        self._is_traced = False
        self._can_push_forward: bool | None = None
        self.factored: frozenset[nn.Parameter] = frozenset()

    def trace(self, x: Tensor) -> None:
        """Find the weights to factor, unless that is done.

        Parameters
        ----------
        x : Tensor
            A few samples, float [n, C, H, W].
        """
        if self._is_traced:
            return
        self._is_traced = True
        with once_for_all():
            factors = factorable(self._scratch, x)
        pairs = zip(
            free_parameters(self._body),
            free_parameters(self._scratch),
            strict=True,
        )
        self.factored = frozenset(
            parameter for parameter, copied in pairs if copied in factors
        )

    @property
    def may_push_forward(self) -> bool:
        """Whether the body can be pushed forward, as far as is known yet."""
        return self._can_push_forward is not False

    def can_push_forward(
        self,
        at_body: Linearization,
        make_cotangent: Callable[[], Tensor],
        buffer: GradientBuffer,
    ) -> bool:
        """Find out whether the body's operations can be differentiated twice.

        With g = J^T c, ``<c, J g> = <g, g>`` holds for any c.

        Parameters
        ----------
        at_body : Linearization
            The body at a batch.
        make_cotangent : callable
            Gives c, float [n, f]; only called if the answer is not known yet.
        buffer : GradientBuffer
            Its current gradient is overwritten.
        """
        if self._can_push_forward is None:
            with once_for_all():
                fault = self._fault(at_body, make_cotangent(), buffer)
            if fault is None:
                return True  # a batch whose gradient vanishes decides nothing
            self._can_push_forward = not fault
            if fault:
                log.warning(
                    "all restored gradients will be computed, "
                    "as this body's cannot be asked for: %s",
                    fault,
                )
        return self._can_push_forward

    def _fault(
        self,
        at_body: Linearization,
        cotangent: Tensor,
        buffer: GradientBuffer,
    ) -> str | None:
        """Describe the fault of J g; "" for none, None if that stays open."""
        buffer.lay_out(0, at_body.size, at_body.parameters[0])
        g = at_body.pullback(cotangent, buffer.current, forward=True)
        square = torch.dot(g, g).item()
        if not 0 < square < math.inf:
            return None
        try:
            product = (cotangent * at_body.pushforward(g)).sum().item()
        # PyTorch's error for an operation that has no second derivative.
        except RuntimeError as error:
            return str(error).splitlines()[0]
        if abs(product - square) <= self._tolerance * square:
            return ""
        return f"<c, J g> = {product:g} where <J^T c, g> = {square:g}"
