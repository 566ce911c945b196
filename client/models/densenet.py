"""Densely connected networks."""

from __future__ import annotations

import torch
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

__all__ = ["densenet121"]

_DEPTHS = (6, 12, 24, 16)
"""Layers of each dense block."""


class _DenseLayer(nn.Module):
    """A layer that adds ``growth`` channels to those that come in."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.grow = nn.Sequential(
            *_preactivated(inputs, 4 * growth, kernel=1),
            *_preactivated(4 * growth, growth, kernel=3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.grow(x)], dim=1)


def densenet121(shape: Shape, width: Width = 1.0, stem: Stem = "auto") -> Body:
    """DenseNet-121, 7.0 M parameters.

    Parameters
    ----------
    shape : tuple of int
        Channels, height, width; at least 8x8.
    width : float
        Factor on the growth rate, which is 32, and with it on all channel counts.

    Raises
    ------
    ConfigError
        If the image is smaller than 8x8.

    References
    ----------
    Huang et al., Densely Connected Convolutional Networks, CVPR 2017, table 1.
    """
    at_least("densenet121", shape, 8, "model.name = 'cnn' takes 4x4")
    growth = scaled(32, width)
    channels = 2 * growth
    if small_stem(stem, shape):
        layers = [*convolution(shape[0], channels, 3), nn.ReLU()]
    else:
        layers = large_stem(shape[0], channels, kernel=7)
    for block, depth in enumerate(_DEPTHS):
        if block > 0:
            # A transition between blocks halves the channels and the sides.
            layers += _preactivated(channels, channels // 2, kernel=1)
            layers.append(nn.AvgPool2d(2))
            channels //= 2
        for _ in range(depth):
            layers.append(_DenseLayer(channels, growth))
            channels += growth
    layers += [nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers, *pooled()), channels


def _preactivated(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    """Build a convolution with normalisation and activation before it."""
    return [
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
    ]
