"""Networks by name: a ``body``, which ends in flat features, and a ``head``, one linear layer over
all classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from pydantic import ConfigDict, ValidationError, validate_call
from torch import nn

from fedknow.client.models.cnn import cnn, cnn6
from fedknow.client.models.densenet import densenet121
from fedknow.client.models.inception import inception_v3
from fedknow.client.models.layers import Dropout
from fedknow.client.models.mlp import linear, mlp
from fedknow.client.models.mobile import mobilenet_v2, shufflenet_v2
from fedknow.client.models.parameters import check_dtypes, check_parameters
from fedknow.client.models.resnet import (
    resnet18,
    resnet152,
    resnext50,
    senet18,
    wide_resnet50,
)
from fedknow.client.models.split import Body, Shape, SplitModel
from fedknow.protocols.config import ConfigError, ModelConfig, closest
from fedknow.protocols.descriptions import summary
from fedknow.protocols.plugins import (
    calling,
    check_maker,
    check_options_finite,
    is_reference,
    load_object,
)
from fedknow.protocols.texts import counted
from fedknow.protocols.values import show

__all__ = [
    "Dropout",
    "SplitModel",
    "build_model",
    "list_models",
    "model_factory",
    "setting_names",
]

_MODELS: Mapping[str, Callable[..., Body]] = {
    "cnn6": cnn6,
    "cnn": cnn,
    "mlp": mlp,
    "linear": linear,
    "resnet18": resnet18,
    "resnet152": resnet152,
    "wide_resnet50": wide_resnet50,
    "resnext50": resnext50,
    "senet18": senet18,
    "mobilenet_v2": mobilenet_v2,
    "shufflenet_v2": shufflenet_v2,
    "inception_v3": inception_v3,
    "densenet121": densenet121,
}

MOST_PARAMETERS = 10**9
"""4 GB: far above the largest that is published here, far below what a slip of a digit makes."""


def build_model(
    config: ModelConfig, shape: Shape, classes: int, seed: int
) -> nn.Module:
    """Build a network with fresh weights, which depend on ``seed`` only.

    Parameters
    ----------
    config : ModelConfig
        Its name and its own settings. A user's ``module:callable`` is called as
        ``callable(shape=..., classes=..., **settings)``.
    shape : tuple of int
        Channels, height, width of an image.
    classes : int
        Outputs of the head.
    seed : int
        Fixes the weights; PyTorch's global generator is left as it was.

    Returns
    -------
    nn.Module
        With ``body`` (images to features ``[n, f]``) and ``head`` (``nn.Linear(f, classes)``);
        images ``[n, C, H, W]`` in, logits ``[n, classes]`` out.

    Raises
    ------
    ConfigError
        For an unknown model or setting, a setting out of range, an image too small, a user's
        model without body and head, or one with parameters that no learner could train.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if is_reference(config.name):
            return _user_model(config, shape, classes)
        if config.name not in _MODELS:
            raise ConfigError(
                f"model.name = {config.name!r}: no such model{closest(config.name, _MODELS)}; "
                f"known: {', '.join(_MODELS)}, or module:callable for your own"
            )
        _check_size(config, shape, classes)
        torch.manual_seed(seed)
        body, features = _build_body(config, shape)
        return SplitModel(body, nn.Linear(features, classes))


def model_factory(name: str) -> Callable[..., Any]:
    """Find what builds a model.

    Raises
    ------
    ConfigError
        If there is none of this name.
    """
    if is_reference(name):
        factory: Callable[..., Any] = load_object(name, "model.name")
        return factory
    if name not in _MODELS:
        raise ConfigError(
            f"model.name = {name!r}: no such model{closest(name, _MODELS)}; "
            f"known: {', '.join(_MODELS)}, or module:callable for your own"
        )
    return _MODELS[name]


def list_models() -> dict[str, str]:
    """The models known by name, with a line about each."""
    return {name: summary(build) for name, build in _MODELS.items()}


def setting_names(name: str) -> list[str]:
    """List the settings of a model that is known by its name."""
    return [
        key for key in inspect.signature(_MODELS[name]).parameters if key != "shape"
    ]


def _build_body(config: ModelConfig, shape: Shape) -> Body:
    build = model_factory(config.name)
    known = setting_names(config.name)
    for key, value in config.options.items():
        if key not in known:
            raise ConfigError(
                f"model.{key} = {value!r}: {config.name} has no such setting{closest(key, known)}; "
                f"it has: {', '.join(known)}"
            )
    checked: Callable[..., Body] = validate_call(
        config=ConfigDict(allow_inf_nan=False)
    )(build)
    try:
        return checked(shape, **config.options)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise ConfigError(
            f"model.{key} = {show(problem['input'])}: {problem['msg']}"
        ) from None


def _check_size(config: ModelConfig, shape: Shape, classes: int) -> None:
    """Refuse a network of more than :data:`MOST_PARAMETERS`, before there is any memory for it."""
    try:
        with torch.device("meta"):
            body, features = _build_body(config, shape)
            count = sum(prod(parameter.shape) for parameter in body.parameters())
    except (RuntimeError, OverflowError, TypeError):  # PyTorch's sizes end at 64 bits
        count, features = MOST_PARAMETERS, MOST_PARAMETERS
    count += features * classes
    if count > MOST_PARAMETERS:
        options = ", ".join(
            f"model.{key} = {value!r}" for key, value in config.options.items()
        )
        raise ConfigError(
            f"model.name = {config.name!r} with {options or 'its defaults'}, images of "
            f"{'x'.join(map(str, shape))} and {counted(classes, 'class', 'classes')}: "
            f"has {count:.2e} parameters; at most {MOST_PARAMETERS:.0e} fit, so make it or the images smaller"
        )


def _user_model(config: ModelConfig, shape: Shape, classes: int) -> nn.Module:
    model = _made_by_user(config, shape, classes)
    with calling(config.name, "model.name"):
        body: object = getattr(model, "body", None)
        head: object = getattr(model, "head", None)
    if (
        not isinstance(model, nn.Module)
        or not isinstance(body, nn.Module)
        or not isinstance(head, nn.Linear)
        or head.out_features != classes
    ):
        raise ConfigError(
            f"model.name = {config.name!r}: returned {type(model).__name__} with head {head}; it must return an "
            f"nn.Module with a module `body` and a `head` that is nn.Linear(..., {classes}), so that "
            "model(x) = model.head(model.body(x))"
        )
    check_dtypes(model, config.name)
    with calling(config.name, "model.name"), torch.no_grad():
        x = torch.randn(2, *shape)
        training = model.training
        model.eval()
        features = body(x)
        agrees = features.dim() == 2 and torch.allclose(
            model(x), head(features), equal_nan=True
        )
        model.train(training)
    if not agrees:
        raise ConfigError(
            f"model.name = {config.name!r}: model(x) must be model.head(model.body(x)), with features [n, features] "
            f"between them; its body gives {list(features.shape)} for {list(x.shape)}"
        )
    check_parameters(model, config.name)
    return model


def _made_by_user(config: ModelConfig, shape: Shape, classes: int) -> object:
    found = load_object(config.name, "model.name")
    build = check_maker(found, config.name, "model.name", nn.Module, "torch.nn.Module")
    signature = inspect.signature(build)
    check_options_finite(config.options, signature.parameters, "model")
    settings = ", ".join(config.options) or "none"
    try:
        signature.bind(shape=shape, classes=classes, **config.options)
    except TypeError as error:
        raise ConfigError(
            f"model.name = {config.name!r}: cannot be called as callable(shape=..., classes=..., settings) "
            f"with the settings given ({settings}): {error}"
        ) from None
    with calling(config.name, "model.name"):
        return build(shape=shape, classes=classes, **config.options)
