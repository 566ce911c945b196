"""Inception networks."""

from __future__ import annotations

from torch import nn

from fedknow.client.models.layers import (
    Branches,
    Chance,
    Dropout,
    Stem,
    Width,
    at_least,
    pooled,
    scaled,
    small_stem,
)
from fedknow.client.models.split import Body, Shape

__all__ = ["inception_v3"]

Kernel = int | tuple[int, int]


def inception_v3(
    shape: Shape, width: Width = 1.0, stem: Stem = "auto", dropout: Chance = 0.5
) -> Body:
    """InceptionV3 without its auxiliary classifier, 21.8 M parameters; settings: width, stem, dropout.

    Parameters
    ----------
    shape : tuple of int
        Channels, height, width; at least 8x8, with the large stem 75x75. Made for 299x299.
    width : float
        Factor on all channel counts.
    stem : {"auto", "small", "large"}
        How it begins. ``large``: as published. ``small`` keeps the convolutions of the published
        beginning and none of its three halvings. ``auto`` is ``small`` below 75x75.
    dropout : float
        Of the features.

    Raises
    ------
    ConfigError
        If the image is too small.

    References
    ----------
    Szegedy et al., Rethinking the Inception Architecture for Computer Vision, CVPR 2016. What its table 1 leaves open
    (the branches of each block) follows the authors' published model.
    """
    small = small_stem(stem, shape, below=75)
    at_least(
        "inception_v3", shape, 8 if small else 75, "model.stem = 'small' takes 8x8"
    )

    def s(channels: int) -> int:
        return scaled(channels, width)

    edge = 1 if small else 0
    pool = [] if small else [nn.MaxPool2d(3, 2)]
    layers: list[nn.Module] = [
        _conv(shape[0], s(32), 3, stride=1 if small else 2, padding=edge),
        _conv(s(32), s(32), 3, padding=edge),
        _conv(s(32), s(64), 3, padding=1),
        *pool,
        _conv(s(64), s(80), 1),
        _conv(s(80), s(192), 3, padding=edge),
        *pool,
    ]
    channels = s(192)
    for pooled_to in (32, 64, 64):
        layers.append(
            Branches(
                _conv(channels, s(64), 1),
                _chain(channels, (s(48), 1), (s(64), 5)),
                _chain(channels, (s(64), 1), (s(96), 3), (s(96), 3)),
                _pooled_conv(channels, s(pooled_to)),
            )
        )
        channels = s(64) + s(64) + s(96) + s(pooled_to)
    layers.append(
        Branches(
            _conv(channels, s(384), 3, stride=2),
            nn.Sequential(
                _chain(channels, (s(64), 1), (s(96), 3)),
                _conv(s(96), s(96), 3, stride=2),
            ),
            nn.MaxPool2d(3, 2),
        )
    )
    channels += s(384) + s(96)
    for inner in (s(128), s(160), s(160), s(192)):
        layers.append(
            Branches(
                _conv(channels, s(192), 1),
                _chain(channels, (inner, 1), (inner, (1, 7)), (s(192), (7, 1))),
                _chain(
                    channels,
                    (inner, 1),
                    (inner, (7, 1)),
                    (inner, (1, 7)),
                    (inner, (7, 1)),
                    (s(192), (1, 7)),
                ),
                _pooled_conv(channels, s(192)),
            )
        )
        channels = 4 * s(192)
    layers.append(
        Branches(
            nn.Sequential(
                _conv(channels, s(192), 1), _conv(s(192), s(320), 3, stride=2)
            ),
            nn.Sequential(
                _chain(channels, (s(192), 1), (s(192), (1, 7)), (s(192), (7, 1))),
                _conv(s(192), s(192), 3, stride=2),
            ),
            nn.MaxPool2d(3, 2),
        )
    )
    channels += s(320) + s(192)
    for _ in range(2):
        layers.append(
            Branches(
                _conv(channels, s(320), 1),
                nn.Sequential(_conv(channels, s(384), 1), _cross(s(384), s(384))),
                nn.Sequential(
                    _chain(channels, (s(448), 1), (s(384), 3)), _cross(s(384), s(384))
                ),
                _pooled_conv(channels, s(192)),
            )
        )
        channels = s(320) + 4 * s(384) + s(192)
    return nn.Sequential(*layers, *pooled(), Dropout(dropout)), channels


def _conv(
    inputs: int, outputs: int, kernel: Kernel, stride: int = 1, padding: Kernel = 0
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(outputs, eps=1e-3),
        nn.ReLU(),
    )


def _same(inputs: int, outputs: int, kernel: Kernel) -> nn.Sequential:
    """A convolution that keeps the image's size."""
    high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
    return _conv(inputs, outputs, kernel, padding=(high // 2, wide // 2))


def _chain(inputs: int, *steps: tuple[int, Kernel]) -> nn.Sequential:
    """Convolutions one after another, each given as its channels and kernel."""
    layers = []
    for outputs, kernel in steps:
        layers.append(_same(inputs, outputs, kernel))
        inputs = outputs
    return nn.Sequential(*layers)


def _cross(inputs: int, outputs: int) -> Branches:
    return Branches(_same(inputs, outputs, (1, 3)), _same(inputs, outputs, (3, 1)))


def _pooled_conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.AvgPool2d(3, 1, padding=1), _conv(inputs, outputs, 1))
