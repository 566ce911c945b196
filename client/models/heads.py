"""Heads: what turns features into logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedknow.protocols.config import ModelConfig

__all__ = ["CosineHead", "make_head"]


class CosineHead(nn.Linear):
    """Logits are a learned scale times cosines.

    Rows of the weights are classes' directions; their lengths, and those of features, do not
    matter. So classes seen more often do not get larger logits.

    Parameters
    ----------
    features, classes : int
        Inputs and outputs.

    References
    ----------
    Gidaris and Komodakis, Dynamic Few-Shot Visual Learning without Forgetting, CVPR 2018,
    Eq. (4); the scale begins at their 10.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__(features, classes, bias=False)
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, x: Tensor) -> Tensor:
        """Give logits ``[n, classes]`` of features ``[n, f]``."""
        directions = F.normalize(self.weight)
        return self.scale * F.linear(F.normalize(x), directions)


def make_head(config: ModelConfig, features: int, classes: int) -> nn.Linear:
    """Make the head that ``model.head`` names, with fresh weights."""
    if config.head == "cosine":
        return CosineHead(features, classes)
    return nn.Linear(features, classes)
