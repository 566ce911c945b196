"""Networks by name: a body and a head.

The body ends in flat features. The head is one linear layer over all classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import torch
from pydantic import ConfigDict, ValidationError, validate_call
from torch import nn

from fedknow.client.data.samples import Kind, SampleSpec, as_spec
from fedknow.client.models.adjusted import adjust
from fedknow.client.models.cnn import cnn, cnn6
from fedknow.client.models.densenet import densenet121
from fedknow.client.models.draws import own_draws
from fedknow.client.models.efficientnet import efficientnet_lite0
from fedknow.client.models.frozen import (
    partly_frozen,
    with_neck,
    with_random_features,
)
from fedknow.client.models.heads import make_head
from fedknow.client.models.inception import inception_v3
from fedknow.client.models.layers import Dropout
from fedknow.client.models.libraries import HUB, is_of_library, library_body
from fedknow.client.models.minilm import minilm
from fedknow.client.models.mlp import linear, mlp
from fedknow.client.models.mobile import mobilenet_v2, shufflenet_v2
from fedknow.client.models.parameters import (
    check_composition,
    check_dtypes,
    check_parameters,
)
from fedknow.client.models.resnet import (
    resnet18,
    resnet152,
    resnext50,
    senet18,
    wide_resnet50,
)
from fedknow.client.models.sequences import cnn1d, gru, transformer
from fedknow.client.models.split import Body, SplitModel
from fedknow.client.models.weights import load_weights
from fedknow.protocols.config import ConfigError, ModelConfig, closest
from fedknow.protocols.descriptions import summary
from fedknow.protocols.installed import find_installed, list_installed
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
    "count_parameters",
    "list_models",
    "model_factory",
    "setting_names",
]

_MODELS: Mapping[str, Callable[..., Body]] = {
    "cnn6": cnn6,
    "cnn": cnn,
    "mlp": mlp,
    "linear": linear,
    "cnn1d": cnn1d,
    "gru": gru,
    "transformer": transformer,
    "resnet18": resnet18,
    "resnet152": resnet152,
    "wide_resnet50": wide_resnet50,
    "resnext50": resnext50,
    "senet18": senet18,
    "mobilenet_v2": mobilenet_v2,
    "shufflenet_v2": shufflenet_v2,
    "inception_v3": inception_v3,
    "densenet121": densenet121,
    "efficientnet_lite0": efficientnet_lite0,
    "minilm": minilm,
}

_NUMBERS: frozenset[Kind] = frozenset(("image", "series", "waveform", "table"))
_KINDS: Mapping[str, frozenset[Kind]] = {
    "mlp": _NUMBERS,
    "linear": _NUMBERS,
    "cnn1d": frozenset(("series", "waveform")),
    "gru": frozenset(("series", "waveform", "tokens")),
    "transformer": frozenset(("series", "waveform", "tokens")),
    "minilm": frozenset(("tokens",)),
}
"""Kinds of samples that a model takes; the others take images alone."""

_GIVEN = ("shape", "sample")
"""Parameters of a builder that are no settings."""

MOST_PARAMETERS = 10**9
"""4 GB: far above the largest that is published here, far below what a slip of a digit makes."""


def build_model(
    config: ModelConfig,
    sample: SampleSpec | Sequence[int],
    classes: int,
    seed: int,
) -> nn.Module:
    """Build a network with fresh weights, which depend on ``seed`` only.

    Parameters
    ----------
    config : ModelConfig
        Its name and its own settings. ``timm:NAME``, ``torchvision:NAME`` and ``hf:NAME`` are
        networks of these libraries. A user's ``module:callable`` is called as
        ``callable(shape=..., classes=..., **settings)``, and with ``sample=...`` where it has a
        parameter of this name.
    sample : SampleSpec or sequence of int
        What the model takes; a shape alone is that of 8-bit images.
    classes : int
        Outputs of the head.
    seed : int
        Fixes the weights; PyTorch's global generator is left as it was.

    Returns
    -------
    nn.Module
        With ``body`` (samples to features ``[n, f]``) and ``head`` (``nn.Linear(f, classes)``);
        samples ``[n, ...]`` in, logits ``[n, classes]`` out.

    Raises
    ------
    ConfigError
        For an unknown model or setting, a setting out of range, an image too small, samples of a
        kind that the model does not take, a user's model without body and head, or one with
        parameters that no learner could train.
    """
    spec = as_spec(sample)
    with own_draws(seed):
        if is_of_library(config.name):
            return _library_model(config, spec, classes)
        if config.name not in _MODELS:
            return _user_model(config, spec, classes)
        _check_kind(config.name, spec)
        _check_size(config, spec, classes)
        # Again: the dry run for the size may have drawn numbers.
        torch.manual_seed(seed)
        body, features = _build_body(config, spec)
        return _assemble(body, features, config, spec, classes)


def _library_model(
    config: ModelConfig, spec: SampleSpec, classes: int
) -> SplitModel:
    """Put a head behind a network of another library."""
    body, features = library_body(config, spec)
    if config.weights == HUB:
        # The library has put them in place already.
        config = config.model_copy(update={"weights": ""})
    model = _assemble(body, features, config, spec, classes)
    check_parameters(model, config.name)
    return model


def _assemble(
    body: nn.Module,
    features: int,
    config: ModelConfig,
    spec: SampleSpec,
    classes: int,
) -> SplitModel:
    """Give a network its weights, neck and head, and freeze some of it."""
    if config.weights:
        load_weights(body, config)
    body = partly_frozen(body, config, spec)
    if config.random_features:
        body = with_random_features(body, features, config, spec)
        features = config.random_features
    if config.neck:
        body = with_neck(body, features, config.neck)
        features = config.neck
    return SplitModel(body, make_head(config, features, classes))


def model_factory(name: str) -> Callable[..., Any]:
    """Find what builds a model.

    Raises
    ------
    ConfigError
        If there is none of this name.
    """
    if name in _MODELS:
        return _MODELS[name]
    factory: Callable[..., Any] = _load(name)
    return factory


def _load(name: str) -> Any:
    """Find a user's model, or that of an installed package."""
    if is_reference(name):
        return load_object(name, "model.name")
    # Built-in names come before: an installed package cannot take the place of one.
    part = find_installed("model", name, "model.name")
    if part is None:
        names = [*_MODELS, *list_installed("model", _MODELS)]
        raise ConfigError(
            f"model.name = {name!r}: no such model{closest(name, names)}; "
            f"known: {', '.join(names)}, or module:callable for your own"
        )
    return part


def list_models() -> dict[str, str]:
    """List the models known by name, with a line about each and its settings.

    Examples
    --------
    >>> import fedknow
    >>> fedknow.list_models()["cnn6"]
    '6-layer CNN of the FedKNOW paper, ...; settings: width, dropout, init.'
    """
    return {name: _described(name) for name in _MODELS}


def _described(name: str) -> str:
    sentence = summary(_MODELS[name]).removesuffix(".")
    settings = ", ".join(setting_names(name)) or "none"
    return f"{sentence}; settings: {settings}."


def setting_names(name: str) -> list[str]:
    """List the settings of a model that is known by its name."""
    parameters = inspect.signature(_MODELS[name]).parameters
    return [key for key in parameters if key not in _GIVEN]


def _check_kind(name: str, spec: SampleSpec) -> None:
    """Refuse samples of a kind that a model does not take."""
    kinds = _KINDS.get(name, frozenset(("image",)))
    if spec.kind in kinds:
        return
    fitting = [name for name in _MODELS if spec.kind in _KINDS.get(name, ())]
    raise ConfigError(
        f"model.name = {name!r} takes samples of kind {' or '.join(sorted(kinds))}, and "
        f"those of this data set are {spec}; set model.name = {' or '.join(fitting)}, "
        "or module:callable for your own"
    )


def _build_body(config: ModelConfig, spec: SampleSpec) -> Body:
    build = model_factory(config.name)
    names = setting_names(config.name)
    for key, value in config.options.items():
        if key not in names:
            raise ConfigError(
                f"model.{key} = {value!r}: {config.name} has no such setting"
                f"{closest(key, names)}; it has: {', '.join(names)}"
            )
    rules = ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)
    # By their annotations, so that a builder need not check its own settings.
    checked: Callable[..., Body] = validate_call(config=rules)(build)
    try:
        takes_spec = "sample" in inspect.signature(build).parameters
        return checked(spec if takes_spec else spec.shape, **config.options)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise ConfigError(
            f"model.{key} = {show(problem['input'])}: {problem['msg']}"
        ) from None


def count_parameters(
    config: ModelConfig, sample: SampleSpec | Sequence[int], classes: int
) -> int:
    """Count the numbers in a network of body and head.

    It is built on PyTorch's meta device, so a huge one takes no memory. A user's model is built
    as it is.

    Raises
    ------
    ConfigError
        As :func:`build_model`.
    """
    spec = as_spec(sample)
    if config.name not in _MODELS:
        model = build_model(config, spec, classes, 0)
        return sum(parameter.numel() for parameter in model.parameters())
    _check_kind(config.name, spec)
    # The dry run may draw numbers, which are nobody else's.
    with own_draws(0):
        return _count(config, spec, classes)


def _count(config: ModelConfig, spec: SampleSpec, classes: int) -> int:
    try:
        # Tensors without memory: a slip of a digit must not fill it before it is refused.
        with torch.device("meta"):
            body, features = _build_body(config, spec)
            count = sum(prod(parameter.shape) for parameter in body.parameters())
    except (RuntimeError, OverflowError, TypeError):
        # PyTorch's sizes end at 64 bits.
        count = MOST_PARAMETERS
        features = MOST_PARAMETERS
    # What the dry run of the body leaves out: the layers behind it, and the head.
    widths = [features, config.random_features, config.neck, classes]
    return count + sum(a * b for a, b in pairwise(filter(None, widths)))


def _check_size(config: ModelConfig, spec: SampleSpec, classes: int) -> None:
    """Refuse a network of more than :data:`MOST_PARAMETERS`."""
    count = _count(config, spec, classes)
    if count > MOST_PARAMETERS:
        pairs = config.options.items()
        options = ", ".join(f"model.{key} = {value!r}" for key, value in pairs)
        raise ConfigError(
            f"model.name = {config.name!r} with {options or 'its defaults'}, "
            f"{spec} and {counted(classes, 'class', 'classes')}: "
            f"has {count:.2e} parameters; at most {MOST_PARAMETERS:.0e} fit, "
            "so make it or the samples smaller"
        )


def _user_model(config: ModelConfig, spec: SampleSpec, classes: int) -> nn.Module:
    model = _call_users_factory(config, spec, classes)
    with calling(config.name, "model.name"):
        body: object = getattr(model, "body", None)
        head: object = getattr(model, "head", None)
    is_split = (
        isinstance(model, nn.Module)
        and isinstance(body, nn.Module)
        # Learners slice the head by class and read its rows, which only this layer has.
        and isinstance(head, nn.Linear)
        and head.out_features == classes
    )
    if not is_split:
        raise ConfigError(
            f"model.name = {config.name!r}: returned {type(model).__name__} with head "
            f"{head}; it must return an nn.Module with a module `body` and a `head` that "
            f"is nn.Linear(..., {classes}), so that model(x) = model.head(model.body(x))"
        )
    assert isinstance(model, nn.Module)
    # Before a sample goes through, which fails for such types with PyTorch's own words.
    check_dtypes(model, config.name)
    check_composition(model, config.name, spec)
    # After the sample, which gives lazy modules their shapes.
    check_parameters(model, config.name)
    return adjust(model, config, spec)


def _call_users_factory(
    config: ModelConfig, spec: SampleSpec, classes: int
) -> object:
    loaded = _load(config.name)
    build = check_maker(
        loaded, config.name, "model.name", nn.Module, "torch.nn.Module"
    )
    signature = inspect.signature(build)
    check_options_finite(config.options, signature.parameters, "model")
    settings = ", ".join(config.options) or "none"
    arguments: dict[str, Any] = {"shape": spec.shape, "classes": classes}
    if "sample" in signature.parameters:
        arguments["sample"] = spec
    try:
        # Bound first: a TypeError from within the call is the user's own fault, and another
        # message.
        signature.bind(**arguments, **config.options)
    except TypeError as error:
        raise ConfigError(
            f"model.name = {config.name!r}: cannot be called as callable(shape=..., "
            f"classes=..., settings) with the settings given ({settings}): {error}"
        ) from None
    with calling(config.name, "model.name"):
        return build(**arguments, **config.options)
