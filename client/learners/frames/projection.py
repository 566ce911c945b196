"""Gradient integrator: the gradient nearest to the current one that hurts no signature task.

FedKNOW (ICDE 2023), Eq. (3)-(5): given the current gradient g in R^p and signature gradients
g_i, the rows of G in R^{k x p},

    (3)  min_{g'} 1/2 ||g - g'||^2   subject to  <g', g_i> >= 0  for all i
    (4)  min_{v >= 0} 1/2 v^T G G^T v + (G g)^T v
    (5)  g' = g + G^T v*

Only the k x k matrix G G^T and the k products G g enter the dual, which is solved in double
precision by an active set after each g_i is brought to unit length. So the answer does not
depend on the gradients' scale, needs no constant added to the diagonal, and every finite input
has one. In single precision a gradient shorter than about 1e-19, whose square vanishes, counts
as zero and forbids nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "Integration",
    "Vector",
    "check_finite",
    "integrate",
    "integrate_one",
    "solve_dual",
]

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Integration:
    """Result of one integration.

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
    asked : int
        How many times the products of one vector with all signature gradients were asked for.
    flops : int
        Floating point operations on vectors of R^p that it took, but for those of who built
        them and was asked.
    """

    gradient: Tensor
    multipliers: Vector
    violated: int
    built: int = 0
    asked: int = 0
    flops: int = 0


def integrate(g: Tensor, signature: Tensor) -> Integration:
    """Solve Eq. (3): the nearest gradient at no obtuse angle to any signature gradient.

    Parameters
    ----------
    g : Tensor
        Current gradient, float [p].
    signature : Tensor
        Signature gradients G, float [k, p].

    Returns
    -------
    Integration
        With ``<g', g_i> >= -1e-5 |g| |g_i|`` for float32 input; g itself where no constraint is
        violated.

    Raises
    ------
    FloatingPointError
        If a gradient is not finite.
    """
    products = (signature @ g).double().cpu().numpy()
    check_finite(products)
    violated = int((products < 0).sum())
    if not violated:
        return Integration(
            g, np.zeros(len(products)), 0, len(signature), flops=2 * signature.numel()
        )
    gram = (signature @ signature.T).double().cpu().numpy()
    v = solve_dual(gram, products)
    flops = 2 * signature.numel() * (1 + len(signature) + 1)  # G g, G G^T and G^T v
    turned = g + torch.from_numpy(v).to(signature) @ signature
    return Integration(turned, v, violated, len(signature), flops=flops)


def integrate_one(g: Tensor, other: Tensor) -> Tensor:
    """Eq. (3) with one constraint, in closed form: g - min(0, <g, o>) / ||o||^2 o, float [p].

    Raises
    ------
    FloatingPointError
        If a gradient is not finite.
    """
    product, square = torch.dot(g, other).item(), torch.dot(other, other).item()
    check_finite(np.array([product, square]))
    if product >= 0 or square == 0:
        return g
    return g - (product / square) * other


def solve_dual(gram: Vector, products: Vector) -> Vector:
    """Solve Eq. (4), ``min_{v >= 0} 1/2 v^T Q v + b^T v``, for a positive semi-definite Q.

    An active-set method in the manner of Lawson and Hanson (1974) on the normal equations, with
    least-norm solves so that parallel or vanishing gradients are no special case, and a bounded
    coordinate descent (Hildreth 1957) to end on: it can only lower the objective and so settles
    what rounding left.

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
    """
    check_finite(gram, products)
    length = np.sqrt(np.clip(np.diag(gram), 0, None))
    solution = np.zeros(len(products))
    live = np.flatnonzero(length > 0)  # a gradient of zero forbids nothing
    if not len(live):
        return solution
    unit = length[live]
    q = gram[np.ix_(live, live)] / np.outer(unit, unit)
    b = products[live] / unit
    size = np.abs(b).max()
    if size == 0:
        return solution
    b = b / size
    v = _active_set(q, b)
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
    v = np.zeros(len(b))
    free = np.zeros(len(b), dtype=bool)
    barred = np.zeros(
        len(b), dtype=bool
    )  # entered and left at once: rounding, not progress
    for _ in range(4 * len(b) + 4):
        downhill = np.where(free | barred, -np.inf, -(q @ v + b))
        entering = int(downhill.argmax())
        if downhill[entering] <= tolerance:
            break
        free[entering] = True
        while free.any():
            index = np.flatnonzero(free)
            target = np.linalg.lstsq(q[np.ix_(index, index)], -b[index], rcond=None)[0]
            if (target > 0).all():
                v[:] = 0
                v[index] = target
                barred[:] = False
                break
            back = target <= 0
            step = (
                v[index][back] / np.maximum(v[index][back] - target[back], 1e-300)
            ).min()
            v[index] += step * (target - v[index])
            leaving = index[back & (v[index] <= tolerance)]
            if not len(leaving):
                leaving = index[back][:1]
            v[leaving] = 0
            free[leaving] = False
            barred[entering] = not free[entering]
    return np.clip(v, 0, None)


def _coordinate_descent(
    q: Vector, b: Vector, v: Vector, sweeps: int = 1000, tolerance: float = 1e-10
) -> Vector:
    slope = q @ v + b
    for _ in range(sweeps):
        if slope.min() >= -tolerance:
            break
        for i in range(len(b)):
            moved = max(0.0, v[i] - slope[i]) - v[i]  # the diagonal is one
            if moved:
                v[i] += moved
                slope += moved * q[:, i]
    return v
