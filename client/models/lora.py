"""Low-rank adapters of linear and convolutional layers.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685. A
frozen layer with weights W_0 gets an update of rank r (Sec. 4.1):

    h = W_0 x + (alpha / r) B A x                                           (3)

B begins as zeros, so that the network begins as it was. A convolution's A is a convolution of its
own kernel with r filters, and its B one of 1x1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import cast

from torch import Tensor, nn

from fedknow.protocols.config import ConfigError

__all__ = ["Adapted", "adapt"]

_FUSED = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
"""Modules that read their layers' weights themselves, past any adapter."""


class Adapted(nn.Module):
    """A frozen layer and its adapter, Eq. (3).

    Parameters
    ----------
    layer : nn.Linear or nn.Conv2d
        Keeps its weights; inputs and outputs are those of this module.
    rank : int
        r, at most the layer's own number of inputs or outputs.
    alpha : float
        The update's scale is ``alpha / r``.
    """

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        rank: int,
        alpha: float,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.scale = alpha / rank
        a, b = _factors(layer, rank)
        self.a: nn.Linear | nn.Conv2d = a
        self.b: nn.Linear | nn.Conv2d = b
        nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
        # With B = 0 an adapted layer begins by doing what it did.
        nn.init.zeros_(b.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Give ``W_0 x + (alpha / r) B A x``."""
        update = cast(Tensor, self.b(self.a(x)))
        return cast(Tensor, self.layer(x)) + self.scale * update


def _factors(
    layer: nn.Linear | nn.Conv2d, rank: int
) -> tuple[nn.Linear, nn.Linear] | tuple[nn.Conv2d, nn.Conv2d]:
    """Make A and B for a layer."""
    if isinstance(layer, nn.Linear):
        return (
            nn.Linear(layer.in_features, rank, bias=False),
            nn.Linear(rank, layer.out_features, bias=False),
        )
    a = nn.Conv2d(
        layer.in_channels,
        rank,
        cast(tuple[int, int], layer.kernel_size),
        cast(tuple[int, int], layer.stride),
        cast("str | tuple[int, int]", layer.padding),
        cast(tuple[int, int], layer.dilation),
        bias=False,
        padding_mode=layer.padding_mode,
    )
    return a, nn.Conv2d(rank, layer.out_channels, 1, bias=False)


def adapt(body: nn.Module, rank: int, alpha: float, name: str) -> None:
    """Give each linear layer and convolution an adapter, in place.

    Convolutions in groups have none, nor have subclasses with a way of their own to pad and the
    layers of PyTorch's own attention.

    Parameters
    ----------
    body : nn.Module
        Frozen already.
    rank, alpha
        As :class:`Adapted` has them.
    name : str
        ``model.name``, for the message.

    Raises
    ------
    ConfigError
        If there is no such layer.
    """
    # Found before the first change, so that no adapter is adapted.
    places = list(_places(body))
    if not places:
        raise ConfigError(
            f"model.train = 'lora': model.name = {name!r} has no nn.Linear and no nn.Conv2d "
            "without groups inside its body to adapt; set model.train = 'head'"
        )
    for parent, attribute, layer in places:
        setattr(parent, attribute, Adapted(layer, rank, alpha))


def _places(
    body: nn.Module,
) -> Iterable[tuple[nn.Module, str, nn.Linear | nn.Conv2d]]:
    """Find layers to adapt, with the module that holds each."""
    layers: list[tuple[nn.Module, str, nn.Linear | nn.Conv2d]] = []
    fused: set[nn.Module] = set()
    # A module comes before its parts, so that what it reads itself is known in time.
    for parent in body.modules():
        if isinstance(parent, _FUSED):
            fused.update(parent.modules())
        if parent not in fused:
            layers += _adaptable(parent)
    return layers


def _adaptable(
    parent: nn.Module,
) -> Iterator[tuple[nn.Module, str, nn.Linear | nn.Conv2d]]:
    for key, child in parent.named_children():
        # A subclass may pad in its own way, which is nothing where a filter sees one place.
        is_convolution = type(child) is nn.Conv2d or (
            isinstance(child, nn.Conv2d) and child.kernel_size == (1, 1)
        )
        if is_convolution and child.groups == 1:
            yield parent, key, cast(nn.Conv2d, child)
        elif type(child) is nn.Linear:
            yield parent, key, child
