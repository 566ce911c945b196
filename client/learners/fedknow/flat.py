"""Gradients as flat vectors, and flat vectors as gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["flatten", "flatten_present", "free_parameters", "views"]


def views(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """A flat vector as tensors of the parameters' shapes and strides, which share its memory.

    In the order of memory, that is: an optimizer is fast only where gradients are laid out as
    parameters are.

    Parameters
    ----------
    flat : Tensor
        Float [p].
    parameters : sequence of Tensor
        With p entries in all.
    """
    parts, start = [], flat.storage_offset()
    for parameter in parameters:
        strides = torch.empty_like(parameter, device="meta").stride()
        parts.append(flat.as_strided(parameter.shape, strides, start))
        start += parameter.numel()
    return parts


def flatten(
    parts: Sequence[Tensor], parameters: Sequence[Tensor], out: Tensor | None = None
) -> Tensor:
    """The reverse of :func:`views`: tensors of the parameters' shapes as one flat vector, float [p]."""
    flat = (
        parts[0].new_empty(sum(parameter.numel() for parameter in parameters))
        if out is None
        else out
    )
    with torch.no_grad():
        torch._foreach_copy_(views(flat, parameters), list(parts))
    return flat


def flatten_present(
    parts: Sequence[Tensor | None], parameters: Sequence[Tensor]
) -> tuple[Tensor, list[bool]]:
    """Gradients as one flat vector, zero where there is none, and where there is one."""
    pairs = zip(parts, parameters, strict=True)
    filled = [
        torch.zeros_like(parameter) if part is None else part
        for part, parameter in pairs
    ]
    return flatten(filled, parameters), [part is not None for part in parts]


def free_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
