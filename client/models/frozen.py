"""Networks of which a part is frozen.

What is frozen is the same everywhere and for ever: it neither travels nor is kept, and it stays
in evaluation mode. Its running statistics and other numbers are parameters without a gradient, so
that the learner's frame treats them as frozen too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedknow.client.data.samples import SampleSpec
from fedknow.client.models.lora import adapt
from fedknow.protocols.config import ConfigError, ModelConfig

__all__ = [
    "Backbone",
    "freeze",
    "hold_still",
    "is_held",
    "one_by_one",
    "partly_frozen",
    "split_random_features",
    "with_neck",
    "with_random_features",
]


class Backbone(nn.Module):
    """A frozen network, and what is trained after it.

    Samples go through the frozen part one at a time on a CPU, so that what comes out for one
    does not depend on its batch. It may be computed beforehand, too: the module takes samples
    or features.

    Parameters
    ----------
    frozen : nn.Module
        Samples to features; frozen and held still.
    trained : nn.Module
        Features to the body's own output ``[n, f]``.
    sample : SampleSpec
        What goes in.

    Attributes
    ----------
    feature_shape : tuple of int
        Of what comes between the two parts.
    """

    def __init__(
        self,
        frozen: nn.Module,
        trained: nn.Module,
        sample: SampleSpec,
    ) -> None:
        super().__init__()
        self.frozen = frozen
        self.trained = trained
        self.sample_shape = sample.shape
        features = self.features(sample.blank(1))
        self.feature_shape = tuple(features.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        """Give the body's output for samples, or for their features."""
        is_computed = (
            x.shape[1:] == self.feature_shape
            and self.feature_shape != self.sample_shape
        )
        features = x if is_computed else self.features(x)
        return cast(Tensor, self.trained(features))

    def features(self, x: Tensor) -> Tensor:
        """Compute what the frozen part gives for samples.

        Float [n, *shape] to float32 [n, *feature_shape], without a graph.
        """
        return one_by_one(self.frozen, x)

    def __deepcopy__(self, memo: dict[int, Any]) -> Backbone:
        # Copies of a model share what never changes.
        memo[id(self.frozen)] = self.frozen
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new


def one_by_one(module: nn.Module, x: Tensor) -> Tensor:
    """Send samples ``[n, *shape]`` through a frozen module, without a graph.

    On a CPU one at a time, so that what comes out for one does not depend on the others.
    """
    kind = x.device.type
    # In float32 whatever train.precision says, as features are stored and used again.
    with torch.no_grad(), torch.autocast(kind, enabled=False):
        if kind != "cpu":
            return cast(Tensor, module(x))
        # The order of a sum may depend on how many samples there are.
        return torch.cat([module(sample) for sample in torch.split(x, 1)])


def partly_frozen(
    body: nn.Module, config: ModelConfig, sample: SampleSpec
) -> nn.Module:
    """Freeze what ``model.train`` says.

    Parameters
    ----------
    body : nn.Module
        With its weights; changed in place.
    config : ModelConfig
        ``train``, and the settings of adapters.
    sample : SampleSpec
        What goes in.

    Returns
    -------
    nn.Module
        A :class:`Backbone` where a frozen part comes first as a whole.

    Raises
    ------
    ConfigError
        If there are fewer blocks than are to be trained, or nothing to adapt.
    """
    if config.train == "all":
        return body
    if config.train == "lora":
        freeze(body)
        adapt(body, config.lora_rank, config.lora_alpha, config.name)
        return body
    if config.train == "head":
        freeze(body)
        return Backbone(body, nn.Identity(), sample)
    return _train_last(body, config, sample)


class RandomFeatures(nn.Module):
    """Features relu(x R), with a fixed random R of variance 1 / inputs.

    Parameters
    ----------
    inputs, outputs : int
        Rows and columns of R, which is drawn by PyTorch's generator and frozen.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        # Scaled so that features vary about as much as their inputs.
        drawn = torch.randn(inputs, outputs) / inputs**0.5
        self.matrix = nn.Parameter(drawn, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Give ``[n, outputs]`` for features ``[n, inputs]``."""
        return (x @ self.matrix).relu()


def with_random_features(
    body: nn.Module,
    features: int,
    config: ModelConfig,
    sample: SampleSpec,
) -> nn.Module:
    """Put ``model.random_features`` behind a frozen network.

    Raises
    ------
    ConfigError
        If some of it is trained.
    """
    if config.train != "head" or not isinstance(body, Backbone):
        raise ConfigError(
            f"model.random_features = {config.random_features}: they stand behind a frozen "
            f"network, and model.train = {config.train!r}; set model.train = 'head'"
        )
    drawn = RandomFeatures(features, config.random_features)
    hold_still(drawn)
    return Backbone(nn.Sequential(body.frozen, drawn), nn.Identity(), sample)


def split_random_features(
    frozen: nn.Module,
) -> tuple[nn.Module, RandomFeatures | None]:
    """Split a frozen network from random features behind it, if any."""
    if isinstance(frozen, nn.Sequential) and isinstance(
        frozen[-1], RandomFeatures
    ):
        return frozen[0], frozen[-1]
    return frozen, None


def with_neck(body: nn.Module, features: int, units: int) -> nn.Module:
    """Put a trained layer of so many units with ReLU behind a body."""
    neck = nn.Sequential(nn.Linear(features, units), nn.ReLU())
    if isinstance(body, Backbone):
        # In the trained part, so that the frozen one still comes first.
        body.trained = nn.Sequential(body.trained, neck)
        return body
    return nn.Sequential(body, neck)


def _train_last(
    body: nn.Module, config: ModelConfig, sample: SampleSpec
) -> nn.Module:
    count = int(config.train.partition(":")[2])
    units = list(_units(body))
    blocks = [place for place, unit in enumerate(units) if _has_weights(unit)]
    if count >= len(blocks):
        raise ConfigError(
            f"model.train = {config.train!r}: model.name = {config.name!r} has "
            f"{len(blocks)} blocks, and one at least is to be frozen; lower it, or set "
            "model.train = 'all'"
        )
    cut = blocks[-count]
    for unit in units[:cut]:
        freeze(unit)
    # Without a sequence there is no place to cut.
    if not _is_sequence(body):
        return body
    return Backbone(
        nn.Sequential(*units[:cut]), nn.Sequential(*units[cut:]), sample
    )


def _units(body: nn.Module) -> Iterator[nn.Module]:
    """Give the blocks of a network, in the order in which they are defined."""
    if _is_sequence(body):
        yield from _links(body)
        return
    for child in body.children():
        # Transformers keep their blocks in a list, some modules down.
        is_list = isinstance(child, nn.Sequential | nn.ModuleList)
        lists = [isinstance(part, nn.ModuleList) for part in child.children()]
        if is_list or any(lists):
            yield from _units(child)
        else:
            yield child


def _links(module: nn.Module) -> Iterator[nn.Module]:
    """Give what a chain of layers runs through, one after the other."""
    if not isinstance(module, nn.Sequential):
        yield module
        return
    for child in module.children():
        yield from _links(child)


def _has_weights(unit: nn.Module) -> bool:
    """Whether a block has a matrix or a filter, and not a normalisation alone."""
    return any(parameter.dim() > 1 for parameter in unit.parameters())


def _is_sequence(body: nn.Module) -> bool:
    """Whether a network is its blocks, one after the other."""
    return isinstance(body, nn.Sequential)


def freeze(module: nn.Module) -> None:
    """Freeze a network or a part of it, in place.

    Numbers in its buffers become parameters without a gradient.
    """
    module.requires_grad_(False)
    for part in module.modules():
        _freeze_buffers(part)
    hold_still(module)


def _freeze_buffers(module: nn.Module) -> None:
    buffers = list(module.named_buffers(recurse=False))
    for name, buffer in buffers:
        if buffer.is_floating_point():
            # The frame sends and keeps buffers, and not frozen parameters.
            delattr(module, name)
            frozen = nn.Parameter(buffer, requires_grad=False)
            module.register_parameter(name, frozen)


def hold_still(network: nn.Module) -> None:
    """Put a network into evaluation mode, and leave it there."""
    network.eval()
    for module in network.modules():
        # Learners switch modules of a network one by one, so each one refuses.
        module.train = partial(_stay, module)  # type: ignore[method-assign]


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """Take the place of :meth:`nn.Module.train`."""
    return module


def is_held(module: nn.Module) -> bool:
    """Whether :func:`hold_still` was used on a module."""
    return "train" in vars(module)
