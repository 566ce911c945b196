"""Checks of a model's parameters: learners must be able to train them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fedknow.client.data.samples import SampleSpec
from fedknow.protocols.config import ConfigError
from fedknow.protocols.plugins import calling

__all__ = ["check_composition", "check_dtypes", "check_parameters"]


def check_dtypes(model: nn.Module, name: str) -> None:
    """Refuse trainable parameters that are not float32.

    Frozen ones may have any dtype.

    Parameters
    ----------
    model : nn.Module
        The user's model, before any sample went through it.
    name : str
        ``model.name``, for the message.

    Raises
    ------
    ConfigError
        Naming the first such parameter, and the remedy.
    """
    for place, parameter in model.named_parameters():
        if not parameter.requires_grad or parameter.dtype is torch.float32:
            continue
        kind = str(parameter.dtype).removeprefix("torch.")
        remedy = (
            "keep it as a real parameter [..., 2] and take torch.view_as_complex of that "
            "in forward"
            if parameter.is_complex()
            else "build the model in float32; train.precision = 'bf16' computes in bfloat16"
        )
        raise ConfigError(
            f"model.name = {name!r}: parameter {place} is {kind}, and learners train "
            f"float32 only; {remedy}, or freeze it by requires_grad_(False)"
        )


def check_composition(model: nn.Module, name: str, spec: SampleSpec) -> None:
    """Refuse a model that is not its head after its body."""
    body = model.get_submodule("body")
    head = model.get_submodule("head")
    with calling(name, "model.name"), torch.no_grad():
        # Two samples: a model may squeeze the axis of a single one away.
        x = spec.random(2)
        was_training = model.training
        # Dropout would make two passes differ.
        model.eval()
        features = body(x)
        agrees = features.dim() == 2 and torch.allclose(
            model(x), head(features), equal_nan=True
        )
        model.train(was_training)
    if not agrees:
        raise ConfigError(
            f"model.name = {name!r}: model(x) must be model.head(model.body(x)), with "
            f"features [n, features] between them; its body gives {list(features.shape)} "
            f"for {list(x.shape)}"
        )


def check_parameters(model: nn.Module, name: str) -> None:
    """Refuse parameters that no learner could train.

    A sample must have gone through the model, as lazy modules learn their sizes from it.

    Parameters
    ----------
    model : nn.Module
        The user's model, with a ``body`` and a ``head``.
    name : str
        ``model.name``, for the message.

    Raises
    ------
    ConfigError
        If a parameter or buffer has no shape yet, none is to be trained, or body and head share
        one.
    """
    for place, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ConfigError(
                f"model.name = {name!r}: {place} has no shape yet, as its lazy module took "
                "no part when a sample went through the model; give the module its size, "
                "or leave it out"
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"model.name = {name!r}: all parameters are frozen (requires_grad = False), "
            "so there is nothing to train; leave at least those of the head free"
        )
    body = model.get_submodule("body")
    in_body = {parameter: place for place, parameter in body.named_parameters()}
    for place, parameter in model.get_submodule("head").named_parameters():
        # Weight decay and exchange treat body and head differently; a shared parameter would be
        # in both.
        if parameter in in_body:
            raise ConfigError(
                f"model.name = {name!r}: head.{place} is also body.{in_body[parameter]}, "
                "and learners treat body and head apart; give the head a parameter of its "
                "own"
            )
