"""Networks made for phones: MobileNetV2 and ShuffleNetV2."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fedknow.client.models.layers import (
    Chance,
    Dropout,
    Stem,
    Width,
    at_least,
    convolution,
    pooled,
    scaled,
    small_stem,
)
from fedknow.client.models.split import Body, Shape

__all__ = ["mobilenet_v2", "shufflenet_v2"]


class _InvertedResidual(nn.Module):
    """Many channels between few: 1x1 up, 3x3 one channel at a time, 1x1 down; around it where the
    shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        up = (
            convolution(inputs, hidden, 1, activation=nn.ReLU6) if expansion > 1 else []
        )
        self.residual = nn.Sequential(
            *up,
            *convolution(hidden, hidden, 3, stride, groups=hidden, activation=nn.ReLU6),
            *convolution(hidden, outputs, 1),
        )
        self.around = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, x + self.residual(x) if self.around else self.residual(x))


def mobilenet_v2(
    shape: Shape, width: Width = 1.0, stem: Stem = "auto", dropout: Chance = 0.2
) -> Body:
    """MobileNetV2, 2.2 M parameters; settings: width, stem, dropout.

    Parameters
    ----------
    shape : tuple of int
        Channels, height, width; at least 16x16.
    width : float
        The paper's width multiplier: a factor on channel counts, which stay multiples of 8; the
        last layer's 1,280 grow and do not shrink.
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
    Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018, table 2.
    """
    at_least("mobilenet_v2", shape, 16)
    small = small_stem(stem, shape)
    inputs = _eights(32 * width)
    layers = convolution(shape[0], inputs, 3, 1 if small else 2, activation=nn.ReLU6)
    for expansion, channels, depth, stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 1 if small else 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for number in range(depth):
            outputs = _eights(channels * width)
            layers.append(
                _InvertedResidual(
                    inputs, outputs, stride if number == 0 else 1, expansion
                )
            )
            inputs = outputs
    features = _eights(1280 * max(1.0, width))
    layers += [
        *convolution(inputs, features, 1, activation=nn.ReLU6),
        *pooled(),
        Dropout(dropout),
    ]
    return nn.Sequential(*layers), features


def _eights(channels: float) -> int:
    """The nearest multiple of 8, but no more than a tenth less, as the authors round."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class _Shuffle(nn.Module):
    """Channels of two halves, one from each in turn."""

    def forward(self, x: Tensor) -> Tensor:
        n, channels, *sides = x.shape
        return x.reshape(n, 2, channels // 2, *sides).transpose(1, 2).reshape(x.shape)


class _ShuffleUnit(nn.Module):
    """One half of the channels goes through three convolutions, the other past them; both through
    where it halves."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.past: nn.Module | None = None
        if stride == 2:
            self.past = nn.Sequential(
                *convolution(inputs, inputs, 3, 2, groups=inputs),
                *convolution(inputs, half, 1, activation=nn.ReLU),
            )
        self.through = nn.Sequential(
            *convolution(inputs if stride == 2 else half, half, 1, activation=nn.ReLU),
            *convolution(half, half, 3, stride, groups=half),
            *convolution(half, half, 1, activation=nn.ReLU),
        )
        self.shuffle = _Shuffle()

    def forward(self, x: Tensor) -> Tensor:
        past, through = x.chunk(2, dim=1) if self.past is None else (self.past(x), x)
        return cast(
            Tensor, self.shuffle(torch.cat([past, self.through(through)], dim=1))
        )


_SHUFFLENET = {0.5: 48, 1.0: 116, 1.5: 176, 2.0: 244}
"""Channels of the first stage, which the paper chose width by width (table 5); each next stage has
twice as many."""


def shufflenet_v2(shape: Shape, width: Width = 1.0, stem: Stem = "auto") -> Body:
    """ShuffleNetV2, 1.3 M parameters; settings: width, stem.

    Parameters
    ----------
    shape : tuple of int
        Channels, height, width; at least 8x8.
    width : float
        0.5, 1, 1.5 and 2 are the paper's; others are 1 with that factor on its channel counts.

    Raises
    ------
    ConfigError
        If the image is smaller than 8x8.

    References
    ----------
    Ma et al., ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design, ECCV 2018.
    """
    at_least("shufflenet_v2", shape, 8, "model.name = 'cnn' takes 4x4")
    published = width in _SHUFFLENET
    inputs = 24 if published else scaled(24, width, 2)
    if small_stem(stem, shape):
        layers = convolution(shape[0], inputs, 3, activation=nn.ReLU)
    else:
        layers = [
            *convolution(shape[0], inputs, 3, 2, activation=nn.ReLU),
            nn.MaxPool2d(3, 2, padding=1),
        ]
    outputs = _SHUFFLENET[width] if published else scaled(116, width, 2)
    for depth in (4, 8, 4):
        layers.append(_ShuffleUnit(inputs, outputs, stride=2))
        layers += [_ShuffleUnit(outputs, outputs, stride=1) for _ in range(depth - 1)]
        inputs, outputs = outputs, 2 * outputs
    features = (2048 if width == 2.0 else 1024) if published else scaled(1024, width)
    return nn.Sequential(
        *layers, *convolution(inputs, features, 1, activation=nn.ReLU), *pooled()
    ), features
