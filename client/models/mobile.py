"""Networks made for phones: MobileNetV2 and ShuffleNetV2."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from fedknow.client.models.layers import (
    Chance,
    Dropout,
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

__all__ = ["mobilenet_v2", "shufflenet_v2"]


# --- MobileNetV2 ----------------------------------------------------------------------------


class _InvertedResidual(nn.Module):
    """A block with many channels between few.

    A 1x1 convolution widens, a 3x3 one works on one channel at a time, and a 1x1 one
    narrows. Where the shape stays, the input is added.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        expansion: int,
    ) -> None:
        super().__init__()
        hidden = inputs * expansion
        # The first block of the network has nothing to widen.
        widening: list[nn.Module] = []
        if expansion > 1:
            widening = [*convolution(inputs, hidden, 1), nn.ReLU6()]
        self.residual = nn.Sequential(
            *widening,
            *convolution(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU6(),
            *convolution(hidden, outputs, 1),
        )
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.residual(x)
        return x + outputs if self.has_shortcut else outputs


class _Stage(NamedTuple):
    """A row of the paper's table 2: blocks of one width.

    The first one of them has the stride.
    """

    expansion: int
    channels: int
    depth: int
    stride: int


_MOBILENET = (
    _Stage(expansion=1, channels=16, depth=1, stride=1),
    _Stage(expansion=6, channels=24, depth=2, stride=2),
    _Stage(expansion=6, channels=32, depth=3, stride=2),
    _Stage(expansion=6, channels=64, depth=4, stride=2),
    _Stage(expansion=6, channels=96, depth=3, stride=1),
    _Stage(expansion=6, channels=160, depth=3, stride=2),
    _Stage(expansion=6, channels=320, depth=1, stride=1),
)


def mobilenet_v2(
    shape: Shape,
    width: Width = 1.0,
    stem: Stem = "auto",
    dropout: Chance = 0.2,
) -> Body:
    """MobileNetV2, 2.2 M parameters.

    Parameters
    ----------
    shape : tuple of int
        Channels, height, width; at least 16x16.
    width : float
        The paper's width multiplier: a factor on channel counts, which stay multiples of 8;
        the last layer's 1,280 grow and do not shrink.
    stem : {"auto", "small", "large"}
        How it begins. ``large``: as published. ``small`` leaves out the first two halvings.
        ``auto``: ``small`` below 64x64.
    dropout : float
        Of the features, as published.

    Raises
    ------
    ConfigError
        If the image is smaller than 16x16.

    References
    ----------
    Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018,
    table 2.
    """
    at_least("mobilenet_v2", shape, 16)
    is_small = small_stem(stem, shape)
    inputs = _multiple_of_eight(32 * width)
    layers = convolution(shape[0], inputs, 3, stride=1 if is_small else 2)
    layers.append(nn.ReLU6())
    for number, stage in enumerate(_MOBILENET):
        outputs = _multiple_of_eight(stage.channels * width)
        # The stem's convolution and the second stage make the first two halvings.
        stride = 1 if is_small and number == 1 else stage.stride
        for _ in range(stage.depth):
            block = _InvertedResidual(inputs, outputs, stride, stage.expansion)
            layers.append(block)
            inputs = outputs
            stride = 1
    features = _multiple_of_eight(1280 * max(1.0, width))
    layers += [
        *convolution(inputs, features, 1),
        nn.ReLU6(),
        *pooled(),
        Dropout(dropout),
    ]
    return nn.Sequential(*layers), features


def _multiple_of_eight(channels: float) -> int:
    """Round to a multiple of 8, as the authors do: at most a tenth down."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


# --- ShuffleNetV2 ---------------------------------------------------------------------------


class _Shuffle(nn.Module):
    """Channels of two halves, one from each in turn."""

    def forward(self, x: Tensor) -> Tensor:
        n, channels, *sides = x.shape
        pair = x.reshape(n, 2, channels // 2, *sides)
        return pair.transpose(1, 2).reshape(x.shape)


class _ShuffleUnit(nn.Module):
    """Two halves of channels: one through three convolutions, one around them.

    Where a unit halves the image, all channels go both ways. ``past`` is then two
    convolutions, else None.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        # Names of modules are those of parameters in saved states: they stay.
        self.past: nn.Module | None = None
        if stride == 2:
            self.past = nn.Sequential(
                *convolution(inputs, inputs, 3, 2, groups=inputs),
                *convolution(inputs, half, 1),
                nn.ReLU(),
            )
        self.through = nn.Sequential(
            *convolution(inputs if stride == 2 else half, half, 1),
            nn.ReLU(),
            *convolution(half, half, 3, stride, groups=half),
            *convolution(half, half, 1),
            nn.ReLU(),
        )
        self.shuffle = _Shuffle()

    def forward(self, x: Tensor) -> Tensor:
        # Where the image keeps its size, one half of the channels goes around untouched.
        if self.past is None:
            bypass, through = x.chunk(2, dim=1)
        else:
            bypass, through = self.past(x), x
        joined = torch.cat([bypass, self.through(through)], dim=1)
        return cast(Tensor, self.shuffle(joined))


_SHUFFLENET = {0.5: 48, 1.0: 116, 1.5: 176, 2.0: 244}
"""Channels of the first stage, which the paper chose width by width (table 5).

Each next stage has twice as many.
"""


def shufflenet_v2(shape: Shape, width: Width = 1.0, stem: Stem = "auto") -> Body:
    """ShuffleNetV2, 1.3 M parameters.

    Parameters
    ----------
    shape : tuple of int
        Channels, height, width; at least 8x8.
    width : float
        0.5, 1, 1.5 and 2 are the paper's; others are 1 with that factor on its channel
        counts.

    Raises
    ------
    ConfigError
        If the image is smaller than 8x8.

    References
    ----------
    Ma et al., ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design,
    ECCV 2018.
    """
    at_least("shufflenet_v2", shape, 8, "model.name = 'cnn' takes 4x4")
    inputs, outputs, features = _shufflenet_channels(width)
    if small_stem(stem, shape):
        layers = [*convolution(shape[0], inputs, 3), nn.ReLU()]
    else:
        layers = large_stem(shape[0], inputs, kernel=3)
    for depth in (4, 8, 4):
        layers.append(_ShuffleUnit(inputs, outputs, stride=2))
        for _ in range(depth - 1):
            layers.append(_ShuffleUnit(outputs, outputs, stride=1))
        inputs = outputs
        outputs = 2 * outputs
    layers += [*convolution(inputs, features, 1), nn.ReLU()]
    return nn.Sequential(*layers, *pooled()), features


def _shufflenet_channels(width: float) -> tuple[int, int, int]:
    """Return the channels of the stem, the first stage and the last layer."""
    if width in _SHUFFLENET:
        return 24, _SHUFFLENET[width], 2048 if width == 2.0 else 1024
    # Units divide their channels into two halves, so these numbers are even.
    stem = scaled(24, width, 2)
    stage = scaled(116, width, 2)
    return stem, stage, scaled(1024, width)
