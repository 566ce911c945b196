"""Residual networks: ResNet, Wide ResNet, ResNeXt, and ResNet with squeeze-and-excitation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor, nn

from fedknow.client.models.layers import (
    Stem,
    Width,
    at_least,
    convolution,
    pooled,
    scaled,
    small_stem,
)
from fedknow.client.models.split import Body, Shape

__all__ = ["resnet18", "resnet152", "resnext50", "senet18", "wide_resnet50"]

Residual = Callable[[int, int, int], list[nn.Module]]
"""The layers of one block, from the channels that come in, the stage (0..3) and the stride."""


class _Block(nn.Module):
    """Layers, and a way around them."""

    def __init__(
        self, residual: Sequence[nn.Module], inputs: int, outputs: int, stride: int
    ) -> None:
        super().__init__()
        self.residual = nn.Sequential(*residual)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(*convolution(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.residual(x) + self.shortcut(x)).relu()


class _SqueezeExcitation(nn.Module):
    """Weights channels by what the whole image shows (Hu et al., CVPR 2018)."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(4, channels // reduction)  # fewer may all be dead from the start
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
    """ResNet-18, 11.2 M parameters; settings: width, stem.

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
    return _resnet("resnet18", shape, width, stem, (2, 2, 2, 2), _basic(width))


def senet18(shape: Shape, width: Width = 1.0, stem: Stem = "auto") -> Body:
    """SE-ResNet-18, ResNet-18 with squeeze-and-excitation, 11.3 M parameters; settings: width, stem.

    Parameters and errors are those of :func:`resnet18`; the reduction is 16.

    References
    ----------
    Hu et al., Squeeze-and-Excitation Networks, CVPR 2018.
    """
    plain = _basic(width)

    def residual(inputs: int, stage: int, stride: int) -> list[nn.Module]:
        return [
            *plain(inputs, stage, stride),
            _SqueezeExcitation(scaled(64 << stage, width)),
        ]

    return _resnet("senet18", shape, width, stem, (2, 2, 2, 2), residual)


def resnet152(shape: Shape, width: Width = 1.0, stem: Stem = "auto") -> Body:
    """ResNet-152, 58.1 M parameters; settings: width, stem.

    Parameters, errors and source are those of :func:`resnet18`; features are four times as
    many, and blocks reduce the image in their 3x3 convolution, as is usual (v1.5).
    """
    residual = _bottleneck(width, lambda stage: scaled(64 << stage, width))
    return _resnet(
        "resnet152", shape, width, stem, (3, 8, 36, 3), residual, expansion=4
    )


def wide_resnet50(shape: Shape, width: Width = 1.0, stem: Stem = "auto") -> Body:
    """Wide ResNet-50-2, ResNet-50 with 3x3 convolutions twice as wide, 66.8 M parameters;
    settings: width, stem.

    Parameters and errors are those of :func:`resnet18`.

    References
    ----------
    Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016.
    """
    residual = _bottleneck(width, lambda stage: 2 * scaled(64 << stage, width))
    return _resnet(
        "wide_resnet50", shape, width, stem, (3, 4, 6, 3), residual, expansion=4
    )


def resnext50(shape: Shape, width: Width = 1.0, stem: Stem = "auto") -> Body:
    """ResNeXt-50 32x4d, ResNet-50 with 3x3 convolutions in 32 groups, 23.0 M parameters; settings:
    width, stem.

    Parameters and errors are those of :func:`resnet18`; ``width`` is a factor on the number of
    groups, whose sizes (4, 8, 16 and 32 channels) stay.

    References
    ----------
    Xie et al., Aggregated Residual Transformations for Deep Neural Networks, CVPR 2017.
    """
    groups = scaled(32, width)
    residual = _bottleneck(width, lambda stage: groups * (4 << stage), groups)
    return _resnet("resnext50", shape, width, stem, (3, 4, 6, 3), residual, expansion=4)


def _basic(width: float) -> Residual:
    """Two 3x3 convolutions."""

    def residual(inputs: int, stage: int, stride: int) -> list[nn.Module]:
        outputs = scaled(64 << stage, width)
        return [
            *convolution(inputs, outputs, 3, stride, activation=nn.ReLU),
            *convolution(outputs, outputs, 3),
        ]

    return residual


def _bottleneck(width: float, inner: Callable[[int], int], groups: int = 1) -> Residual:
    """A 3x3 convolution between two 1x1 ones; ``inner`` is how many channels it has in a stage."""

    def residual(inputs: int, stage: int, stride: int) -> list[nn.Module]:
        channels = inner(stage)
        return [
            *convolution(inputs, channels, 1, activation=nn.ReLU),
            *convolution(channels, channels, 3, stride, groups, activation=nn.ReLU),
            *convolution(channels, 4 * scaled(64 << stage, width), 1),
        ]

    return residual


def _resnet(
    name: str,
    shape: Shape,
    width: float,
    stem: Stem,
    depths: Sequence[int],
    residual: Residual,
    expansion: int = 1,
) -> Body:
    at_least(name, shape, 8, "model.name = 'cnn' takes 4x4")
    inputs = scaled(64, width)
    if small_stem(stem, shape):
        layers = convolution(shape[0], inputs, 3, activation=nn.ReLU)
    else:
        layers = [
            *convolution(shape[0], inputs, 7, 2, activation=nn.ReLU),
            nn.MaxPool2d(3, 2, padding=1),
        ]
    for stage, depth in enumerate(depths):
        outputs = expansion * scaled(64 << stage, width)
        for number in range(depth):
            stride = 2 if stage > 0 and number == 0 else 1
            layers.append(
                _Block(residual(inputs, stage, stride), inputs, outputs, stride)
            )
            inputs = outputs
    return nn.Sequential(*layers, *pooled()), inputs
