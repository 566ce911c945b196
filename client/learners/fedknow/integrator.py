"""Gradient integrator: turns the current gradient to hurt no past task.

FedKNOW (ICDE 2023), Sec. III-D and Eq. (3) to (5), which
:mod:`fedknow.client.learners.frames.projection` solves for gradients that are given. Here the
restored gradients are computed as far as they are needed, and there are approximations whose
price does not grow with the number of tasks. :func:`integrator_for` chooses one object for a
run:

- :class:`LazyQp`: exact; products first, then the restored gradients that they ask for;
- :class:`ExactQp`: exact, from all restored gradients;
- :class:`Surrogate`: an approximation that takes all violated constraints as one;
- :class:`Bounded`: an approximation that hurts no past task beyond a bound;
- :class:`OnlineDual`: an approximation that keeps its multipliers from batch to batch;
- :class:`Sum`: no constraints but the sum of all gradients, which is distillation;
- :class:`Off`: plain training.

The first five turn ``g + margin * sum_i g_i`` in place of g. So each multiplier of Eq. (4) is at
least ``margin``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from itertools import count
from typing import ClassVar, cast

import numpy as np
from torch import Tensor

from fedknow.client.learners.fedknow.bounded_dual import integrate_within
from fedknow.client.learners.fedknow.gradients import CurrentGradient, WholeBatch
from fedknow.client.learners.fedknow.partial_duals import (
    integrate_lazily,
    integrate_surrogate,
    step_dual,
)
from fedknow.client.learners.fedknow.restored import RestoredGradients
from fedknow.client.learners.fedknow.settings import FedKnowSettings
from fedknow.client.learners.frames.projection import (
    Integration,
    integrate,
    integrated,
)

__all__ = [
    "Bounded",
    "ExactQp",
    "Integrator",
    "LazyQp",
    "Off",
    "OnlineDual",
    "Sum",
    "Surrogate",
    "integrator_for",
]


ChooseTasks = Callable[[CurrentGradient, RestoredGradients], RestoredGradients]
"""g and g_i of the past tasks to the g_i of the signature tasks among them."""


def integrator_for(settings: FedKnowSettings) -> Integrator:
    """Make the integrator that the settings ask for.

    Examples
    --------
    >>> type(integrator_for(FedKnowSettings(path="full"))).__name__
    'ExactQp'
    """
    if settings.integrator == "bounded":
        return Bounded(settings.k, settings.margin, settings.tolerance)
    kinds: dict[str, type[Integrator]] = {
        "qp": ExactQp if settings.path == "full" else LazyQp,
        "surrogate": Surrogate,
        "online": OnlineDual,
        "sum": Sum,
        "off": Off,
    }
    return kinds[settings.integrator](settings.k, settings.margin)


class Integrator(ABC):
    """Turns the current gradient of a batch by the restored gradients.

    Parameters
    ----------
    k : int
        How many signature tasks are chosen at most.
    margin : float
        The least that each multiplier may be.

    Attributes
    ----------
    uses_knowledge : bool
        Whether gradients of past tasks are restored at all.
    asks_products : bool
        Whether it multiplies a vector by all restored gradients before it computes them.
    multipliers : dict
        By past task, those that a client keeps from batch to batch; empty for most integrators.
    """

    uses_knowledge: ClassVar[bool] = True
    asks_products: ClassVar[bool] = False

    def __init__(self, k: int, margin: float) -> None:
        self._k = k
        self._margin = margin
        self.multipliers: dict[int, float] = {}

    def state(self) -> dict[str, float]:
        """Give what a client keeps of it."""
        return {str(task): v for task, v in self.multipliers.items()}

    def load(self, state: Mapping[str, float]) -> None:
        """Become that of the client whose state this is."""
        self.multipliers = {int(task): float(v) for task, v in state.items()}

    def integrate(
        self,
        gradient: CurrentGradient,
        restored: RestoredGradients,
        choose: ChooseTasks,
    ) -> Integration:
        """Choose signature tasks, and turn the current gradient.

        Parameters
        ----------
        gradient : CurrentGradient
            g.
        restored : RestoredGradients
            g_i of all past tasks that signature tasks may be chosen from.
        choose : callable
            Chooses at most k of them.

        Returns
        -------
        Integration
            With g', float [size], and a multiplier for each signature task.

        Raises
        ------
        FloatingPointError
            If a gradient is not finite.
        """
        solver: Integrator = self
        if self.asks_products and not self._has_products(gradient, restored):
            # Without products all restored gradients are needed, and then Eq. (3) is solved.
            solver = ExactQp(self._k, self._margin)
        # Before the choice, which computes g and candidates in the memory laid out here.
        solver._lay_out(gradient, restored)
        return solver._turn(gradient, choose(gradient, restored))

    def _has_products(
        self, gradient: CurrentGradient, restored: RestoredGradients
    ) -> bool:
        # A single restored gradient is computed as fast as a product with it.
        has_many = min(len(restored), self._k) > 1
        return has_many and gradient.can_push_forward(restored)

    @abstractmethod
    def _lay_out(
        self, gradient: CurrentGradient, restored: RestoredGradients
    ) -> None:
        """Make room for the gradients that will be computed."""

    @abstractmethod
    def _turn(
        self, gradient: CurrentGradient, restored: RestoredGradients
    ) -> Integration:
        """Turn g by the restored gradients of the signature tasks."""


class _Solver(Integrator):
    """An integrator that computes g, and from it g'."""

    def _lay_out(
        self, gradient: CurrentGradient, restored: RestoredGradients
    ) -> None:
        gradient.lay_out(min(len(restored), self._k))
        gradient.prepare(restored, self.asks_products)

    def _turn(
        self, gradient: CurrentGradient, restored: RestoredGradients
    ) -> Integration:
        g = gradient.with_margin(restored, self._margin)
        # g' and what was added to g.
        return integrated(lambda: self._solve(g, restored), vectors=2)

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


class Bounded(_Solver):
    """Hurts no past task beyond a bound, in memory of a fixed size.

    See :func:`~fedknow.client.learners.fedknow.bounded_dual.integrate_within`.

    Parameters
    ----------
    k : int
        How many signature tasks are chosen at most.
    margin : float
        The least that each multiplier may be.
    tolerance : float
        How fast the step may raise a past loss, as a share of how fast g raises one.
    """

    asks_products = True

    def __init__(self, k: int, margin: float, tolerance: float) -> None:
        super().__init__(k, margin)
        self._tolerance = tolerance

    def _lay_out(
        self, gradient: CurrentGradient, restored: RestoredGradients
    ) -> None:
        # One place for weighted sums, however many restored gradients there are.
        gradient.lay_out(1)
        gradient.prepare(restored, self.asks_products)

    def _solve(self, g: Tensor, restored: RestoredGradients) -> Integration:
        rounds = count()
        return integrate_within(
            self._tolerance,
            g,
            restored.gram,
            lambda w: restored.combine(w, is_again=next(rounds) > 0),
            restored.products,
        )


class Sum(_Solver):
    """Adds all restored gradients, as distillation does."""

    def __init__(self, k: int, margin: float) -> None:
        # Its multipliers are 1: there is nothing to hold them above.
        super().__init__(k, margin=0.0)

    def _solve(self, g: Tensor, restored: RestoredGradients) -> Integration:
        multipliers = np.ones(len(restored))
        total = g + restored.combine(multipliers)
        # None of these is a multiplier of Eq. (4), and none is reported as active.
        return Integration(total, np.zeros(len(restored)), 0, built=1)


class Off(_Solver):
    """Leaves the gradient as it is."""

    uses_knowledge = False

    def __init__(self, k: int, margin: float) -> None:
        # A margin would add restored gradients to g.
        super().__init__(k, margin=0.0)

    def _solve(self, g: Tensor, restored: RestoredGradients) -> Integration:
        return Integration(g, np.zeros(len(restored)), 0)


class OnlineDual(Integrator):
    """Keeps the multipliers of Eq. (4), and moves them one step a batch.

    One backward pass, of ``c + sum_i v_i c_i``, gives g'. One pushforward along it tells how v
    moves (:func:`~fedknow.client.learners.fedknow.partial_duals.step_dual`).
    """

    asks_products = True

    def _lay_out(
        self, gradient: CurrentGradient, restored: RestoredGradients
    ) -> None:
        # One place to choose signature tasks with; g' is written where g was.
        gradient.lay_out(1)

    def _turn(
        self, gradient: CurrentGradient, restored: RestoredGradients
    ) -> Integration:
        tasks = restored.tasks
        v = np.array([self.multipliers.get(task, 0.0) for task in tasks])
        # The model's check refuses this integrator for gradients of a part of a batch.
        result = cast(WholeBatch, gradient).turn(restored, v + self._margin)
        products, _ = restored.products(result)
        moved = step_dual(v, products, restored.lengths(result))
        # By task and not by place: another batch may have other signature tasks.
        self.multipliers |= dict(zip(tasks, moved.tolist(), strict=True))
        violated = int((products < 0).sum())
        return Integration(result, v, violated, built=0, multiplied=1)
