"""Checks of what a learner is to work with."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from fedknow.client.models.frozen import Backbone
from fedknow.protocols.config import ConfigError, ExperimentConfig

if TYPE_CHECKING:
    from fedknow.client.learners.frames.learner import Learner

__all__ = [
    "check_cache",
    "check_exchange",
    "check_free",
    "check_frozen_body",
    "check_head",
    "check_plain",
    "warn_of_slow_bf16",
]

log = logging.getLogger(__name__)


def check_free(model: nn.Module, name: str, part: str, reason: str) -> None:
    """Refuse a model of which a part is frozen as a whole.

    Parameters
    ----------
    model : nn.Module
        With a ``body`` and a ``head``.
    name : str
        ``learner.name``.
    part : str
        ``body`` or ``head``.
    reason : str
        What the method does with it.

    Raises
    ------
    ConfigError
        If there is nothing to train in it.
    """
    prefix = f"{part}."
    parameters = [p for n, p in model.named_parameters() if n.startswith(prefix)]
    # One free parameter is enough to train.
    if any(parameter.requires_grad for parameter in parameters):
        return
    if parameters:
        fault = f"all parameters of its {part} are frozen"
        remedy = "leave some of them free"
    else:
        fault = f"its {part} has no parameters"
        remedy = "choose another model"
    raise ConfigError(
        f"learner.name = {name!r} cannot train this model: {fault}, and the method {reason}; "
        f"{remedy}, or choose another learner, for example 'fedper'"
    )


def check_frozen_body(learner: Learner) -> None:
    """Refuse a model that is not a trained head on a frozen body.

    Raises
    ------
    ConfigError
        If anything of the body is trained or travels, or a part of the head is frozen.
    """
    name = type(learner).__name__.lower()
    has_own = any(entry.startswith("body.") for entry in learner.entries.names)
    if has_own or any(p.requires_grad for p in learner.body.parameters()):
        raise ConfigError(
            f"learner.name = {name!r} cannot train this model: the method works on the features "
            "of a frozen network, and the body of this model is trained; set model.train = 'head' "
            "and leave model.neck out, or choose model.name = 'linear'"
        )
    if not all(p.requires_grad for p in learner.head.parameters()):
        raise ConfigError(
            f"learner.name = {name!r} cannot train this model: parameters of its head are frozen, "
            "and the method sets them; leave all of them free"
        )


def check_head(kind: type[Learner], config: ExperimentConfig) -> None:
    """Refuse a head that a method cannot work with.

    Raises
    ------
    ConfigError
        If ``model.head`` is none of its :attr:`Learner.heads`.
    """
    if config.model.head not in kind.heads:
        fitting = " or ".join(map(repr, sorted(kind.heads)))
        raise ConfigError(
            f"model.head = {config.model.head!r}: learner.name = {config.learner.name!r} reads "
            f"or changes the head's weights; set model.head = {fitting}"
        )


def check_exchange(learner: Learner, config: ExperimentConfig) -> None:
    """Refuse a frozen network of which a method has nothing to exchange.

    Raises
    ------
    ConfigError
        Where the method exchanges the body, and ``model.train`` froze all of it.
    """
    is_frozen = config.model.train != "all"
    travelling = filter(learner.entries.travels, learner.entries.names)
    if is_frozen and learner.exchange == "body" and not any(travelling):
        raise ConfigError(
            f"model.train = {config.model.train!r}: learner.name = {config.learner.name!r} "
            "exchanges the body, of which nothing is trained; set model.neck = 256 for a trained "
            "layer in it, model.train = 'last:1', or learner.exchange = 'all' where the learner "
            "has that setting"
        )


def check_cache(learner: Learner, config: ExperimentConfig) -> None:
    """Refuse to keep features where they would not be the samples' own.

    Raises
    ------
    ConfigError
        Saying why, and that ``model.cache_features = false`` is the remedy.
    """
    if not config.model.cache_features:
        return
    body, name = learner.body, config.learner.name
    fault = None
    if not isinstance(body, Backbone):
        fault = (
            f"with model.train = {config.model.train!r} model.name = {config.model.name!r} has "
            "no frozen part that comes first as a whole"
        )
    elif learner.kinds:
        fault = f"learner.name = {name!r} makes images or changes them"
    # Nothing could tell features from samples.
    elif body.feature_shape == body.sample_shape:
        fault = "the frozen part gives features of the samples' own shape"
    if fault:
        raise ConfigError(
            f"model.cache_features = true: {fault}; set model.cache_features = false"
        )


@functools.cache
def warn_of_slow_bf16() -> None:
    """Say once a process that this machine has no instructions for bfloat16."""
    mkldnn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    # A private function, as PyTorch has no public one for it.
    if not (mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        log.warning(
            "train.precision = 'bf16': this processor computes bfloat16 by emulation; "
            "'fp32' will be faster"
        )


def check_plain(layers: Mapping[str, nn.Module], learner: str) -> None:
    """Refuse layers whose weights are not theirs alone.

    A method that sets weights by hand cannot work with them.

    Parameters
    ----------
    layers : mapping of str to Module
        Convolutions and linear layers by name.
    learner : str
        Name of the method.

    Raises
    ------
    ConfigError
        If a layer's weight is computed from other parameters (weight normalisation), or two
        layers share one.
    """
    places: dict[nn.Parameter, str] = {}
    for name, layer in layers.items():
        for key, parameter in layer.named_parameters():
            if key not in ("weight", "bias"):
                raise ConfigError(
                    f"learner.name = {learner!r} cannot train this model: the weight of "
                    f"body.{name} is computed from "
                    f"{key}, as weight normalisation does; use a plain layer"
                )
            if parameter in places:
                raise ConfigError(
                    f"learner.name = {learner!r} cannot train this model: "
                    f"body.{name}.{key} is also "
                    f"body.{places[parameter]} (tied), and each layer is treated by "
                    f"itself; give each a parameter "
                    "of its own"
                )
            places[parameter] = f"{name}.{key}"
