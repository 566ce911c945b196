"""Residual networks for small images."""

from __future__ import annotations

from typing import Annotated, cast

from pydantic import Field
from torch import Tensor, nn

from fedknow.client.models.split import Body, Shape
from fedknow.protocols.config import ConfigError

__all__ = ["resnet18"]


class _Block(nn.Module):
    """Two 3x3 convolutions with batch normalisation, and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.residual(x) + self.shortcut(x)).relu()


def resnet18(shape: Shape, width: Annotated[float, Field(gt=0, le=8)] = 1.0) -> Body:
    """ResNet-18 for small images (3x3 stem, no max pooling), 11.2 M parameters; settings: width.

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
    channels, height, wide = shape
    if min(height, wide) < 8:
        raise ConfigError(
            f"model.name = 'resnet18': images of {height}x{wide} are too small; it needs 8x8 or more, "
            "for example model.name = 'cnn' takes 4x4"
        )
    inputs = max(1, round(64 * width))
    layers: list[nn.Module] = [
        nn.Conv2d(channels, inputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
    ]
    for stage in range(4):
        outputs = max(1, round(64 * 2**stage * width))
        layers += [_Block(inputs, outputs, stride=1 if stage == 0 else 2), _Block(outputs, outputs, stride=1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), inputs
