"""How many clients are trained at once (:mod:`fedknow.client.together`)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from fedknow.client.compute.cost import Meter
from fedknow.client.compute.sizes import module_bytes
from fedknow.client.data.samples import SampleSpec, as_spec
from fedknow.client.learners.frames.hooks import Hooks
from fedknow.client.learners.frames.learner import Learner
from fedknow.client.models.frozen import Backbone
from fedknow.protocols.config import ConfigError

__all__ = ["FEWEST", "clients_at_once"]

# Measured by benchmarks/vmap_clients.py, on a processor. Nothing was measured on a GPU, which
# no small model fills.
FEWEST = 4
"""Fewer clients are trained faster one by one."""
_MOST = 128
"""More clients at once gain nothing."""
_STACKED_BYTES = 8 * 2**20
"""More stacked weights than a processor's cache holds gain nothing either."""
_SMALL = 128 * 1024
"""``auto``: multiply-adds a sample up to which clients at once win.

Of larger models one client fills a core."""
_SHARE = 0.25
"""Share of a GPU's free memory for weights and activations.

The rest is for samples, and for whoever else computes there."""
_DROPOUT = (nn.modules.dropout._DropoutNd,)


def clients_at_once(
    learner: Learner,
    vectorize: Literal["off", "auto", "on"],
    sample: SampleSpec | Sequence[int],
) -> int:
    """Tell how many clients :func:`fit_together` is to train at once.

    It is 1 where they are to be trained one by one.

    Parameters
    ----------
    learner : Learner
        Of the clients.
    vectorize : {"off", "auto", "on"}
        ``engine.vectorize``. ``auto``: on a processor where it was measured to win, which is
        for small models; on a GPU wherever it can be done.
    sample : SampleSpec or sequence of int
        What a sample is; a shape alone is that of 8-bit images.

    Raises
    ------
    ConfigError
        If it is ``on`` and cannot be done, and why not.
    """
    if vectorize == "off":
        return 1
    spec = as_spec(sample)
    if fault := _fault(learner, spec):
        if vectorize == "auto":
            return 1
        raise ConfigError(
            f"engine.vectorize = 'on': {fault}; set engine.vectorize = 'auto' or 'off'"
        )
    if learner.device.type != "cpu":
        # Of what is free now: others may use the same device.
        free, _ = torch.get_device_module(learner.device).mem_get_info(
            learner.device
        )
        limit = min(_MOST, int(_SHARE * free / _step_bytes(learner, spec)))
        return limit if limit >= FEWEST else 1
    if vectorize == "auto" and _multiply_adds(learner.model, spec) > _SMALL:
        return 1
    size = sum(parameter.numel() for parameter in learner.model.parameters())
    # As many as fit into a processor's cache, four bytes a number.
    return max(FEWEST, min(_MOST, _STACKED_BYTES // (4 * size)))


def _fault(learner: Learner, spec: SampleSpec) -> str | None:
    """Return why clients of a learner cannot be trained at once, if so."""
    hooks = (*vars(Hooks), *vars(Learner))
    custom_hooks = [
        name
        for name in hooks
        if name in learner.overridden and name != "__init__" and _is_hook(name)
    ]
    if custom_hooks:
        return (
            f"{type(learner).__name__} trains in a way of its own "
            f"({', '.join(custom_hooks)})"
        )
    return _module_fault(learner.model) or _vmap_fault(learner, spec)


def _module_fault(model: nn.Module) -> str | None:
    """Return which modules of a model would not be trained as one by one."""
    if any(isinstance(module, Backbone) for module in model.modules()):
        return "the model has a frozen part, which takes samples one by one"
    if any(
        isinstance(module, _DROPOUT) and module.p for module in model.modules()
    ):
        return "the model has dropout, whose masks would be others"
    # Running statistics are of one client, and stacked clients would share them.
    if extra_names := sorted(
        model.state_dict().keys() - dict(model.named_parameters()).keys()
    ):
        return (
            "the model has buffers or shared parameters "
            f"({', '.join(extra_names[:3])}), as BatchNorm has"
        )
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        return (
            "the model has BatchNorm, which would see the samples that "
            "short batches are filled up with"
        )
    return None


def _vmap_fault(learner: Learner, spec: SampleSpec) -> str | None:
    """Return why ``torch.vmap`` cannot take a learner's model, if so."""
    model = learner.model
    stacked = {
        name: parameter.detach().expand(2, *parameter.shape)
        for name, parameter in learner.trainable.items()
    }
    try:
        torch.vmap(lambda p, x: functional_call(model, p, (x,)))(
            # Two clients of two samples: a single one could hide an operation on the whole
            # batch.
            stacked,
            spec.blank(2, 2, device=learner.device),
        )
    except Exception as error:  # a user's model may do anything
        return f"torch.vmap cannot take the model: {str(error).strip().splitlines()[0]}"
    return None


def _is_hook(name: str) -> bool:
    """Whether a name of a learner is a method or property.

    Such a name says how the learner trains.
    """
    part = inspect.getattr_static(Learner, name)
    return inspect.isfunction(part) or isinstance(part, property)


def _multiply_adds(model: nn.Module, spec: SampleSpec) -> int:
    """Of one sample's forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(spec.blank(1))
    return int(counter.get_total_flops()) // 2


def _step_bytes(learner: Learner, spec: SampleSpec) -> float:
    """Estimate the bytes that a client's step needs at most.

    They are eight times its weights, and twice what its batch leaves for the backward pass. The
    eight are the weights, gradients, an optimizer's two moments, FedProx's anchor, and copies
    of those under way.
    """
    meter = Meter()
    with meter.message(), meter.part():
        learner.model(spec.blank(2, device=learner.device))
    return (
        8 * module_bytes(learner.model)
        + learner.train.batch_size * meter.cost.peak
    )
