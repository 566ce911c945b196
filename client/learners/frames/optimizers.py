"""Optimizers and memory formats of parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fedknow.protocols.config import TrainConfig

__all__ = [
    "channels_last",
    "drop_gradients",
    "make_optimizer",
    "use_channels_last",
]

_LARGE = 1 << 15
"""Entries of a batch of features from which on the format of their gradient is seen to.

In fewer the format matters less than what it takes to see to it."""


def make_optimizer(
    train: TrainConfig,
    body: Iterable[Tensor],
    head: Iterable[Tensor],
    should_align: bool = True,
) -> torch.optim.Optimizer:
    """Make the optimizer of one round. Frozen parameters are left out.

    Parameters
    ----------
    train : TrainConfig
        Which optimizer, its learning rate and so on.
    body, head : iterable of Tensor
        The parameters. The L2 term acts on the body alone: in the head it would shrink the
        rows of earlier tasks.
    should_align : bool
        Whether gradients may have another memory format than their parameters. They have not
        where ``backward`` alone makes them.
    """
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in body if parameter.requires_grad]},
        {
            "params": [
                parameter for parameter in head if parameter.requires_grad
            ],
            "weight_decay": 0.0,
        },
    ]
    if not train.weight_decay:
        # One group: a fused step of each would be a call of its own.
        groups = [{"params": groups[0]["params"] + groups[1]["params"]}]
    settings: dict[str, Any] = {
        "lr": train.lr,
        "weight_decay": train.weight_decay,
        # One kernel for all parameters, where small models spend their time in calls.
        "fused": True,
    }
    optimizer: torch.optim.Optimizer
    if train.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=train.momentum, **settings)
    elif train.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, **settings)
    else:
        optimizer = torch.optim.Adam(groups, **settings)
    if should_align:
        optimizer.register_step_pre_hook(_align_gradients)
    return optimizer


def drop_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Leave an optimizer's parameters without gradients.

    ``zero_grad`` does the same. It also notes each call for PyTorch's profiler, which counts in a
    small network's step.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # None and not zeros: the optimizer must leave such parameters alone.
            parameter.grad = None


def _align_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Put gradients into their parameters' memory format.

    Fused steps rely on it.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            # A fused step is fast only where both lie in memory the same way.
            if gradient is not None and gradient.stride() != parameter.stride():
                parameter.grad = torch.empty_like(parameter).copy_(gradient)


def channels_last(x: Tensor) -> Tensor:
    """Lay images out channels-last, which convolutions are fastest with.

    Samples of other kinds have no such format, and stay as they are.
    """
    if x.dim() != 4:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def use_channels_last(model: nn.Module) -> None:
    """Lay a model's weights out channels-last, in place."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in model.modules():
        if isinstance(module, nn.Flatten):
            # Only there does a model of images change to another format.
            module.register_forward_pre_hook(_flatten_both_ways)


def _flatten_both_ways(module: nn.Module, inputs: tuple[Tensor]) -> None:
    """Have the gradient of flat features come back channels-last.

    Max-pooling takes five times as long with another format.
    """
    (x,) = inputs
    # First, since an export, which needs no gradient, cannot follow a question about sizes.
    if not x.requires_grad or x.dim() != 4 or x.numel() < _LARGE:
        return
    # Tensors that functorch has wrapped take no hooks.
    if not torch._C._functorch.is_functorch_wrapped_tensor(x):
        x.register_hook(channels_last)  # type: ignore[no-untyped-call]
