"""Statistics of comparisons: differences, corrections, and ranks.

Differences are paired by seed, since all methods of a seed have the same data, clients and
initial weights. Sources: Holm, "A Simple Sequentially Rejective Multiple Test Procedure" (1979);
Demšar, "Statistical Comparisons of Classifiers over Multiple Data Sets" (JMLR 2006).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Student's t from here, as scipy.stats takes half a second longer to import.
from scipy.special import chdtrc, stdtr

from fedknow.server.reports.measures import Estimate, estimate
from fedknow.server.reports.summary import Array

__all__ = ["Difference", "Ranks", "differences", "holm", "rank", "t_test"]

LEVEL = 0.05
"""Probability of an error of the first kind, for ranks."""


@dataclass(frozen=True)
class Difference:
    """A method less another one, seed by seed.

    Attributes
    ----------
    estimate : Estimate
        Mean and 95 % interval of the differences.
    p : float
        Of the paired t-test, two-sided; NaN with fewer than two seeds.
    corrected : float
        That p-value after Holm's correction for all methods compared.
    """

    estimate: Estimate
    p: float
    corrected: float

    @property
    def is_significant(self) -> bool:
        """Whether the difference is not chance, at 5 % for all methods together."""
        return self.corrected < LEVEL


def differences(
    values: Mapping[str, Mapping[int, float]], reference: str
) -> dict[str, Difference]:
    """Compare methods with one of them.

    Parameters
    ----------
    values : mapping of str to mapping of int to float
        A measure of each method by seed. Seeds that one of the two lacks are left out.
    reference : str
        The method that is subtracted from every other one.

    Returns
    -------
    dict of str to Difference
        In the order of ``values``, without the reference.

    Examples
    --------
    >>> values = {"a": {0: 0.5, 1: 0.6, 2: 0.7}, "b": {0: 0.4, 1: 0.4, 2: 0.7}}
    >>> round(differences(values, "a")["b"].estimate.mean, 3)
    -0.1
    """
    paired: dict[str, list[float]] = {}
    for name, by_seed in values.items():
        if name != reference:
            paired[name] = _paired(by_seed, values[reference])
    p_values = [t_test(each) for each in paired.values()]
    corrected = holm(p_values)
    results = {}
    for place, (name, each) in enumerate(paired.items()):
        results[name] = Difference(
            estimate(each), p_values[place], corrected[place]
        )
    return results


def _paired(
    values: Mapping[int, float], reference: Mapping[int, float]
) -> list[float]:
    """Subtract seed by seed; a seed that one of the two lacks is left out."""
    pairs = [
        value - reference[seed]
        for seed, value in values.items()
        if seed in reference
    ]
    return [pair for pair in pairs if not math.isnan(pair)]


def t_test(values: Sequence[float]) -> float:
    """Compute the two-sided p-value of Student's t-test against zero.

    Returns
    -------
    float
        NaN with fewer than two values. Without any spread 1 where all are zero, else 0.
    """
    numbers = np.asarray(values, dtype=np.float64)
    # A single seed has no spread.
    if numbers.size < 2:
        return math.nan
    spread = float(numbers.std(ddof=1)) / math.sqrt(numbers.size)
    mean = float(numbers.mean())
    # Equal differences have no spread to divide by.
    if spread == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stdtr(numbers.size - 1, -abs(mean) / spread))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for many comparisons by Holm's step-down method.

    The smallest of m is multiplied by m, the next by m - 1 and so on. None becomes smaller than
    the one before it, and none larger than 1.

    Parameters
    ----------
    p_values : sequence of float
        NaNs are no comparisons: they do not count and stay.

    Examples
    --------
    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(
        (place for place, p in enumerate(p_values) if not math.isnan(p)),
        key=lambda place: p_values[place],
    )
    corrected = list(p_values)
    highest = 0.0
    for step, place in enumerate(order):
        scaled = (len(order) - step) * p_values[place]
        # Never below the one before, or a larger p could count for more than a smaller one.
        highest = min(1.0, max(highest, scaled))
        corrected[place] = highest
    return corrected


@dataclass(frozen=True)
class Ranks:
    """Mean ranks of methods over streams; 1 is the best.

    Attributes
    ----------
    names : tuple of str
        The methods, the best first.
    means : tuple of float
        Their mean ranks.
    streams : int
        How many streams were ranked.
    p : float
        Of Friedman's test that all methods are alike, without a correction for equals.
    critical : float
        Nemenyi's critical difference: mean ranks that lie closer may be alike at 5 %.
    """

    names: tuple[str, ...]
    means: tuple[float, ...]
    streams: int
    p: float
    critical: float

    def alike(self) -> list[tuple[int, int]]:
        """List the largest groups that the critical difference does not part.

        Returns
        -------
        list of (int, int)
            Places of the first and the last method of each, which are never the same one.
        """
        groups: list[tuple[int, int]] = []
        for begin, mean in enumerate(self.means):
            near = [m for m in self.means[begin:] if m - mean < self.critical]
            end = begin + len(near) - 1
            # A group within the one before it says nothing new.
            is_new = not groups or end > groups[-1][1]
            if end > begin and is_new:
                groups.append((begin, end))
        return groups


def rank(scores: Mapping[str, Sequence[float]]) -> Ranks:
    """Rank methods on each stream, and average their ranks.

    Parameters
    ----------
    scores : mapping of str to sequence of float
        A score of each method on each stream, the higher the better. Equals share their ranks.

    Raises
    ------
    ValueError
        With fewer than two methods or two streams, or if a score is not a number.
    """
    # Here, as its import takes half a second.
    from scipy.stats import rankdata, studentized_range

    table: Array = np.array(list(scores.values()), dtype=np.float64)
    if table.ndim != 2 or min(table.shape) < 2:
        raise ValueError("ranks need two methods and two streams or more")
    if np.isnan(table).any():
        raise ValueError("ranks need a score of each method on each stream")
    methods, streams = table.shape
    # Negated, as the highest score has rank 1.
    means = rankdata(-table, axis=0).mean(1)
    # Stable, so that equal methods stay in the order given.
    order = np.argsort(means, kind="stable")
    names = list(scores)
    scale = math.sqrt(methods * (methods + 1) / (6 * streams))
    # Nemenyi's quantile is that of the range over the root of two.
    quantile = studentized_range.ppf(1 - LEVEL, methods, np.inf) / math.sqrt(2)
    return Ranks(
        tuple(names[place] for place in order),
        tuple(means[order].tolist()),
        streams,
        _friedman(means, streams),
        float(quantile * scale),
    )


def _friedman(means: Array, streams: int) -> float:
    """Compute the p-value of Friedman's test, by the chi-square distribution."""
    methods = len(means)
    centred = means - (methods + 1) / 2
    statistic = 12 * streams / (methods * (methods + 1)) * (centred**2).sum()
    return float(chdtrc(methods - 1, statistic))
