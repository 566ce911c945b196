"""Gradient integrator: turns the current gradient to hurt no past task.

FedKNOW (ICDE 2023), Sec. III-D and Eq. (3) to (5), which
:mod:`fedknow.client.learners.frames.projection` solves for gradients that are given. Here the
restored gradients are computed as far as they are needed, and there are approximations whose
price does not grow with the number of tasks. :func:`integrator_for` chooses one object for a
run:

- :class:`LazyQp`: exact; products first, then the restored gradients that they ask for;
- :class:`ExactQp`: exact, from all restored gradients;
- :class:`Surrogate`: an approximation that takes all violated constraints as one;
- :class:`OnlineDual`: an approximation that keeps its multipliers from batch to batch;
- :class:`Sum`: no constraints but the sum of all gradients, which is distillation;
- :class:`Off`: plain training.

The first four turn ``g + margin * sum_i g_i`` in place of g. So each multiplier of Eq. (4) is at
least ``margin``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, cast

import numpy as np
from torch import Tensor

from fedknow.client.compute import cost
from fedknow.client.learners.fedknow.gradients import CurrentGradient, WholeBatch
from fedknow.client.learners.fedknow.partial_duals import (
    integrate_lazily,
    integrate_surrogate,
    step_dual,
)
from fedknow.client.learners.fedknow.restored import RestoredGradients
from fedknow.client.learners.fedknow.settings import FedKnowSettings
from fedknow.client.learners.frames.projection import Integration, integrate

__all__ = [
    "ExactQp",
    "Integrator",
    "LazyQp",
    "Off",
    "OnlineDual",
    "Sum",
    "Surrogate",
    "integrator_for",
]


def integrator_for(settings: FedKnowSettings) -> Integrator:
    """Make the integrator that the settings ask for.

    Examples
    --------
    >>> type(integrator_for(FedKnowSettings(path="full"))).__name__
    'ExactQp'
    """
    match settings.integrator:
        case "qp" if settings.path == "full":
            return ExactQp(settings.margin)
        case "qp":
            return LazyQp(settings.margin)
        case "surrogate":
            return Surrogate(settings.margin)
        case "online":
            return OnlineDual(settings.margin)
        case "sum":
            return Sum()
        case "off":
            return Off()


class Integrator(ABC):
    """Turns the current gradient of a batch by the restored gradients.

    Parameters
    ----------
    margin : float
        The least that each multiplier may be.

    Attributes
    ----------
    uses_knowledge : bool
        Whether gradients of past tasks are restored at all.
    multipliers : dict
        By past task, those that a client keeps from batch to batch; empty for most integrators.
    """

    uses_knowledge: ClassVar[bool] = True

    def __init__(self, margin: float = 0.0) -> None:
        self._margin = margin
        self.multipliers: dict[int, float] = {}

    def state(self) -> dict[str, float]:
        """Give what a client keeps of it."""
        return {str(task): v for task, v in self.multipliers.items()}

    def load(self, state: Mapping[str, float]) -> None:
        """Become that of the client whose state this is."""
        self.multipliers = {int(task): float(v) for task, v in state.items()}

    @abstractmethod
    def prepare(
        self, gradient: CurrentGradient, restored: RestoredGradients, k: int
    ) -> Integrator:
        """Prepare a batch.

        Parameters
        ----------
        gradient : CurrentGradient
            g.
        restored : RestoredGradients
            g_i of all past tasks that signature tasks may be chosen from.
        k : int
            How many of these are chosen at most.

        Returns
        -------
        Integrator
            The one to integrate this batch with.
        """

    @abstractmethod
    def integrate(
        self, gradient: CurrentGradient, restored: RestoredGradients
    ) -> Integration:
        """Turn the current gradient.

        Parameters
        ----------
        gradient : CurrentGradient
            g.
        restored : RestoredGradients
            g_i of the signature tasks.

        Returns
        -------
        Integration
            With g', float [size].

        Raises
        ------
        FloatingPointError
            If a gradient is not finite.
        """


class _Solver(Integrator):
    """An integrator that computes g, and from it g'."""

    asks_products: ClassVar[bool] = False
    """Whether it multiplies a vector by all restored gradients before it computes them."""

    def prepare(
        self, gradient: CurrentGradient, restored: RestoredGradients, k: int
    ) -> Integrator:
        """See :meth:`Integrator.prepare`."""
        if self.asks_products and not _has_products(gradient, restored, k):
            return ExactQp(self._margin).prepare(gradient, restored, k)
        gradient.lay_out(min(len(restored), k))
        gradient.prepare(restored, self.asks_products)
        return self

    def integrate(
        self, gradient: CurrentGradient, restored: RestoredGradients
    ) -> Integration:
        """See :meth:`Integrator.integrate`."""
        g = gradient.with_margin(restored, self._margin)
        with cost.declared():
            result = self._solve(g, restored)
            # Memory of g' and of what was added to g.
            cost.add(result.flops, 2 * g.nbytes)
        return result

    @abstractmethod
    def _solve(self, g: Tensor, restored: RestoredGradients) -> Integration:
        """Turn g, float [size], which has the margin in it."""


class ExactQp(_Solver):
    """Solves Eq. (3) from all restored gradients."""

    def _solve(self, g: Tensor, restored: RestoredGradients) -> Integration:
        return integrate(g, restored.build(range(len(restored))))


class LazyQp(_Solver):
    """Solves Eq. (3) from the restored gradients that it needs.

    See :func:`~fedknow.client.learners.fedknow.partial_duals.integrate_lazily`.
    """

    asks_products = True

    def _solve(self, g: Tensor, restored: RestoredGradients) -> Integration:
        return integrate_lazily(
            g, len(restored), restored.build, restored.products
        )


class Surrogate(_Solver):
    """Takes all violated constraints of Eq. (3) as one, their weighted sum.

    See :func:`~fedknow.client.learners.fedknow.partial_duals.integrate_surrogate`.
    """

    asks_products = True

    def _solve(self, g: Tensor, restored: RestoredGradients) -> Integration:
        lengths = restored.lengths()
        products, _ = restored.products(g)
        return integrate_surrogate(g, lengths, products, restored.combine)


class Sum(_Solver):
    """Adds all restored gradients, as distillation does."""

    def _solve(self, g: Tensor, restored: RestoredGradients) -> Integration:
        multipliers = np.ones(len(restored))
        total = g + restored.combine(multipliers)
        # None of these is a multiplier of Eq. (4), and none is reported as active.
        return Integration(total, np.zeros(len(restored)), 0, built=1)


class Off(_Solver):
    """Leaves the gradient as it is."""

    uses_knowledge = False

    def _solve(self, g: Tensor, restored: RestoredGradients) -> Integration:
        return Integration(g, np.zeros(len(restored)), 0)


class OnlineDual(Integrator):
    """Keeps the multipliers of Eq. (4), and moves them one step a batch.

    One backward pass, of ``c + sum_i v_i c_i``, gives g'. One pushforward along it tells how v
    moves (:func:`~fedknow.client.learners.fedknow.partial_duals.step_dual`).
    """

    def prepare(
        self, gradient: CurrentGradient, restored: RestoredGradients, k: int
    ) -> Integrator:
        """See :meth:`Integrator.prepare`."""
        if not _has_products(gradient, restored, k):
            return ExactQp(self._margin).prepare(gradient, restored, k)
        # One place to choose signature tasks with; g' is written where g was.
        gradient.lay_out(1)
        return self

    def integrate(
        self, gradient: CurrentGradient, restored: RestoredGradients
    ) -> Integration:
        """See :meth:`Integrator.integrate`."""
        tasks = restored.tasks
        v = np.array([self.multipliers.get(task, 0.0) for task in tasks])
        # The model's check refuses this integrator for gradients of a part of a batch.
        result = cast(WholeBatch, gradient).turn(restored, v + self._margin)
        products, _ = restored.products(result)
        moved = step_dual(v, products, restored.lengths(result))
        self.multipliers |= dict(zip(tasks, moved.tolist(), strict=True))
        violated = int((products < 0).sum())
        return Integration(result, v, violated, built=0, multiplied=1)


def _has_products(
    gradient: CurrentGradient, restored: RestoredGradients, k: int
) -> bool:
    """Tell whether to ask for products with the restored gradients first."""
    # A single restored gradient is computed as fast as a product with it.
    return min(len(restored), k) > 1 and gradient.can_push_forward(restored)
