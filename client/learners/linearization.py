"""A network's body, linearised at one batch: products with its Jacobian from one forward pass.

With parameters w and features f(x; w) of a batch, J = df/dw. The gradient of any loss on the features, whose own
gradient by the features is c, is the *pullback* J^T c (a backward pass); what a step u along the parameters does to
the features is the *pushforward* J u, and ``<c, J u> = <J^T c, u>``.

The pushforward is taken without a second forward pass: J^T c is linear in c, so J u is the derivative of
``<J^T c, u>`` by c, a backward pass through the graph of a backward pass. It therefore sees the same dropout mask and
the same batch statistics as the pullbacks, and moves no running statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fedknow.client.learners.base import widen

__all__ = ["Linearization", "flatten", "views"]

_Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]
"""Stride, padding, dilation, groups of a convolution."""


def views(flat: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """A flat vector as tensors of the parameters' shapes and strides, which share its memory.

    In the order of memory, that is: an optimizer is fast only where gradients are laid out as parameters are.

    Parameters
    ----------
    flat : Tensor
        Float [p].
    parameters : sequence of Parameter
        With p entries in all.
    """
    parts, start = [], flat.storage_offset()
    for parameter in parameters:
        strides = torch.empty_like(parameter, device="meta").stride()
        parts.append(flat.as_strided(parameter.shape, strides, start))
        start += parameter.numel()
    return parts


def flatten(parts: Sequence[Tensor], parameters: Sequence[nn.Parameter], out: Tensor | None = None) -> Tensor:
    """The reverse of :func:`views`: tensors of the parameters' shapes as one flat vector, float [p]."""
    flat = parts[0].new_empty(sum(parameter.numel() for parameter in parameters)) if out is None else out
    with torch.no_grad():
        torch._foreach_copy_(views(flat, parameters), list(parts))
    return flat


class Linearization:
    """The body at one batch.

    Parameters
    ----------
    body : nn.Module
        Images to features ``[n, f]``.
    x : Tensor
        The batch, float [n, C, H, W].
    parameters : sequence of Parameter
        What the Jacobian is taken by: p entries in all. Every vector of R^p is laid out as :func:`views` says.
    context : context manager
        That of the forward pass (:meth:`~fedknow.client.learners.base.Learner.autocast`).

    Attributes
    ----------
    features : Tensor
        f(x; w), float [n, f], without a graph.
    """

    def __init__(
        self,
        body: nn.Module,
        x: Tensor,
        parameters: Sequence[nn.Parameter],
        context: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._parameters = list(parameters)
        with context or nullcontext(), _LeanConvolutions():
            self._features = widen(body(x))
        self.features = self._features.detach()
        self._transpose: tuple[Tensor, list[Tensor]] | None = None

    def pullback(self, cotangent: Tensor, out: Tensor, forward: bool = False) -> Tensor:
        """J^T c into ``out``: float [n, f] -> float [p].

        Parameters
        ----------
        cotangent : Tensor
            c.
        out : Tensor
            Where to write it.
        forward : bool
            Prepare for :meth:`pushforward`, which one pullback must.
        """
        cotangent = cotangent.detach().requires_grad_(forward)
        parts = torch.autograd.grad(
            self._features, self._parameters, cotangent, retain_graph=True, create_graph=forward, materialize_grads=True
        )
        if forward:
            self._transpose = cotangent, list(parts)
        return flatten(parts, self._parameters, out)

    def pushforward(self, direction: Tensor) -> Tensor:
        """J u: float [p] -> float [n, f]. After a pullback with ``forward=True``.

        Raises
        ------
        RuntimeError
            If an operation of the body cannot be differentiated twice.
        """
        if self._transpose is None:
            raise RuntimeError("pushforward needs a pullback with forward=True before it")
        cotangent, parts = self._transpose
        steps = views(direction, self._parameters)
        pairs = [(part, step) for part, step in zip(parts, steps, strict=True) if part.requires_grad]
        (result,) = torch.autograd.grad(
            [part for part, _ in pairs],
            cotangent,
            [step for _, step in pairs],
            retain_graph=True,
            materialize_grads=True,
        )
        return result


class _LeanConvolutions(TorchFunctionMode):
    """Has convolutions differentiated twice in two convolutions each.

    Torch's own formula takes five, for it also derives by the image and by the filter, asked or not.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_convolve if func is F.conv2d else func)(*args, **(kwargs or {}))


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    if isinstance(padding, str):  # "same" is more than a number
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    device = x.device.type
    if torch.is_autocast_enabled(device):  # a Function's inside is not seen by autocast on the way back
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    geometry = (_pair(stride), _pair(padding), _pair(dilation), groups)
    return cast(Tensor, _Convolution.apply(x, weight, bias, geometry))  # type: ignore[no-untyped-call]


class _Convolution(Function):
    """y = x * w + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, at_y: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return *_Transpose.apply(at_y, x, weight, ctx.needs_input_grad[:3], ctx.geometry), None  # type: ignore[no-untyped-call]


class _Transpose(Function):
    """Gradients by x, w and b of ``<at_y, x * w + b>``: linear in at_y, and differentiated by at_y alone."""

    @staticmethod
    def forward(ctx: Any, at_y: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool], geometry: _Geometry) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.shape = geometry, at_y.shape
        ctx.set_materialize_grads(False)
        stride, padding, dilation, groups = geometry
        return torch.ops.aten.convolution_backward(
            at_y, x, weight, [len(weight)], stride, padding, dilation, False, [0, 0], groups, list(wanted)
        )

    @staticmethod
    def backward(ctx: Any, of_x: Tensor | None, of_weight: Tensor | None, of_bias: Tensor | None) -> Any:
        x, weight = ctx.saved_tensors
        tangent: Tensor | float = 0.0
        if of_weight is not None:
            tangent, of_bias = F.conv2d(x, of_weight, of_bias, *ctx.geometry), None
        if of_x is not None:
            tangent, of_bias = tangent + F.conv2d(of_x, weight, of_bias, *ctx.geometry), None
        if of_bias is not None:
            tangent = of_bias.view(-1, 1, 1).expand(ctx.shape)
        return tangent, None, None, None, None


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
