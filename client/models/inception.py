"""Inception networks."""

from __future__ import annotations

from collections.abc import Callable

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
Scale = Callable[[int], int]
"""From a published channel count to the one that ``width`` makes of it."""
Block = tuple[nn.Module, int]
"""A block and the number of channels that come out of it."""


def inception_v3(
    shape: Shape,
    width: Width = 1.0,
    stem: Stem = "auto",
    dropout: Chance = 0.5,
) -> Body:
    """InceptionV3 without its auxiliary classifier, 21.8 M parameters.

    Parameters
    ----------
    shape : tuple of int
        Channels, height, width; at least 8x8, with the large stem 75x75. Made for 299x299.
    width : float
        Factor on all channel counts.
    stem : {"auto", "small", "large"}
        How it begins. ``large``: as published. ``small`` keeps the convolutions of the
        published beginning and none of its three halvings. ``auto`` is ``small`` below
        75x75.
    dropout : float
        Of the features.

    Raises
    ------
    ConfigError
        If the image is too small.

    References
    ----------
    Szegedy et al., Rethinking the Inception Architecture for Computer Vision, CVPR 2016.
    Its table 1 does not give the branches of each block. They follow the authors' published
    model.
    """
    is_small = small_stem(stem, shape, below=75)
    # Below it an image is used up before the last block.
    smallest = 8 if is_small else 75
    at_least("inception_v3", shape, smallest, "model.stem = 'small' takes 8x8")

    def scale(channels: int) -> int:
        return scaled(channels, width)

    layers = _stem(shape[0], scale, is_small)
    channels = scale(192)
    for build, arguments in _BLOCKS:
        block, channels = build(channels, scale, *arguments)
        layers.append(block)
    return nn.Sequential(*layers, *pooled(), Dropout(dropout)), channels


def _stem(colours: int, scale: Scale, is_small: bool) -> list[nn.Module]:
    """Build the layers before the first block."""
    # The published convolutions cut off the image's edge. A small image has none to spare.
    padding = 1 if is_small else 0
    pool = [] if is_small else [nn.MaxPool2d(3, 2)]
    stride = 1 if is_small else 2
    return [
        _conv(colours, scale(32), 3, stride, padding),
        _conv(scale(32), scale(32), 3, padding=padding),
        _conv(scale(32), scale(64), 3, padding=1),
        *pool,
        _conv(scale(64), scale(80), 1),
        _conv(scale(80), scale(192), 3, padding=padding),
        *pool,
    ]


# --- blocks ---------------------------------------------------------------------------------
# Sides in names are those of an image of 299x299. The order of the convolutions fixes the
# initial weights, and their nesting the names of parameters in saved states.


def _block_35(inputs: int, scale: Scale, projection: int) -> Block:
    """Build a block with branches of 1x1, 5x5, twice 3x3, and pooling."""
    small, middle, large = scale(48), scale(64), scale(96)
    block = Branches(
        _conv(inputs, middle, 1),
        _chain(inputs, (small, 1), (middle, 5)),
        _chain(inputs, (middle, 1), (large, 3), (large, 3)),
        _pooled_conv(inputs, scale(projection)),
    )
    return block, middle + middle + large + scale(projection)


def _reduction_35(inputs: int, scale: Scale) -> Block:
    """Build the block that takes 35x35 to 17x17."""
    block = Branches(
        _conv(inputs, scale(384), 3, stride=2),
        nn.Sequential(
            _chain(inputs, (scale(64), 1), (scale(96), 3)),
            _conv(scale(96), scale(96), 3, stride=2),
        ),
        nn.MaxPool2d(3, 2),
    )
    # The pool passes all of its input's channels on.
    return block, inputs + scale(384) + scale(96)


def _block_17(inputs: int, scale: Scale, bottleneck: int) -> Block:
    """Build a block whose 7x7 convolutions are a 1x7 and a 7x1."""
    inner = scale(bottleneck)
    outputs = scale(192)
    row = (1, 7)
    column = (7, 1)
    block = Branches(
        _conv(inputs, outputs, 1),
        _chain(inputs, (inner, 1), (inner, row), (outputs, column)),
        _chain(
            inputs,
            (inner, 1),
            (inner, column),
            (inner, row),
            (inner, column),
            (outputs, row),
        ),
        _pooled_conv(inputs, outputs),
    )
    return block, 4 * outputs


def _reduction_17(inputs: int, scale: Scale) -> Block:
    """Build the block that takes 17x17 to 8x8."""
    inner = scale(192)
    block = Branches(
        nn.Sequential(
            _conv(inputs, inner, 1),
            _conv(inner, scale(320), 3, stride=2),
        ),
        nn.Sequential(
            _chain(inputs, (inner, 1), (inner, (1, 7)), (inner, (7, 1))),
            _conv(inner, inner, 3, stride=2),
        ),
        nn.MaxPool2d(3, 2),
    )
    return block, inputs + scale(320) + inner


def _block_8(inputs: int, scale: Scale) -> Block:
    """Build a block whose 3x3 convolutions are a 1x3 beside a 3x1."""
    inner = scale(384)
    block = Branches(
        _conv(inputs, scale(320), 1),
        nn.Sequential(
            _conv(inputs, inner, 1),
            _cross(inner),
        ),
        nn.Sequential(
            _chain(inputs, (scale(448), 1), (inner, 3)),
            _cross(inner),
        ),
        _pooled_conv(inputs, scale(192)),
    )
    return block, scale(320) + 4 * inner + scale(192)


_BLOCKS: tuple[tuple[Callable[..., Block], tuple[int, ...]], ...] = (
    (_block_35, (32,)),
    (_block_35, (64,)),
    (_block_35, (64,)),
    (_reduction_35, ()),
    (_block_17, (128,)),
    (_block_17, (160,)),
    (_block_17, (160,)),
    (_block_17, (192,)),
    (_reduction_17, ()),
    (_block_8, ()),
    (_block_8, ()),
)
"""All blocks in order: what builds each, and the channel count that is its own."""


# --- convolutions ---------------------------------------------------------------------------


def _conv(
    inputs: int,
    outputs: int,
    kernel: Kernel,
    stride: int = 1,
    padding: Kernel = 0,
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
        # The published model's epsilon, a hundred times PyTorch's default.
        nn.BatchNorm2d(outputs, eps=1e-3),
        nn.ReLU(),
    )


def _same(inputs: int, outputs: int, kernel: Kernel) -> nn.Sequential:
    """Build a convolution that keeps the image's size."""
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    # Kernels are odd, so that this keeps the size.
    padding = (height // 2, width // 2)
    return _conv(inputs, outputs, kernel, padding=padding)


def _chain(inputs: int, *steps: tuple[int, Kernel]) -> nn.Sequential:
    """Build convolutions one after another, from channels and kernels."""
    layers = []
    for outputs, kernel in steps:
        layers.append(_same(inputs, outputs, kernel))
        inputs = outputs
    return nn.Sequential(*layers)


def _cross(channels: int) -> Branches:
    return Branches(
        _same(channels, channels, (1, 3)),
        _same(channels, channels, (3, 1)),
    )


def _pooled_conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.AvgPool2d(3, 1, padding=1),
        _conv(inputs, outputs, 1),
    )
