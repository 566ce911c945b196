"""Eq. (3) up to a stated bound, at a price that does not grow with tasks.

FedKNOW (ICDE 2023), Sec. III-D. With 79 signature tasks dozens of constraints bind, and the exact
result needs the restored gradient of each. One backward pass gives a weighted sum of restored
gradients as well as one of them. One pushforward multiplies all of them by a vector. Eq. (4) is
solved with these two alone, as far as the bound asks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedknow.client.learners.frames.projection import (
    Integration,
    Vector,
    check_finite,
    solve_dual,
)

__all__ = ["integrate_within"]

Combine = Callable[[Vector], Tensor]
Products = Callable[[Tensor], tuple[Vector, Vector]]

PATIENCE = 6
"""Rounds after which each second one relieves the worst constraint alone."""


def integrate_within(
    tolerance: float,
    g: Tensor,
    gram: Callable[[], Vector],
    combine: Combine,
    products: Products,
) -> Integration:
    """Approximate Eq. (3) by a g' that hurts no past task beyond a bound.

    ``<g', g_i>`` is the rate at which a step against g' lowers past task i's loss. With t the
    tolerance, the result meets

        <g', g_i> >= -t max_j max(0, -<g, g_j>)    for all i.

    So no past loss rises more than t times as fast as g raises the one that it raises fastest.
    g' is ``g + sum_i v_i g_i`` with v >= 0, as Eq. (5) has it. At most, g' is
    ``(<v, G g'> + t max_j max(0, -<g, g_j>) sum_i v*_i)^(1/2)`` from the exact result, whose
    multipliers are v*.

    A projected quasi-Newton method on Eq. (4) (Schmidt, Kim and Sra, Optimization for Machine
    Learning, 2011, ch. 11): a model of G G^T is solved exactly, and the line to its solution is
    searched exactly. What the search learns goes into the model by the BFGS formula. Late rounds
    also relieve the worst constraint alone. That lowers Eq. (4) by a fixed amount at least, so
    the rounds end.

    Parameters
    ----------
    tolerance : float
        t, in (0, 1).
    g : Tensor
        Current gradient, float [p].
    gram : callable
        Gives a first model of G G^T, float64 [k, k], positive semi-definite. A factor common to
        all entries is of no account. It decides how many rounds there are, and not the bound.
    combine : callable
        w, float64 [k], to ``sum_i w_i g_i``, float [p]. The last result may be overwritten.
    products : callable
        u, float [p], to the products ``<g_i, u>`` and the sizes of the terms that they are sums
        of, float64 [k] each: a product is as good as zero where it is of the size of its
        rounding.

    Raises
    ------
    FloatingPointError
        If a gradient is not finite.

    Examples
    --------
    >>> rows = torch.tensor([[0.0, 2.0]])
    >>> integrate_within(
    ...     0.1,
    ...     torch.tensor([1.0, -1.0]),
    ...     lambda: np.eye(1),
    ...     lambda w: torch.from_numpy(w).float() @ rows,
    ...     lambda u: ((rows @ u).double().numpy(), np.ones(1)),
    ... ).gradient.tolist()
    [1.0, 0.0]
    """
    descent = _Descent(tolerance, g, combine, products)
    if not descent.is_within():
        model = _Model(gram())
        while not descent.is_within():
            descent.go(model)
    return descent.integration()


class _Model:
    """A model of G G^T, float64 [k, k], that learns from products with it."""

    def __init__(self, gram: Vector) -> None:
        check_finite(gram)
        self._gram = gram
        self._has_scale = False

    def solve(self, v: Vector, slopes: Vector) -> Vector:
        """Find where Eq. (4) ends by this model, from its slopes at v."""
        return solve_dual(self._gram, slopes - self._gram @ v)

    def learn(self, step: Vector, product: Vector, curvature: float) -> None:
        """Make the model say of a step what is true of it.

        Parameters
        ----------
        step : ndarray
            s, float64 [k].
        product : ndarray
            ``G G^T s``, float64 [k].
        curvature : float
            ``s^T G G^T s``, above zero.
        """
        believed = float(step @ self._gram @ step)
        if believed <= 0:
            return
        if not self._has_scale:
            # Features say how gradients compare, and not how long they are.
            self._gram = self._gram * (curvature / believed)
            self._has_scale = True
            believed = curvature
        along = self._gram @ step
        self._gram = (
            self._gram
            - np.outer(along, along) / believed
            + np.outer(product, product) / curvature
        )


class _Descent:
    """The way of g' and its multipliers down Eq. (4)."""

    def __init__(
        self, tolerance: float, g: Tensor, combine: Combine, products: Products
    ) -> None:
        self._combine = combine
        self._products = products
        self._result = g
        self._slopes, sizes = products(g)
        check_finite(self._slopes, sizes)
        self._v = np.zeros(len(sizes))
        self._allowed = tolerance * max(0.0, float(-self._slopes.min()))
        # A product is a sum of rounded terms, so it is zero up to some multiple of their size.
        self._rounding = 10 * torch.finfo(g.dtype).eps
        self._noise = self._rounding * sizes
        self._violated = int((self._slopes < 0).sum())
        self._rounds = 0
        # Whether the model's last proposal led nowhere.
        self._is_stuck = False

    def is_within(self) -> bool:
        """Whether no constraint is violated beyond the bound."""
        return not self._is_beyond().any()

    def go(self, model: _Model) -> None:
        """Go one round: a backward pass and a pushforward."""
        self._rounds += 1
        step = self._proposal(model)
        along = self._combine(step)
        product, sizes = self._products(along)
        curvature = torch.dot(along, along).item()
        slope = torch.dot(along, self._result).item()
        check_finite(product, sizes, np.array([curvature, slope]))
        if curvature <= 0 or slope >= 0:
            self._give_up(step)
            return
        # As far as Eq. (4) falls, and no multiplier falls below zero.
        back = step < 0
        room = (self._v[back] / -step[back]).min() if back.any() else np.inf
        length = min(-slope / curvature, room)
        self._v = np.maximum(self._v + length * step, 0)
        self._slopes = self._slopes + length * product
        self._noise = self._noise + self._rounding * length * sizes
        self._result = torch.add(self._result, along, alpha=length)
        self._is_stuck = False
        model.learn(step, product, curvature)

    def integration(self) -> Integration:
        """Give the result."""
        # Two products and a sum of vectors a round.
        flops = 6 * self._rounds * self._result.numel()
        return Integration(
            self._result,
            self._v,
            self._violated,
            self._rounds,
            1 + self._rounds,
            flops,
        )

    def _is_beyond(self) -> NDArray[np.bool_]:
        beyond: NDArray[np.bool_] = self._slopes < -np.maximum(
            self._allowed, self._noise
        )
        return beyond

    def _proposal(self, model: _Model) -> Vector:
        """Say where to go from v, float64 [k]: downhill, and not below zero."""
        has_patience = self._rounds <= PATIENCE or self._rounds % 2
        if has_patience and not self._is_stuck:
            step = model.solve(self._v, self._slopes) - self._v
            if step @ self._slopes < 0:
                return step
        step = np.zeros(len(self._v))
        step[np.where(self._is_beyond(), self._slopes, 0.0).argmin()] = 1
        return step

    def _give_up(self, step: Vector) -> None:
        """Heed that rounding leaves nothing of a step."""
        if self._is_stuck or np.count_nonzero(step) == 1:
            # The square of this gradient vanishes, so it counts as zero and forbids nothing.
            self._noise[step > 0] = np.inf
        self._is_stuck = True
