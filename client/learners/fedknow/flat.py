"""Gradients as flat vectors of R^p, and flat vectors as gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = [
    "flatten",
    "flatten_present",
    "free_parameters",
    "set_gradients",
    "views",
]


def views(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """View a flat vector as tensors of the parameters' shapes and strides.

    Parameters
    ----------
    flat : Tensor
        Float [p].
    parameters : sequence of Tensor
        With p entries in all.

    Returns
    -------
    list of Tensor
        One for each parameter. They share the vector's memory.

    Examples
    --------
    >>> weight, bias = torch.zeros(2, 2), torch.zeros(1)
    >>> [part.tolist() for part in views(torch.arange(5.0), [weight, bias])]
    [[[0.0, 1.0], [2.0, 3.0]], [4.0]]
    """
    parts = []
    # as_strided counts from the storage's beginning, and a row of the buffer starts later.
    start = flat.storage_offset()
    for parameter in parameters:
        # Strides too: an optimizer is fast only where gradients are laid out as parameters are.
        strides = torch.empty_like(parameter, device="meta").stride()
        parts.append(flat.as_strided(parameter.shape, strides, start))
        start += parameter.numel()
    return parts


def flatten(
    parts: Sequence[Tensor],
    parameters: Sequence[Tensor],
    out: Tensor | None = None,
) -> Tensor:
    """Copy tensors of the parameters' shapes into one flat vector.

    The reverse of :func:`views`.

    Parameters
    ----------
    parts : sequence of Tensor
        One for each parameter.
    parameters : sequence of Tensor
        With p entries in all.
    out : Tensor, optional
        Where to write, float [p]; new memory by default.

    Returns
    -------
    Tensor
        Float [p].
    """
    if out is None:
        out = parts[0].new_empty(
            sum(parameter.numel() for parameter in parameters)
        )
    with torch.no_grad():
        # One call for all parameters, of which a network has hundreds.
        torch._foreach_copy_(views(out, parameters), list(parts))
    return out


def flatten_present(
    parts: Sequence[Tensor | None], parameters: Sequence[Tensor]
) -> tuple[Tensor, list[bool]]:
    """Copy gradients into one flat vector, with zeros where there is none.

    Returns
    -------
    flat : Tensor
        Float [p].
    is_present : list of bool
        Which parameters have a gradient.
    """
    filled = [
        torch.zeros_like(parameter) if part is None else part
        for part, parameter in zip(parts, parameters, strict=True)
    ]
    return flatten(filled, parameters), [part is not None for part in parts]


def set_gradients(
    parameters: Sequence[nn.Parameter],
    parts: Sequence[Tensor],
    reached: Sequence[bool],
) -> None:
    """Put gradients into the parameters that the batch depends on.

    Parameters
    ----------
    parameters : sequence of Parameter
        Those of the body that are trained.
    parts : sequence of Tensor
        Their gradients.
    reached : sequence of bool
        Which of them the batch depends on.
    """
    for parameter, part, is_reached in zip(
        parameters, parts, reached, strict=True
    ):
        # A gradient of zeros is not the same as none: weight decay would move the parameter.
        parameter.grad = part if is_reached else None


def free_parameters(module: nn.Module) -> list[nn.Parameter]:
    """List the parameters that are not frozen."""
    return [
        parameter for parameter in module.parameters() if parameter.requires_grad
    ]
