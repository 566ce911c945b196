"""Densely connected networks."""

from __future__ import annotations

import torch
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

__all__ = ["densenet121"]


class _DenseLayer(nn.Module):
    """Adds ``growth`` channels to those that come in."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.grow = nn.Sequential(
            *_before(inputs, 4 * growth, kernel=1),
            *_before(4 * growth, growth, kernel=3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.grow(x)], dim=1)


def densenet121(shape: Shape, width: Width = 1.0, stem: Stem = "auto") -> Body:
    """DenseNet-121, 7.0 M parameters; settings: width, stem.

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
        layers = convolution(shape[0], channels, 3, activation=nn.ReLU)
    else:
        layers = [
            *convolution(shape[0], channels, 7, 2, activation=nn.ReLU),
            nn.MaxPool2d(3, 2, padding=1),
        ]
    for block, depth in enumerate((6, 12, 24, 16)):
        if block > 0:
            layers += [*_before(channels, channels // 2, kernel=1), nn.AvgPool2d(2)]
            channels //= 2
        layers += [
            _DenseLayer(channels + number * growth, growth) for number in range(depth)
        ]
        channels += depth * growth
    return nn.Sequential(
        *layers, nn.BatchNorm2d(channels), nn.ReLU(), *pooled()
    ), channels


def _before(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    """A convolution with normalisation and activation before it."""
    return [
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
    ]
