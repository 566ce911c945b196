"""Residual networks: ResNet, Wide ResNet, ResNeXt and SE-ResNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from fedknow.client.models.layers import (
    Stem,
    Width,
    at_least,
    convolution,
    large_stem,
    pooled,
    scaled,
    small_stem,
)
from fedknow.client.models.split import Body, Shape

__all__ = [
    "resnet18",
    "resnet152",
    "resnext50",
    "senet18",
    "wide_resnet50",
]

Residual = Callable[[int, int, int], list[nn.Module]]
"""The layers of one block, from the channels that come in, the stage (0..3) and the stride."""


@dataclass(frozen=True)
class _Architecture:
    """Differences between residual networks.

    Attributes
    ----------
    name : str
        The model's name, for messages.
    depths : tuple of int
        Blocks of each stage.
    residual : callable
        Builds the layers of a block.
    expansion : int
        How many times as many channels leave a block as its stage is wide.
    """

    name: str
    depths: tuple[int, int, int, int]
    residual: Residual
    expansion: int = 1


class _Block(nn.Module):
    """Layers, and a way around them."""

    def __init__(
        self,
        residual: Sequence[nn.Module],
        inputs: int,
        outputs: int,
        stride: int,
    ) -> None:
        super().__init__()
        self.residual = nn.Sequential(*residual)
        # A projection where the shape changes, as the sum needs equal shapes.
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                *convolution(inputs, outputs, 1, stride)
            )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.residual(x) + self.shortcut(x)).relu()


class _SqueezeExcitation(nn.Module):
    """Weights channels by what the whole image shows (Hu et al., CVPR 2018)."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        # At least four: fewer may all be dead from the start.
        hidden = max(4, channels // reduction)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, x * self.gate(x))


def resnet18(shape: Shape, width: Width = 1.0, stem: Stem = "auto") -> Body:
    """ResNet-18, 11.2 M parameters.

    Parameters
    ----------
    shape : tuple of int
        Channels, height, width; at least 8x8.
    width : float
        Factor on all channel counts; 1 is 64, 128, 256 and 512.

    Raises
    ------
    ConfigError
        If the image is smaller than 8x8.

    References
    ----------
    He et al., Deep Residual Learning for Image Recognition, CVPR 2016.
    """
    architecture = _Architecture("resnet18", (2, 2, 2, 2), _basic(width))
    return _resnet(architecture, shape, width, stem)


def senet18(shape: Shape, width: Width = 1.0, stem: Stem = "auto") -> Body:
    """SE-ResNet-18: ResNet-18 with squeeze-and-excitation, 11.3 M parameters.

    Parameters and errors are those of :func:`resnet18`; the reduction is 16.

    References
    ----------
    Hu et al., Squeeze-and-Excitation Networks, CVPR 2018.
    """
    basic = _basic(width)

    def residual(inputs: int, stage: int, stride: int) -> list[nn.Module]:
        # The gate last: the order in which layers are made fixes their initial weights.
        layers = basic(inputs, stage, stride)
        layers.append(_SqueezeExcitation(_stage_channels(stage, width)))
        return layers

    architecture = _Architecture("senet18", (2, 2, 2, 2), residual)
    return _resnet(architecture, shape, width, stem)


def resnet152(shape: Shape, width: Width = 1.0, stem: Stem = "auto") -> Body:
    """ResNet-152, 58.1 M parameters.

    Parameters, errors and source are those of :func:`resnet18`; features are four times as
    many, and blocks reduce the image in their 3x3 convolution, as is usual (v1.5).
    """
    residual = _bottleneck(width, lambda stage: _stage_channels(stage, width))
    architecture = _Architecture(
        "resnet152", (3, 8, 36, 3), residual, expansion=4
    )
    return _resnet(architecture, shape, width, stem)


def wide_resnet50(shape: Shape, width: Width = 1.0, stem: Stem = "auto") -> Body:
    """Wide ResNet-50-2, 66.8 M parameters.

    It is ResNet-50 with 3x3 convolutions twice as wide. Parameters and errors are those of
    :func:`resnet18`.

    References
    ----------
    Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016.
    """
    residual = _bottleneck(
        width,
        lambda stage: 2 * _stage_channels(stage, width),
    )
    architecture = _Architecture(
        "wide_resnet50", (3, 4, 6, 3), residual, expansion=4
    )
    return _resnet(architecture, shape, width, stem)


def resnext50(shape: Shape, width: Width = 1.0, stem: Stem = "auto") -> Body:
    """ResNeXt-50 32x4d, 23.0 M parameters.

    It is ResNet-50 with 3x3 convolutions in 32 groups. Parameters and errors are those of
    :func:`resnet18`; ``width`` is a factor on the number of groups, whose sizes (4, 8, 16
    and 32 channels) stay.

    References
    ----------
    Xie et al., Aggregated Residual Transformations for Deep Neural Networks, CVPR 2017.
    """
    groups = scaled(32, width)
    residual = _bottleneck(width, lambda stage: groups * (4 << stage), groups)
    architecture = _Architecture("resnext50", (3, 4, 6, 3), residual, expansion=4)
    return _resnet(architecture, shape, width, stem)


def _stage_channels(stage: int, width: float) -> int:
    """Return the channels of a stage, twice those of the stage before."""
    return scaled(64 << stage, width)


def _basic(width: float) -> Residual:
    """Define blocks of two 3x3 convolutions."""

    def residual(inputs: int, stage: int, stride: int) -> list[nn.Module]:
        outputs = _stage_channels(stage, width)
        return [
            *convolution(inputs, outputs, 3, stride),
            nn.ReLU(),
            *convolution(outputs, outputs, 3),
        ]

    return residual


def _bottleneck(
    width: float,
    channels_in: Callable[[int], int],
    groups: int = 1,
) -> Residual:
    """Define blocks of a 3x3 convolution between two 1x1 ones.

    Parameters
    ----------
    width : float
        Factor on all channel counts.
    channels_in : callable
        From a stage to the channels of the 3x3 convolution in it.
    groups : int
        Of the 3x3 convolution.
    """

    def residual(inputs: int, stage: int, stride: int) -> list[nn.Module]:
        channels = channels_in(stage)
        return [
            *convolution(inputs, channels, 1),
            nn.ReLU(),
            *convolution(channels, channels, 3, stride, groups),
            nn.ReLU(),
            *convolution(
                channels,
                4 * _stage_channels(stage, width),
                1,
            ),
        ]

    return residual


def _resnet(
    architecture: _Architecture,
    shape: Shape,
    width: float,
    stem: Stem,
) -> Body:
    at_least(
        architecture.name,
        shape,
        8,
        "model.name = 'cnn' takes 4x4",
    )
    inputs = scaled(64, width)
    if small_stem(stem, shape):
        layers = [
            *convolution(shape[0], inputs, 3),
            nn.ReLU(),
        ]
    else:
        layers = large_stem(shape[0], inputs, kernel=7)
    for stage, depth in enumerate(architecture.depths):
        outputs = architecture.expansion * _stage_channels(stage, width)
        # Each stage but the first begins by halving the image.
        stride = 2 if stage > 0 else 1
        for _ in range(depth):
            residual = architecture.residual(inputs, stage, stride)
            layers.append(_Block(residual, inputs, outputs, stride))
            inputs = outputs
            # Only the first block of a stage halves the image.
            stride = 1
    return nn.Sequential(*layers, *pooled()), inputs
