"""Layers whose backward pass is cheap to derive.

A pushforward is the derivative of a pullback by its cotangent alone. Torch's own operations
derive their backward pass by the images and the weights too, asked or not: five convolutions
where two are enough, and dozens of passes over the activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

__all__ = ["convolve", "normalize"]

_Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]
"""Stride, padding, dilation, groups of a convolution."""


def convolve(  # noqa: PLR0913  # PyTorch's own arguments
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve as :func:`torch.nn.functional.conv2d` does."""
    if isinstance(padding, str):  # "same" is more than a number
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    device = x.device.type
    if torch.is_autocast_enabled(
        device
    ):  # a Function's inside is not seen by autocast on the way back
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = (
            x.to(dtype),
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
        )
    geometry = (_pair(stride), _pair(padding), _pair(dilation), groups)
    output = _Convolution.apply(x, weight, bias, geometry)  # type: ignore[no-untyped-call]
    return cast(Tensor, output)


class _Convolution(Function):
    """y = x * w + b."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: _Geometry,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, at_y: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return *_Transpose.apply(
            at_y, x, weight, ctx.needs_input_grad[:3], ctx.geometry
        ), None  # type: ignore[no-untyped-call]


class _Transpose(Function):
    """Gradients by x, w and b of ``<at_y, x * w + b>``.

    They are linear in at_y, and differentiated by at_y alone.
    """

    @staticmethod
    def forward(  # noqa: PLR0913  # PyTorch's own arguments
        ctx: Any,
        at_y: Tensor,
        x: Tensor,
        weight: Tensor,
        needs: Sequence[bool],
        geometry: _Geometry,
    ) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.shape = geometry, at_y.shape
        ctx.set_materialize_grads(False)
        stride, padding, dilation, groups = geometry
        return torch.ops.aten.convolution_backward(
            at_y,
            x,
            weight,
            [len(weight)],
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            list(needs),
        )

    @staticmethod
    def backward(
        ctx: Any,
        of_x: Tensor | None,
        of_weight: Tensor | None,
        of_bias: Tensor | None,
    ) -> Any:
        x, weight = ctx.saved_tensors
        tangent: Tensor | float = 0.0
        if of_weight is not None:
            tangent, of_bias = (
                F.conv2d(x, of_weight, of_bias, *ctx.geometry),
                None,
            )
        if of_x is not None:
            tangent, of_bias = (
                tangent + F.conv2d(of_x, weight, of_bias, *ctx.geometry),
                None,
            )
        if of_bias is not None:
            tangent = of_bias.view(-1, 1, 1).expand(ctx.shape)
        # By at_y alone: a pushforward is the derivative by the cotangent, with all else fixed.
        return tangent, None, None, None, None


def normalize(  # noqa: PLR0913  # PyTorch's own arguments
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalize as :func:`torch.nn.functional.batch_norm` does."""
    if (
        training and x.numel() == x.shape[1]
    ):  # as torch refuses it: one value has no variance
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}"
        )
    statistics = (running_mean, running_var, training, momentum, eps)
    output = _Normalization.apply(x, weight, bias, statistics)  # type: ignore[no-untyped-call]
    return cast(Tensor, output)


class _Normalization(Function):
    """y = w (x - mean) / deviation + b, a channel."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Any,
    ) -> Tensor:
        running_mean, running_var, training, _, eps = statistics
        y, mean, inverse = torch.native_batch_norm(x, weight, bias, *statistics)
        if not training:
            # A clone, as the layer's own buffer may change before the backward pass.
            mean, inverse = running_mean.clone(), (running_var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.training, ctx.eps = training, eps
        return y

    @staticmethod
    def backward(ctx: Any, at_y: Tensor) -> Any:
        x, weight, mean, inverse = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        return *_NormalizationTranspose.apply(  # type: ignore[no-untyped-call]
            at_y, x, weight, mean, inverse, needs, ctx.training, ctx.eps
        ), None


class _NormalizationTranspose(Function):
    """Gradients by x, w and b of ``<at_y, y>``.

    They are linear in at_y, differentiated by it alone, and symmetric in x and y.
    """

    @staticmethod
    def forward(  # noqa: PLR0913  # PyTorch's own arguments
        ctx: Any,
        at_y: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        inverse: Tensor,
        needs: Sequence[bool],
        training: bool,
        eps: float,
    ) -> Any:
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.training, ctx.eps, ctx.shape = training, eps, at_y.shape
        ctx.set_materialize_grads(False)
        return _normalization_backward(
            at_y, x, weight, mean, inverse, training, eps, needs
        )

    @staticmethod
    def backward(
        ctx: Any,
        of_x: Tensor | None,
        of_weight: Tensor | None,
        of_bias: Tensor | None,
    ) -> Any:
        x, weight, mean, inverse = ctx.saved_tensors
        tangent: Tensor | float = 0.0
        if of_x is not None:
            fixed = weight, mean, inverse, ctx.training, ctx.eps
            tangent = _normalization_backward(
                of_x, x, *fixed, (True, False, False)
            )[0]
        if of_weight is not None:
            # Undoes the rsqrt, as PyTorch's own call wants a variance and not its inverse root.
            variance = inverse**-2 - ctx.eps
            tangent = (
                tangent
                + torch.native_batch_norm(
                    x, of_weight, of_bias, mean, variance, False, 0.0, ctx.eps
                )[0]
            )
        elif of_bias is not None:
            tangent = tangent + of_bias.view(
                -1, *[1] * (len(ctx.shape) - 2)
            ).expand(ctx.shape)
        return tangent, *[None] * 7


def _normalization_backward(  # noqa: PLR0913  # PyTorch's own arguments
    at_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
    training: bool,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    variance = None if training else inverse**-2 - eps
    return torch.ops.aten.native_batch_norm_backward(  # type: ignore[no-any-return]
        at_y,
        x,
        weight,
        None if training else mean,
        variance,
        mean,
        inverse,
        training,
        eps,
        list(needs),
    )


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
