"""Domains made of one data set: images, changed anew for each task.

Domain 0 is the data set as it is. The last one differs most, by ``data.domain_strength``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedknow.client.data.shares import Indices
from fedknow.protocols.seeds import generator

__all__ = ["SHIFTS", "Shift"]

_WIDEST_TURN = math.pi
"""Angle of the last domain: half a turn, as in rotated MNIST (Lopez-Paz and Ranzato 2017)."""
_LOUDEST_NOISE = 0.5
"""Standard deviation of the last domain's noise, on the scale 0..1."""
_DARKEST = 0.6
"""Share of the light that midwinter takes."""
_WARMEST = 0.3
"""Share that autumn adds to red and takes from blue."""


@dataclass(frozen=True)
class Shift:
    """A change of images that grows from domain to domain.

    Attributes
    ----------
    kind : str
        ``rotation``, ``noise``, ``permutation`` or ``season``.
    domains : int
        Number of domains.
    strength : float
        0 to 1: how far the last domain is from the one in front.
    seed : int
        Decides noise and permutations.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])
    >>> half_turn = Shift("rotation", domains=2, strength=1.0, seed=0)
    >>> half_turn(x, np.array([0]), np.array([1]), "train").round().tolist()
    [[[[1.0, 0.0], [1.0, 0.0]]]]
    """

    kind: str
    domains: int
    strength: float
    seed: int

    def __call__(
        self,
        x: Tensor,
        rows: Indices,
        domains: Indices,
        part: str,
    ) -> Tensor:
        """Move images to their domains.

        Parameters
        ----------
        x : Tensor of float32, shape (n, C, H, W)
            Images on the scale 0..1.
        rows : ndarray of int64, shape (n,)
            Where they stand in the data set: a sample's noise is its own, whoever holds it.
        domains : ndarray of int64, shape (n,)
            The domain of each.
        part : str
            ``train`` or ``test``.

        Returns
        -------
        Tensor of float32, shape (n, C, H, W)
        """
        change = SHIFTS[self.kind]
        moved = x.clone()
        for domain in np.unique(domains).tolist():
            # The data set as it is: to resample it would blur it.
            if domain == 0:
                continue
            index = np.flatnonzero(domains == domain)
            images = x[torch.from_numpy(index)]
            moved[index] = change(self, images, domain, (part, rows[index]))
        return moved

    def degree(self, domain: int) -> float:
        """Say how far a domain is on the way to the last one, times strength."""
        # With a single domain there is no way to go.
        return self.strength * domain / max(1, self.domains - 1)


Samples = tuple[str, Indices]
"""Part of the data set, and rows in it."""


def _rotate(shift: Shift, x: Tensor, domain: int, samples: Samples) -> Tensor:
    """Turn about the centre, with black where nothing is known."""
    angle = _WIDEST_TURN * shift.degree(domain)
    cos, sin = math.cos(angle), math.sin(angle)
    height, width = x.shape[2:]
    # In units of half a side, so that images that are no square keep right angles.
    matrix = torch.tensor(
        [[cos, -sin * height / width, 0], [sin * width / height, cos, 0]]
    )
    grid = F.affine_grid(
        matrix.expand(len(x), 2, 3), list(x.shape), align_corners=False
    )
    return F.grid_sample(x, grid, align_corners=False)


def _add_noise(shift: Shift, x: Tensor, domain: int, samples: Samples) -> Tensor:
    part, rows = samples
    deviation = _LOUDEST_NOISE * shift.degree(domain)
    noise = np.empty(x.shape, np.float32)
    for place, row in enumerate(rows.tolist()):
        # One generator a sample: its noise does not depend on who holds it, or with which
        # others.
        rng = generator(shift.seed, f"domain/noise/{part}", domain, row)
        noise[place] = rng.standard_normal(x.shape[1:], np.float32)
    return (x + torch.from_numpy(noise) * deviation).clamp_(0, 1)


def _permute(shift: Shift, x: Tensor, domain: int, samples: Samples) -> Tensor:
    """Shuffle a share of the pixels, in one way for all of a domain.

    Source: permuted MNIST (Goodfellow et al., "An Empirical Investigation of Catastrophic
    Forgetting", 2013).
    """
    pixels = x.shape[2] * x.shape[3]
    rng = generator(shift.seed, "domain/permutation", domain)
    chosen = rng.permutation(pixels)[: round(shift.strength * pixels)]
    order = np.arange(pixels)
    order[np.sort(chosen)] = chosen
    flat = x.flatten(2)
    return flat[:, :, torch.from_numpy(order)].view_as(x)


def _turn_season(
    shift: Shift,
    x: Tensor,
    domain: int,
    samples: Samples,
) -> Tensor:
    """Change light and colour as a year does: summer, autumn, winter, spring."""
    angle = 2 * math.pi * domain / shift.domains
    light = 1 - _DARKEST * shift.strength * (1 - math.cos(angle)) / 2
    warmth = _WARMEST * shift.strength * math.sin(angle)
    gains = torch.full((x.shape[1],), light)
    # Grey images have no warmth.
    if x.shape[1] == 3:
        gains *= torch.tensor([1 + warmth, 1.0, 1 - warmth])
    return (x * gains.view(1, -1, 1, 1)).clamp_(0, 1)


SHIFTS: Mapping[str, Callable[[Shift, Tensor, int, Samples], Tensor]] = {
    "rotation": _rotate,
    "noise": _add_noise,
    "permutation": _permute,
    "season": _turn_season,
}
"""Changes by their name in ``data.domain``."""
