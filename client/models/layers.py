"""Layers and settings that the convolutional networks share."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedknow.client.models.split import Shape
from fedknow.protocols.config import ConfigError

__all__ = [
    "Branches",
    "Chance",
    "Dropout",
    "Stem",
    "Width",
    "at_least",
    "convolution",
    "large_stem",
    "pooled",
    "scaled",
    "small_stem",
]

Width = Annotated[
    float, Field(gt=0, le=8, description="Factor on all channel counts.")
]
Chance = Annotated[float, Field(ge=0, lt=1)]
Stem = Annotated[
    Literal["auto", "small", "large"],
    Field(
        description="How a network made for 224x224 begins. large: as published, sides "
        "shrink 4 times before the first block. small: with a 3x3 convolution of stride 1 "
        "and no pooling, as is usual at 32x32. auto: small below 64x64."
    ),
]


class Branches(nn.Module):
    """Several ways to look at one input, with their channels in a row."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """Run all branches and join their channels.

        Parameters
        ----------
        x : Tensor of float, shape (n, c, H, W)
            Images or features.

        Returns
        -------
        Tensor of float, shape (n, sum of the branches' channels, H', W')
        """
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class Dropout(nn.Dropout):
    """PyTorch's dropout with a mask that takes a third of the time on a CPU.

    ``nn.Dropout`` draws the mask there with ``bernoulli_``, which takes 7 % of a training
    step of the 6-layer CNN. Here uniform numbers are compared with ``p``. The masks are
    others than those of ``nn.Dropout`` from the same seed, and as likely.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Set elements to zero while training; multiply the others by 1 / (1 - p).

        Parameters
        ----------
        x : Tensor of float, any shape
            Features. Each element is dropped with probability ``p``.
        """
        if (
            not self.training
            or self.p in (0, 1)
            or self.inplace
            or x.device.type != "cpu"
        ):
            return super().forward(x)
        # In float32 whatever the type of x: bfloat16 has only 128 numbers from 0.5 to 1.
        noise = torch.rand_like(x, dtype=torch.float32, requires_grad=False)
        mask = noise.ge_(self.p).mul_(1 / (1 - self.p))
        return x * mask.to(x.dtype)


def convolution(
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
) -> list[nn.Module]:
    """Build a convolution and its batch normalisation.

    The image keeps its size; stride 2 halves it.
    """
    return [
        nn.Conv2d(
            inputs,
            outputs,
            kernel,
            stride,
            padding=kernel // 2,
            groups=groups,
            bias=False,  # the normalisation's own bias makes one superfluous
        ),
        nn.BatchNorm2d(outputs),
    ]


def large_stem(colours: int, channels: int, kernel: int) -> list[nn.Module]:
    """Build the published beginning of a network: sides shrink four times."""
    return [
        *convolution(colours, channels, kernel, stride=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
    ]


def pooled() -> list[nn.Module]:
    """Build the layers that average features over all places."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def scaled(channels: int, width: float, multiple: int = 1) -> int:
    """Multiply channels by ``width``, to the nearest positive multiple."""
    # At least one multiple, as a thin network would lose a layer.
    return max(multiple, multiple * round(channels * width / multiple))


def small_stem(stem: Stem, shape: Shape, below: int = 64) -> bool:
    """Tell whether a network for images of this shape begins the small way."""
    # The shorter side decides, as it is the first to vanish.
    return stem == "small" or (stem == "auto" and min(shape[1:]) < below)


def at_least(
    model: str,
    shape: Shape,
    side: int,
    advice: str = "model.name = 'mlp' takes any size",
) -> None:
    """Refuse images with a side shorter than this.

    Raises
    ------
    ConfigError
        Names the model, and what to do.
    """
    _, height, width = shape
    if min(height, width) < side:
        raise ConfigError(
            f"model.name = {model!r}: images of {height}x{width} are too small; "
            f"it needs {side}x{side} or more, for example {advice}"
        )
