"""The rules of robust aggregation, on points.

* Blanchard, El Mhamdi, Guerraoui and Stainer, "Machine Learning with Adversaries: Byzantine
  Tolerant Gradient Descent", NeurIPS 2017;
* El Mhamdi, Guerraoui and Rouault, "The Hidden Vulnerability of Distributed Learning in
  Byzantium", ICML 2018, section 4;
* Karimireddy, He and Jaggi, "Learning from History for Byzantine Robust Optimization", ICML
  2021, algorithm 2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["clip_around", "krum_order", "middle_mean", "squared_distances"]

Floats = NDArray[np.float64]


def squared_distances(points: Floats) -> Floats:
    """Take the squared L2 distance of each pair of points.

    Parameters
    ----------
    points : float64 [n, d]
        One client's parameters a row.

    Returns
    -------
    float64 [n, n]
        0 on the diagonal.

    Examples
    --------
    >>> squared_distances(np.array([[0.0, 0.0], [3.0, 4.0]]))
    array([[ 0., 25.],
           [25.,  0.]])
    """
    distances = np.zeros((len(points), len(points)))
    for place, point in enumerate(points):
        differences = points[place + 1 :] - point
        row = np.einsum("nd,nd->n", differences, differences)
        distances[place, place + 1 :] = row
        distances[place + 1 :, place] = row
    return distances


def krum_order(distances: Floats, malicious: int) -> list[int]:
    """Order points by Krum's score, the best first.

    A point's score is the sum of the squared distances to its ``n - f - 2`` nearest others
    (Blanchard et al. 2017, section 4).

    Parameters
    ----------
    distances : float64 [n, n]
        Squared distances.
    malicious : int
        How many of the points may be hostile, f.

    Returns
    -------
    list of int
        Rows. Where scores are the same, the sum of all distances decides, then the order.
    """
    count = len(distances)
    # At least one neighbour, or a selection that shrinks the set would have no score at all.
    neighbours = max(1, count - malicious - 2)
    scores = []
    totals = []
    for place, row in enumerate(distances):
        ascending = np.sort(np.delete(row, place))
        scores.append(float(ascending[:neighbours].sum()))
        totals.append(float(ascending.sum()))
    # With one neighbour, two points nearest to each other score the same. All distances decide
    # then, and not the order of the clients.
    return [int(place) for place in np.lexsort((totals, scores))]


def middle_mean(points: Floats, count: int) -> Floats:
    """Average, in each dimension, the values nearest to the median.

    Parameters
    ----------
    points : float64 [n, d]
        One client's parameters a row.
    count : int
        How many values to average.

    Returns
    -------
    float64 [d]

    Examples
    --------
    >>> middle_mean(np.array([[1.0], [2.0], [4.0], [99.0]]), 2)
    array([3.])
    """
    distances = np.abs(points - np.median(points, axis=0))
    nearest = np.argsort(distances, axis=0, kind="stable")[:count]
    middle: Floats = np.take_along_axis(points, nearest, axis=0).mean(axis=0)
    return middle


def clip_around(
    changes: Floats, radius: float, iterations: int
) -> tuple[Floats, float]:
    """Average changes, each clipped to a distance from the centre so far.

    It begins at 0, which is the global model, and repeats ``v <- v + mean of (c - v) min(1,
    radius / |c - v|)`` (Karimireddy et al. 2021, equation CC).

    Parameters
    ----------
    changes : float64 [n, d]
        What each client would change in the global model.
    radius : float
        The distance; 0: the median of the distances, anew in each iteration.
    iterations : int
        How often.

    Returns
    -------
    centre : float64 [d]
        The step to make.
    clipped : float
        Share of the changes that were clipped in the last iteration.

    Examples
    --------
    >>> centre, clipped = clip_around(np.array([[1.0], [1.0], [100.0]]), 1.0, 1)
    >>> float(centre[0]), round(clipped, 2)
    (1.0, 0.33)
    """
    centre: Floats = np.zeros(changes.shape[1])
    clipped = 0.0
    for _ in range(iterations):
        offsets = changes - centre
        lengths = np.sqrt(np.einsum("nd,nd->n", offsets, offsets))
        limit = radius or float(np.median(lengths))
        # A length of 0 needs no clipping, and must not divide.
        factors = np.ones(len(lengths))
        is_far = lengths > limit
        factors[is_far] = limit / lengths[is_far]
        centre = centre + (offsets * factors[:, None]).mean(axis=0)
        clipped = float(is_far.mean())
    return centre, clipped
