"""What differential privacy promises each client: epsilon for a delta."""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.special import log_ndtr

__all__ = ["delta_of", "epsilon_of"]


def epsilon_of(noise: float, rounds: int, delta: float) -> float:
    """Compute the epsilon of a client that sent noisy updates.

    The server sees each update, so that two updates of norm ``clip`` differ by twice the bound.
    One release of deviation ``noise * clip`` is ``2 / noise``-GDP, and ``rounds`` of them are
    ``2 * sqrt(rounds) / noise``-GDP (Dong, Roth and Su, "Gaussian Differential Privacy", 2019,
    corollary 3.3). That is exact: no bound is looser than it must be.

    Parameters
    ----------
    noise : float
        The noise multiplier, above 0.
    rounds : int
        Releases.
    delta : float
        In (0, 1).

    Returns
    -------
    float
        0 without a release.

    Examples
    --------
    >>> round(epsilon_of(noise=2.0, rounds=1, delta=1e-5), 3)
    4.377
    """
    mu = 2 * math.sqrt(rounds) / noise
    if mu == 0 or delta_of(0.0, mu) <= delta:
        return 0.0
    # The tail beyond this many deviations is lighter than delta.
    tail = math.sqrt(-2 * math.log(delta))
    highest = mu * mu / 2 + mu * tail
    return float(
        brentq(lambda epsilon: delta_of(epsilon, mu) - delta, 0, highest)
    )


def delta_of(epsilon: float, mu: float) -> float:
    """Compute the delta of a Gaussian mechanism.

    ``Phi(mu/2 - epsilon/mu) - exp(epsilon) * Phi(-mu/2 - epsilon/mu)`` (Balle and Wang, ICML
    2018, theorem 8).

    Parameters
    ----------
    epsilon : float
    mu : float
        Sensitivity divided by the noise's standard deviation.
    """
    share = float(log_ndtr(mu / 2 - epsilon / mu))
    # In logarithms, as exp(epsilon) alone may overflow.
    weighted = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    return math.exp(share) - math.exp(weighted)
