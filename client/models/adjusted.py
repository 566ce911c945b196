"""A user's network with weights and frozen parts."""

from __future__ import annotations

from typing import cast

from torch import nn

from fedknow.client.data.samples import SampleSpec
from fedknow.client.models.frozen import partly_frozen
from fedknow.client.models.split import SplitModel
from fedknow.client.models.weights import load_weights
from fedknow.protocols.config import ConfigError, ModelConfig

__all__ = ["adjust"]


def adjust(model: nn.Module, config: ModelConfig, spec: SampleSpec) -> nn.Module:
    """Give a user's network its weights, and freeze what is not trained."""
    for key, default in (("neck", 0), ("random_features", 0), ("head", "linear")):
        if getattr(config, key) == default:
            continue
        raise ConfigError(
            f"model.{key} = {getattr(config, key)!r}: model.name = {config.name!r} makes its own "
            f"head; leave model.{key} out, and build such layers in your own callable"
        )
    body = model.get_submodule("body")
    if config.weights:
        load_weights(body, config)
    if config.train == "all":
        return model
    head = cast(nn.Linear, model.get_submodule("head"))
    return SplitModel(partly_frozen(body, config, spec), head)
