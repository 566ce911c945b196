"""Projection of a gradient onto those at no obtuse angle to others.

GEM (NeurIPS 2017), Eq. (8) to (11), and FedKNOW (ICDE 2023), Eq. (3) to (5): given the current
gradient g in R^p and signature gradients g_i, the rows of G in R^{k x p},

    (3)  min_{g'} 1/2 ||g - g'||^2   subject to  <g', g_i> >= 0  for all i
    (4)  min_{v >= 0} 1/2 v^T G G^T v + (G g)^T v
    (5)  g' = g + G^T v*

Only the k x k matrix G G^T and the k products G g enter the dual. It is solved in double
precision by an active set, after each g_i is brought to unit length. So the answer does not
depend on the gradients' scale. No constant is added to the diagonal, and every finite input has
an answer. In single precision a gradient shorter than about 1e-19, whose square vanishes, counts
as zero and forbids nothing.

How many operations a solution takes depends on the data. So it is not counted as it happens: the
result says how many there were, and :func:`integrated` charges them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedknow.client.compute import cost

__all__ = [
    "Integration",
    "Vector",
    "check_finite",
    "integrate",
    "integrate_one",
    "integrated",
    "solve_dual",
]

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Integration:
    """The result of one integration.

    Attributes
    ----------
    gradient : Tensor
        g', float [p].
    multipliers : ndarray
        v*, float64 [k]; zero where a constraint does not bind.
    violated : int
        How many constraints the current gradient violated.
    built : int
        How many vectors of R^p were made of signature gradients for it.
    multiplied : int
        How many times one vector was multiplied by all signature gradients.
    flops : int
        Floating point operations on vectors of R^p. Those that built vectors or multiplied one
        by all signature gradients are not among them.
    """

    gradient: Tensor
    multipliers: Vector
    violated: int
    built: int = 0
    multiplied: int = 0
    flops: int = 0


def integrate(g: Tensor, signature: Tensor) -> Integration:
    """Solve Eq. (3) for signature gradients that are given.

    Parameters
    ----------
    g : Tensor
        Current gradient, float [p].
    signature : Tensor
        Signature gradients G, float [k, p].

    Returns
    -------
    Integration
        With ``<g', g_i> >= -1e-5 |g| |g_i|`` for float32 input. It is g itself where no
        constraint is violated.

    Raises
    ------
    FloatingPointError
        If a gradient is not finite.

    Examples
    --------
    >>> integrate(torch.tensor([1.0, -1.0]), torch.tensor([[0.0, 2.0]])).gradient.tolist()
    [1.0, 0.0]
    """
    # On the CPU from here on: the dual has k numbers, and each step on a GPU costs a call.
    products = (signature @ g).double().cpu().numpy()
    check_finite(products)
    violated = int((products < 0).sum())
    if not violated:
        return Integration(
            g,
            np.zeros(len(products)),
            0,
            len(signature),
            flops=2 * signature.numel(),
        )
    gram = (signature @ signature.T).double().cpu().numpy()
    v = solve_dual(gram, products)
    nearest = g + torch.from_numpy(v).to(signature) @ signature
    # G g, G G^T and G^T v.
    flops = 2 * signature.numel() * (1 + len(signature) + 1)
    return Integration(nearest, v, violated, len(signature), flops=flops)


def integrated(solve: Callable[[], Integration], vectors: int) -> Integration:
    """Integrate gradients, and charge what the result says that it took.

    Parameters
    ----------
    solve : callable
        Does it. What it computes on demand is counted apart.
    vectors : int
        How many vectors of R^p it makes, beside those that are computed on demand.
    """
    with cost.declared():
        result = solve()
        cost.add(result.flops, vectors * result.gradient.nbytes)
    return result


def integrate_one(g: Tensor, reference: Tensor) -> Tensor:
    """Solve Eq. (3) with one constraint, in closed form.

    With r the reference, ``g' = g - min(0, <g, r>) / ||r||^2 r``. It is charged as if the
    constraint were violated.

    Parameters
    ----------
    g, reference : Tensor
        Float [p].

    Returns
    -------
    Tensor
        g', float [p]; g itself where the constraint is not violated.

    Raises
    ------
    FloatingPointError
        If a gradient is not finite.

    Examples
    --------
    >>> integrate_one(torch.tensor([1.0, -1.0]), torch.tensor([0.0, 2.0])).tolist()
    [1.0, 0.0]
    """
    with cost.declared():
        # Two products of vectors; memory of g' and of what was added to g.
        cost.add(4 * g.numel(), 2 * g.nbytes)
        product = torch.dot(g, reference).item()
        square = torch.dot(reference, reference).item()
        check_finite(np.array([product, square]))
        if product >= 0 or square == 0:
            return g
        return g - (product / square) * reference


def solve_dual(gram: Vector, products: Vector) -> Vector:
    """Solve Eq. (4), ``min_{v >= 0} 1/2 v^T Q v + b^T v``.

    Q is positive semi-definite. The method is an active set in the manner of Lawson and Hanson
    (1974) on the normal equations. Its solves have least norm, so parallel or vanishing
    gradients are no special case. A bounded coordinate descent (Hildreth 1957) ends it: it can
    only lower the objective, and so removes the errors that rounding left.

    Parameters
    ----------
    gram : ndarray
        Q = G G^T, float64 [k, k].
    products : ndarray
        b = G g, float64 [k].

    Returns
    -------
    ndarray
        v*, float64 [k], nowhere negative.

    Raises
    ------
    FloatingPointError
        If an input is not finite.

    Examples
    --------
    >>> solve_dual(np.array([[4.0]]), np.array([-2.0])).tolist()
    [0.5]
    """
    check_finite(gram, products)
    length = np.sqrt(np.clip(np.diag(gram), 0, None))
    solution = np.zeros(len(products))
    # A gradient of zero forbids nothing.
    live = np.flatnonzero(length > 0)
    if not len(live):
        return solution
    unit = length[live]
    q = gram[np.ix_(live, live)] / np.outer(unit, unit)
    b = products[live] / unit
    size = np.abs(b).max()
    if size == 0:
        return solution
    # To size one, so that the tolerances below are relative.
    b = b / size
    v = _active_set(q, b)
    # Rounding may leave a small violation, which these sweeps take away.
    v = _coordinate_descent(q, b, v)
    solution[live] = v * size / unit
    return solution


def check_finite(*arrays: Vector) -> None:
    """Refuse numbers that are not finite.

    Raises
    ------
    FloatingPointError
        If one is infinite or NaN.
    """
    if not all(np.isfinite(array).all() for array in arrays):
        raise FloatingPointError(
            "the gradients to integrate are not finite; lower train.lr or set train.clip_norm"
        )


def _active_set(q: Vector, b: Vector, tolerance: float = 1e-12) -> Vector:
    """Free one multiplier after the other, and bind negative ones again."""
    v = np.zeros(len(b))
    is_free = np.zeros(len(b), dtype=bool)
    # Entered and left at once: that is rounding, not progress.
    is_barred = np.zeros(len(b), dtype=bool)
    for _ in range(4 * len(b) + 4):
        downhill = np.where(is_free | is_barred, -np.inf, -(q @ v + b))
        entering = int(downhill.argmax())
        if downhill[entering] <= tolerance:
            break
        is_free[entering] = True
        if _minimize_over_free(q, b, v, is_free, tolerance):
            is_barred[:] = False
        else:
            is_barred[entering] = True
    return np.clip(v, 0, None)


def _minimize_over_free(
    q: Vector,
    b: Vector,
    v: Vector,
    is_free: NDArray[np.bool_],
    tolerance: float,
) -> bool:
    """Minimise over the free multipliers, and bind those below zero.

    Parameters
    ----------
    q, b : ndarray
        Those of Eq. (4), float64 [k, k] and [k].
    v : ndarray
        Multipliers, float64 [k]; changed in place.
    is_free : ndarray
        Which of them are free, bool [k]; changed in place.
    tolerance : float
        What counts as zero.

    Returns
    -------
    bool
        Whether any multiplier is still free.
    """
    while is_free.any():
        index = np.flatnonzero(is_free)
        # Least squares and not solve: gradients of similar tasks make q singular.
        target = np.linalg.lstsq(q[np.ix_(index, index)], -b[index], rcond=None)[
            0
        ]
        if (target > 0).all():
            v[:] = 0
            v[index] = target
            return True
        is_back = target <= 0
        # Above zero, as both may be exactly zero.
        gap = np.maximum(v[index][is_back] - target[is_back], 1e-300)
        step = (v[index][is_back] / gap).min()
        v[index] += step * (target - v[index])
        leaving = index[is_back & (v[index] <= tolerance)]
        if not len(leaving):
            # Rounding kept all of them above zero. One has to leave, or nothing would change.
            leaving = index[is_back][:1]
        v[leaving] = 0
        is_free[leaving] = False
    return False


def _coordinate_descent(
    q: Vector,
    b: Vector,
    v: Vector,
    sweeps: int = 1000,
    tolerance: float = 1e-10,
) -> Vector:
    """Lower the objective by one multiplier after the other."""
    slope = q @ v + b
    for _ in range(sweeps):
        if slope.min() >= -tolerance:
            break
        for i in range(len(b)):
            # The diagonal is one, so the slope is the step.
            moved = max(0.0, v[i] - slope[i]) - v[i]
            if moved:
                v[i] += moved
                slope += moved * q[:, i]
    return v
