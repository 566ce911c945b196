"""Plain convolutional networks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from fedknow.client.models.layers import Dropout, Width, at_least
from fedknow.client.models.split import Body, Shape

__all__ = ["cnn", "cnn6"]

Count = Annotated[int, Field(ge=1, le=65536)]


def cnn6(
    shape: Shape,
    width: Width = 1.0,
    dropout: bool = True,
    init: Literal["default", "kaiming"] = "default",
) -> Body:
    """6-layer CNN of the FedKNOW paper, 2.4 M parameters at 32x32.

    Three blocks of two 3x3 convolutions, each followed by 2x2 max pooling, then one fully
    connected layer.

    Parameters
    ----------
    shape : tuple of int
        Channels, height, width; at least 8x8.
    width : float
        Factor on all channel counts; 1 is the paper's 32, 64, 128 and 1024.
    dropout : bool
        Dropout of 0.25 after each block and 0.5 after the fully connected layer.
    init : {"default", "kaiming"}
        PyTorch's own initial weights, as in the authors' code, or normal ones of variance 2 /
        fan-in and biases of zero (He et al., ICCV 2015). Without normalisation, PyTorch's
        weights shrink the signal from layer to layer. Training then stands still for about
        its first hundred steps, which short runs cannot afford.

    Raises
    ------
    ConfigError
        If the image is smaller than 8x8.

    References
    ----------
    Luopan et al., FedKNOW, ICDE 2023; the authors' ``models/Nets.py``.
    """
    channels, height, wide = shape
    at_least("cnn6", shape, 8)
    layers: list[nn.Module] = []
    for block in (32, 64, 128):
        outputs = max(1, round(block * width))
        layers += [
            nn.Conv2d(channels, outputs, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        if dropout:
            layers.append(Dropout(0.25))
        channels = outputs
    features = max(1, round(1024 * width))
    # Three poolings have halved each side three times.
    places = (height // 8) * (wide // 8)
    layers += [
        nn.Flatten(),
        nn.Linear(channels * places, features),
        nn.ReLU(),
    ]
    if dropout:
        layers.append(Dropout(0.5))
    if init == "kaiming":
        _set_kaiming_weights(layers)
    return nn.Sequential(*layers), features


def _set_kaiming_weights(layers: Iterable[nn.Module]) -> None:
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)


def cnn(shape: Shape, channels: Count = 16, hidden: Count = 64) -> Body:
    """Small CNN for 8x8 or 28x28: two convolutions, one hidden layer.

    The second pooling leaves about 4x4 places, so that the size of the hidden layer hardly
    grows with the image: 13,056 body parameters at 1x8x8, 37,632 at 1x28x28.

    Parameters
    ----------
    shape : tuple of int
        Channels, height, width; at least 4x4.
    channels : int
        Filters of the first convolution; the second has twice as many.
    hidden : int
        Features.

    Raises
    ------
    ConfigError
        If the image is smaller than 4x4.
    """
    colours, height, wide = shape
    at_least("cnn", shape, 4)
    # The first pooling halves the image. The second one takes it to 4 places a side, or
    # halves it too.
    pool = (max(2, height // 2 // 4), max(2, wide // 2 // 4))
    places = (height // 2 // pool[0]) * (wide // 2 // pool[1])
    body = nn.Sequential(
        nn.Conv2d(colours, channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(pool),
        nn.Flatten(),
        nn.Linear(2 * channels * places, hidden),
        nn.ReLU(),
    )
    return body, hidden
