"""Choice of signature tasks: those most dissimilar to the current one.

FedKNOW (ICDE 2023), Sec. III-D: of all restored gradients g_i, the k farthest from the current
gradient g in Wasserstein distance are integrated. The paper does not say of which distribution
the distance is taken; :func:`wasserstein` has two readings.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from fedknow.client.learners.fedknow.gradients import CurrentGradient
from fedknow.client.learners.fedknow.restored import RestoredGradients
from fedknow.client.learners.fedknow.settings import FedKnowSettings
from fedknow.protocols.seeds import generator

__all__ = ["SignatureSelection", "most_dissimilar", "wasserstein"]


class SignatureSelection:
    """The past tasks to restore gradients of, and the signature tasks.

    Parameters
    ----------
    settings : FedKnowSettings
        ``k``, ``candidates``, ``select`` and ``wasserstein``.

    Attributes
    ----------
    candidates : list of int
        Past tasks to choose from in this round, ascending.
    signature : list of int
        Those chosen last, ascending; a client keeps them from round to round.
    chosen : list of int or None
        Those chosen for this round; None while none was left out.
    """

    def __init__(self, settings: FedKnowSettings) -> None:
        self._settings = settings
        self.load([])

    def load(self, signature: list[int]) -> None:
        """Become that of the client who chose these tasks last."""
        self.signature = list(signature)
        self.candidates: list[int] = []
        self.chosen: list[int] | None = None

    def begin(self, tasks: list[int], seed: int) -> None:
        """Begin a round.

        Parameters
        ----------
        tasks : list of int
            Past tasks, ascending.
        seed : int
            Of the round.
        """
        self.chosen = None
        self.candidates = self._draw(tasks, seed)
        if len(self.candidates) <= self._settings.k:
            self.signature = self.candidates

    def _draw(self, tasks: list[int], seed: int) -> list[int]:
        """Draw the candidates: those chosen last, and others at random."""
        size = self._settings.k + self._settings.candidates
        if not self._settings.candidates or len(tasks) <= size:
            # All of them are candidates, as in the paper, or there is room for all.
            return tasks
        # Those chosen last are likely to be chosen again.
        recent = [task for task in self.signature if task in tasks]
        further = [task for task in tasks if task not in recent]
        drawn = generator(seed, "candidates").choice(
            further, size - len(recent), replace=False
        )
        return sorted([*recent, *drawn.tolist()])

    @property
    def tasks(self) -> list[int]:
        """Past tasks to restore gradients of at the next batch."""
        return self.candidates if self.chosen is None else self.chosen

    def choose(
        self, gradient: CurrentGradient, restored: RestoredGradients
    ) -> RestoredGradients:
        """Choose the signature tasks, unless they are chosen already.

        Parameters
        ----------
        gradient : CurrentGradient
            g of one batch.
        restored : RestoredGradients
            g_i of all :attr:`tasks`.

        Returns
        -------
        RestoredGradients
            Those of at most k tasks.
        """
        if len(restored) <= self._settings.k:
            return restored
        g = gradient.alone()
        candidates = restored.one_by_one()
        # Each candidate took one backward pass to look at.
        gradient.pullbacks += len(restored)
        places = most_dissimilar(
            # Distances are taken between entries, which coordinates do not keep.
            gradient.at_body.full_length(g),
            candidates,
            self._settings.k,
            self._settings.wasserstein,
        )
        signature = restored.select(places)
        self.signature = signature.tasks
        if self._settings.select == "round":
            self.chosen = self.signature
        return signature


def wasserstein(a: Tensor, b: Tensor, form: str = "values") -> float:
    """Measure the Wasserstein-1 distance between two gradients.

    Parameters
    ----------
    a, b : Tensor
        Float [p].
    form : str
        ``values``: of the entries' values, mean |sort(a) - sort(b)|, which
        ``scipy.stats.wasserstein_distance`` computes. ``positions``: of the mass |a| over the
        parameter index, mean |cdf_a - cdf_b|.

    Examples
    --------
    >>> wasserstein(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 2.0]))
    2.0
    """
    return float(
        (_quantiles_or_cdf(a, form) - _quantiles_or_cdf(b, form)).abs().mean()
    )


def most_dissimilar(
    g: Tensor,
    candidates: Iterable[Tensor],
    k: int,
    form: str = "values",
) -> list[int]:
    """Find the k candidates farthest from g by :func:`wasserstein`.

    Parameters
    ----------
    g : Tensor
        Float [p].
    candidates : iterable of Tensor
        Float [p] each; only one is held at a time.
    k : int
        How many to choose.
    form : str
        As in :func:`wasserstein`.

    Returns
    -------
    list of int
        Their places, ascending.

    Examples
    --------
    >>> most_dissimilar(torch.zeros(1), torch.tensor([[1.0], [5.0], [-3.0]]), 2)
    [1, 2]
    """
    current = _quantiles_or_cdf(g, form)
    distances = [
        float(_quantiles_or_cdf(candidate, form).sub_(current).abs_().mean())
        for candidate in candidates
    ]
    # A stable order: of equal distances the earlier task wins, on every machine.
    order = np.argsort(-np.array(distances), kind="stable")
    return sorted(int(place) for place in order[:k])


def _quantiles_or_cdf(x: Tensor, form: str) -> Tensor:
    """Give what is compared entry by entry: float [p] to float [p]."""
    if form == "positions":
        # A gradient of zeros has no mass to divide by.
        mass = x.abs().sum().clamp_min(torch.finfo(x.dtype).tiny)
        return (x.abs() / mass).cumsum(0)
    if x.is_cpu:
        # NumPy sorts some twenty times as fast as torch on a processor with AVX-512.
        return torch.from_numpy(np.sort(x.numpy()))
    return x.sort().values
