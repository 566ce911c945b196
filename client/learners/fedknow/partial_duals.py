"""Eq. (3) and (4) from less than all restored gradients.

FedKNOW (ICDE 2023), Sec. III-D. The restored gradients g_i are the rows of G. They are given by
functions that compute some of them, their products with a vector, or their weighted sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedknow.client.learners.frames.projection import (
    Integration,
    Vector,
    check_finite,
    integrate,
    solve_dual,
)

__all__ = ["integrate_lazily", "integrate_surrogate", "step_dual"]

Build = Callable[[Sequence[int]], Tensor]
Products = Callable[[Tensor], tuple[Vector, Vector]]


def integrate_lazily(
    g: Tensor,
    count: int,
    build: Build,
    products: Products,
) -> Integration:
    """Solve Eq. (3) from the signature gradients that it needs.

    As a rule these are the ones whose constraints g violates.

    A working set (Gill, Murray and Wright, Practical Optimization, 1981, ch. 5): solve for the
    gradients built so far, ask for the products of the result with all of them, build those of
    the violated ones that are likely to bind, and so on. What comes out meets all constraints
    with multipliers on some of them, which is optimal for all of them: it is the g' of
    :func:`integrate`.

    Parameters
    ----------
    g : Tensor
        Current gradient, float [p].
    count : int
        How many signature gradients there are, k.
    build : callable
        Indices [n] to G's rows float [m, p], where m counts all indices asked for so far, in
        that order.
    products : callable
        u, float [p], to the products ``<g_i, u>`` and the sizes of the terms that they are sums
        of, float64 [k] each: a product is as good as zero where it is of the size of its
        rounding. About as dear as building one row.

    Raises
    ------
    FloatingPointError
        If a gradient is not finite.
    """
    search = _WorkingSet(g, count, build, products)
    while len(search.rows) < count:
        missing = search.missing()
        if not len(missing):
            break
        search.extend(missing)
    return search.integration()


class _WorkingSet:
    """The signature gradients built so far, and the solution for them."""

    def __init__(
        self,
        g: Tensor,
        count: int,
        build: Build,
        products: Products,
    ) -> None:
        self.rows: list[int] = []
        self._g = g
        self._count = count
        self._build = build
        self._products = products
        # A product is a sum of rounded terms, so it is zero up to some multiple of their size.
        self._rounding = 10 * torch.finfo(g.dtype).eps
        self._result = Integration(g, np.zeros(0), 0)
        self._asked = 0
        self._violated = 0
        self._flops = 0

    def missing(self) -> NDArray[np.int64]:
        """Find the gradients that the solution still needs."""
        missing = np.setdiff1d(np.arange(self._count), self.rows)
        if len(missing) == 1:
            # One row is built as fast as it is found not to be needed.
            return missing
        values, sizes = self._products(self._result.gradient)
        check_finite(values, sizes)
        self._asked += 1
        if not self.rows:
            self._violated = int((values < 0).sum())
        missing = missing[values[missing] < -self._rounding * sizes[missing]]
        if len(missing) and self._asked == 1:
            # Later all violated ones are built: a second wrong guess costs more than it saves.
            missing = missing[_likely_to_bind(values[missing], sizes[missing])]
        return missing

    def extend(self, missing: NDArray[np.int64]) -> None:
        """Build some gradients and solve for all built ones."""
        self.rows.extend(missing.tolist())
        self._result = integrate(self._g, self._build(missing.tolist()))
        self._flops += self._result.flops
        if not self._asked:
            self._violated = self._result.violated

    def integration(self) -> Integration:
        """Give the solution with the multipliers of all gradients."""
        multipliers = np.zeros(self._count)
        multipliers[self.rows] = self._result.multipliers
        return Integration(
            self._result.gradient,
            multipliers,
            self._violated,
            len(self.rows),
            self._asked,
            self._flops,
        )


def _likely_to_bind(
    products: Vector, lengths: Vector, cosine: float = 0.2
) -> NDArray[np.bool_]:
    """Guess which of some violated constraints bind.

    The guess takes one cosine for all pairs of their gradients.

    Turning from one restored gradient often turns from others too: on CIFAR-100 with ten tasks
    their cosines are 0.1 to 0.5. A wrong guess costs time and changes no result. At least one
    is named.
    """
    q = np.outer(lengths, lengths) * (
        cosine + (1 - cosine) * np.eye(len(lengths))
    )
    binding: NDArray[np.bool_] = solve_dual(q, products) > 0
    return binding if binding.any() else np.ones(len(lengths), dtype=bool)


def integrate_surrogate(
    g: Tensor,
    lengths: Vector,
    products: Vector,
    combine: Callable[[Vector], Tensor],
) -> Integration:
    """Approximate Eq. (3) by one constraint, a sum of the violated ones.

    A surrogate constraint (Glover, Operations Research 16, 1968): with ``w_i >= 0``, ``<g',
    sum_i w_i g_i> >= 0`` is a consequence of Eq. (3)'s constraints, and g' the nearest gradient
    that meets it, in closed form. Exact where one constraint is violated and stays the only
    one.

    Parameters
    ----------
    g : Tensor
        Current gradient, float [p].
    lengths : ndarray
        Estimates of |g_i| up to a common factor, float64 [k]: a violated constraint is weighted
        by its multiplier if it stood alone, ``-<g, g_i> / |g_i|^2``.
    products : ndarray
        ``<g, g_i>``, float64 [k].
    combine : callable
        w, float64 [k], to ``sum_i w_i g_i``, float [p].

    Raises
    ------
    FloatingPointError
        If a gradient is not finite.
    """
    check_finite(products, lengths)
    # Above zero, and so that its square is: 1e-150 squared is just a normal number.
    w = np.maximum(-products, 0) / np.maximum(lengths, 1e-150) ** 2
    if not w.any():
        return Integration(g, w, 0, multiplied=1)
    surrogate = combine(w)
    square = torch.dot(surrogate, surrogate).item()
    check_finite(np.array([square]))
    scale = -(w @ products) / square if square else 0.0
    return Integration(
        g + scale * surrogate,
        scale * w,
        int((products < 0).sum()),
        1,
        1,
        2 * g.numel(),
    )


def step_dual(
    v: Vector,
    products: Vector,
    lengths: Vector,
    cosine: float = 0.5,
) -> Vector:
    """Take one step of projected gradient descent on Eq. (4).

    The gradient at v is ``G g' = G G^T v + G g``. In units in which all gradients have length
    1, the step is one over the largest eigenvalue that G G^T has where all pairs of gradients
    have this cosine; twice as long a step would still converge.

    Parameters
    ----------
    v : ndarray
        The multipliers with which g' was made, float64 [k].
    products : ndarray
        ``<g', g_i>``, float64 [k].
    lengths : ndarray
        ``|g_i|``, float64 [k], or estimates.
    cosine : float
        What is taken for the gradients' cosines.

    Returns
    -------
    ndarray
        The next v, float64 [k], nowhere negative.

    Raises
    ------
    FloatingPointError
        If an input is not finite.
    """
    check_finite(v, products, lengths)
    largest = 1 + cosine * (len(v) - 1)
    moved = np.maximum(
        v - products / (largest * np.maximum(lengths, 1e-19) ** 2), 0
    )
    return np.where(
        lengths > 1e-19, moved, 0.0
    )  # a gradient of zero forbids nothing
