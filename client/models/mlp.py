"""Fully connected networks."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Annotated

from pydantic import Field
from torch import nn

from fedknow.client.models.split import Body, Shape

__all__ = ["linear", "mlp"]


def linear(shape: Shape) -> Body:
    """Logistic regression: no body, the head sees the pixels.

    Parameters
    ----------
    shape : tuple of int
        Channels, height, width.
    """
    return nn.Sequential(nn.Flatten()), prod(shape)


def mlp(
    shape: Shape,
    hidden: Annotated[int, Field(ge=1, le=65536)] = 64,
    layers: Annotated[int, Field(ge=1, le=64)] = 2,
) -> Body:
    """Fully connected layers with ReLU, for images of any size.

    Parameters
    ----------
    shape : tuple of int
        Channels, height, width.
    hidden : int
        Width of each layer, and the number of features.
    layers : int
        Hidden layers.
    """
    body: list[nn.Module] = [nn.Flatten()]
    sizes = [prod(shape), *[hidden] * layers]
    for inputs, outputs in pairwise(sizes):
        body += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*body), hidden
