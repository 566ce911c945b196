"""Gradient integrator: the gradient nearest to the current one that hurts no signature task."""

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


def integrate_lazily(
    g: Tensor,
    count: int,
    build: Callable[[Sequence[int]], Tensor],
    products: Callable[[Tensor], tuple[Vector, Vector]],
) -> Integration:
    """Solve Eq. (3) from the signature gradients that it needs: as a rule those that g violates.

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
    rounding = 10 * torch.finfo(g.dtype).eps
    rows: list[int] = []
    result, asked, violated, flops = Integration(g, np.zeros(0), 0), 0, 0, 0
    while len(rows) < count:
        missing = np.setdiff1d(np.arange(count), rows)
        if len(missing) > 1:  # one row is built as fast as it is found not to be needed
            values, sizes = products(result.gradient)
            check_finite(values, sizes)
            asked += 1
            violated = violated if rows else int((values < 0).sum())
            missing = missing[values[missing] < -rounding * sizes[missing]]
            if not len(missing):
                break
            if asked == 1:  # but a second wrong guess would cost more than it can save
                missing = missing[_likely_to_bind(values[missing], sizes[missing])]
        rows.extend(missing.tolist())
        result = integrate(g, build(missing.tolist()))
        flops += result.flops
        violated = violated if asked else result.violated
    multipliers = np.zeros(count)
    multipliers[rows] = result.multipliers
    return Integration(result.gradient, multipliers, violated, len(rows), asked, flops)


def _likely_to_bind(
    products: Vector, lengths: Vector, cosine: float = 0.2
) -> NDArray[np.bool_]:
    """Which of some violated constraints would bind if their gradients were at this cosine to one
    another.

    Turning from one restored gradient often turns from others too: on CIFAR-100 with ten tasks
    their cosines are 0.1 to 0.5. A wrong guess costs time and changes no result. At least one
    is named.
    """
    q = np.outer(lengths, lengths) * (cosine + (1 - cosine) * np.eye(len(lengths)))
    binding: NDArray[np.bool_] = solve_dual(q, products) > 0
    return binding if binding.any() else np.ones(len(lengths), dtype=bool)


def integrate_surrogate(
    g: Tensor, lengths: Vector, products: Vector, combine: Callable[[Vector], Tensor]
) -> Integration:
    """An approximation of Eq. (3) from one vector: all violated constraints as one, their weighted
    sum.

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
    w = np.maximum(-products, 0) / np.maximum(lengths, 1e-150) ** 2
    if not w.any():
        return Integration(g, w, 0, asked=1)
    surrogate = combine(w)
    square = torch.dot(surrogate, surrogate).item()
    check_finite(np.array([square]))
    scale = -(w @ products) / square if square else 0.0
    return Integration(
        g + scale * surrogate, scale * w, int((products < 0).sum()), 1, 1, 2 * g.numel()
    )


def step_dual(
    v: Vector, products: Vector, lengths: Vector, cosine: float = 0.5
) -> Vector:
    """One step of projected gradient descent on Eq. (4), whose gradient at v is ``G g' = G G^T v +
    G g``.

    In units in which all gradients have length 1, the step is one over the largest eigenvalue
    that G G^T has where all pairs of gradients have this cosine; twice as long a step would
    still converge.

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
    moved = np.maximum(v - products / (largest * np.maximum(lengths, 1e-19) ** 2), 0)
    return np.where(lengths > 1e-19, moved, 0.0)  # a gradient of zero forbids nothing
