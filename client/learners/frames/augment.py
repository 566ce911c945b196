"""Random views of small images, for contrastive methods."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["view"]


def view(
    x: Tensor,
    generator: torch.Generator,
    crop: float,
    flip: bool,
    jitter: float,
) -> Tensor:
    """Draw one random view of each image.

    It is a crop brought back to size, perhaps flipped, with another contrast and brightness.

    Parameters
    ----------
    x : Tensor
        Normalised images, float [n, C, H, W].
    generator : torch.Generator
        Source of all draws.
    crop : float
        Smallest part of the image's area that a crop shows, in (0, 1]; 1 leaves images whole.
    flip : bool
        Whether half of the images are mirrored left to right.
    jitter : float
        Contrast is multiplied by a number from [1 - jitter, 1 + jitter], and one from [-jitter,
        jitter] is added, in units of the standard deviations the images were normalised by.

    Returns
    -------
    Tensor
        Float [n, C, H, W], in the memory format of ``x``.
    """

    def uniform(low: float, high: float) -> Tensor:
        return (
            low
            + (high - low)
            * torch.rand(len(x), generator=generator, dtype=x.dtype)
        ).to(x.device)

    side = uniform(crop, 1).sqrt()  # of the crop, in units of the image's
    mirror = (
        torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
        if flip
        else torch.ones_like(side)
    )
    place = torch.stack(
        [(1 - side) * uniform(-1, 1), (1 - side) * uniform(-1, 1)], 1
    )
    zero = torch.zeros_like(side)
    # The affine map from places in the view to places in the image, both in [-1, 1].
    rows = [mirror * side, zero, place[:, 0], zero, side, place[:, 1]]
    grid = F.affine_grid(
        torch.stack(rows, 1).view(-1, 2, 3), list(x.shape), align_corners=False
    )
    # The border is repeated, as zeros would be a colour of their own after normalisation.
    seen = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    contrast, brightness = (
        uniform(1 - jitter, 1 + jitter),
        uniform(-jitter, jitter),
    )
    return seen * contrast.view(-1, 1, 1, 1) + brightness.view(-1, 1, 1, 1)
