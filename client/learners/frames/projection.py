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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "Integration",
    "Vector",
    "integrate",
    "integrate_lazily",
    "integrate_one",
    "integrate_surrogate",
    "most_dissimilar",
    "solve_dual",
    "step_dual",
    "wasserstein",
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
    _check_finite(products)
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
            _check_finite(values, sizes)
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
    _check_finite(products, lengths)
    w = np.maximum(-products, 0) / np.maximum(lengths, 1e-150) ** 2
    if not w.any():
        return Integration(g, w, 0, asked=1)
    surrogate = combine(w)
    square = torch.dot(surrogate, surrogate).item()
    _check_finite(np.array([square]))
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
    _check_finite(v, products, lengths)
    largest = 1 + cosine * (len(v) - 1)
    moved = np.maximum(v - products / (largest * np.maximum(lengths, 1e-19) ** 2), 0)
    return np.where(lengths > 1e-19, moved, 0.0)  # a gradient of zero forbids nothing


def integrate_one(g: Tensor, other: Tensor) -> Tensor:
    """Eq. (3) with one constraint, in closed form: g - min(0, <g, o>) / ||o||^2 o, float [p].

    Raises
    ------
    FloatingPointError
        If a gradient is not finite.
    """
    product, square = torch.dot(g, other).item(), torch.dot(other, other).item()
    _check_finite(np.array([product, square]))
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
    _check_finite(gram, products)
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


def _check_finite(*arrays: Vector) -> None:
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


def wasserstein(a: Tensor, b: Tensor, form: str = "values") -> float:
    """Wasserstein-1 distance between two gradients, float [p] each.

    The paper chooses signature tasks by this distance without saying of which distribution; two
    readings:

    ``values``
        of the entries' values, mean |sort(a) - sort(b)| (what
        ``scipy.stats.wasserstein_distance`` computes).
    ``positions``
        of the mass |a| over the parameter index, mean |cdf_a - cdf_b|.
    """
    return float((_quantiles_or_cdf(a, form) - _quantiles_or_cdf(b, form)).abs().mean())


def _quantiles_or_cdf(x: Tensor, form: str) -> Tensor:
    if (
        form == "values"
    ):  # NumPy sorts some twenty times as fast as torch on a processor with AVX-512
        return torch.from_numpy(np.sort(x.numpy())) if x.is_cpu else x.sort().values
    return (x.abs() / x.abs().sum().clamp_min(torch.finfo(x.dtype).tiny)).cumsum(0)


def most_dissimilar(
    g: Tensor, candidates: Iterable[Tensor], k: int, form: str = "values"
) -> list[int]:
    """Places of the k ``candidates`` [p] farthest from g [p] by :func:`wasserstein`, in ascending
    order."""
    own = _quantiles_or_cdf(g, form)
    distance = [
        float(_quantiles_or_cdf(candidate, form).sub_(own).abs_().mean())
        for candidate in candidates
    ]
    return sorted(int(i) for i in np.argsort(-np.array(distance), kind="stable")[:k])
