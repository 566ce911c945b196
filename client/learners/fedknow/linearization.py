"""A network's body, linearised at one batch: products with its Jacobian from one forward pass.

With parameters w and features f(x; w) of a batch, J = df/dw. The gradient of any loss on the
features, whose own gradient by the features is c, is the *pullback* J^T c (a backward pass);
what a step u along the parameters does to the features is the *pushforward* J u, and ``<c, J u>
= <J^T c, u>``.

The pushforward is taken without a second forward pass: J^T c is linear in c, so J u is the
derivative of ``<J^T c, u>`` by c, a backward pass through the graph of a backward pass. It
therefore sees the same dropout mask and the same batch statistics as the pullbacks, and moves
no running statistics.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fedknow.client.learners.frames.learner import widen

__all__ = ["Linearization", "factorable", "flatten", "views"]

_Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]
"""Stride, padding, dilation, groups of a convolution."""


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


def factorable(
    body: nn.Module, x: Tensor, threshold: int = 1 << 16
) -> frozenset[nn.Parameter]:
    """The large weights that a body multiplies a matrix by, once, and does nothing else with.

    Parameters
    ----------
    body : nn.Module
        Images to features; it is put in evaluation mode.
    x : Tensor
        A few samples to try it on.
    threshold : int
        Entries from which on a weight is large.
    """
    body.eval()
    weights = {
        p
        for p in body.parameters()
        if p.requires_grad and p.dim() == 2 and p.numel() >= threshold
    }
    tracer = _Tracer(weights, probe=True)
    with tracer:
        features = body(x)
    if not (weights and features.requires_grad):
        return frozenset()
    elsewhere = torch.autograd.grad(features.sum(), list(weights), allow_unused=True)
    once = {
        w for w, gradient in zip(weights, elsewhere, strict=True) if gradient is None
    }
    return frozenset(once & tracer.factors.keys() - tracer.again)


class Linearization:
    """The body at one batch.

    A vector of R^p, such as a gradient, is one flat tensor, and inner products are those of
    R^p. It may be shorter: a gradient by the weight of a linear layer is ``D^T A`` with the
    layer's inputs A, float [n, inputs], so all gradients of the batch lie in the span of A's
    rows. With A^T = Q R, Q's columns orthonormal, they are kept as coordinates ``(R D)^T``,
    float [outputs, n], which have the same inner products.

    Parameters
    ----------
    body : nn.Module
        Images to features ``[n, f]``.
    x : Tensor
        The batch, float [n, C, H, W].
    context : context manager
        That of the forward pass (:meth:`~fedknow.client.learners.frames.learner.Learner.autocast`).
    factored : set of Parameter
        The weights to keep coordinates of, where that is shorter (:func:`factorable`).

    Attributes
    ----------
    features : Tensor
        f(x; w), float [n, f], without a graph.
    size : int
        Length of a flat vector.
    reached : list of bool
        Which parameters the features depend on; known after a pullback. Of the others all
        gradients are zero.
    """

    def __init__(
        self,
        body: nn.Module,
        x: Tensor,
        context: AbstractContextManager[Any] | None = None,
        factored: Set[nn.Parameter] = frozenset(),
    ) -> None:
        tracer = _Tracer(factored)
        with context or nullcontext(), tracer:
            self._features = widen(body(x))
        self.features = self._features.detach()
        self._parameters = [
            parameter for parameter in body.parameters() if parameter.requires_grad
        ]
        self.reached = [False] * len(self._parameters)
        self._factors = tracer.factors
        self._leaves = [
            tracer.factors[p][0] if p in tracer.factors else p for p in self._parameters
        ]
        self.size = sum(leaf.numel() for leaf in self._leaves)
        self._transpose: tuple[Tensor, list[Tensor]] | None = None

    def pullback(self, cotangent: Tensor, out: Tensor, forward: bool = False) -> Tensor:
        """J^T c into ``out``: float [n, f] -> float [size].

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
        found = torch.autograd.grad(
            self._features,
            self._leaves,
            cotangent,
            retain_graph=True,
            create_graph=forward,
            allow_unused=True,
        )
        self.reached = [part is not None for part in found]
        parts = [
            torch.zeros_like(leaf) if part is None else part
            for part, leaf in zip(found, self._leaves, strict=True)
        ]
        if forward:
            self._transpose = cotangent, parts
        return flatten(parts, self._leaves, out)

    def pushforward(self, direction: Tensor) -> Tensor:
        """J u: float [size] -> float [n, f]. After a pullback with ``forward=True``.

        Raises
        ------
        RuntimeError
            If an operation of the body cannot be differentiated twice.
        """
        if self._transpose is None:
            raise RuntimeError(
                "pushforward needs a pullback with forward=True before it"
            )
        cotangent, parts = self._transpose
        steps = views(direction, self._leaves)
        pairs = [
            (part, step)
            for part, step in zip(parts, steps, strict=True)
            if part.requires_grad
        ]
        (result,) = torch.autograd.grad(
            [part for part, _ in pairs],
            cotangent,
            [step for _, step in pairs],
            retain_graph=True,
            materialize_grads=True,
        )
        return result

    def expand(self, flat: Tensor) -> list[Tensor]:
        """A flat vector as tensors of the parameters' shapes and strides, which may share its memory."""
        parts = views(flat, self._leaves)
        return [
            part @ self._factors[parameter][1].T if parameter in self._factors else part
            for parameter, part in zip(self._parameters, parts, strict=True)
        ]


class _Tracer(TorchFunctionMode):
    """Has a body's layers do what its linearization needs.

    Convolutions and batch normalisations are differentiated twice by the formulas below.
    Torch's own take five convolutions where two will do, and dozens of passes over the
    activations for one, for they also derive by the images and the weights, asked or not.
    Linear layers get coordinates of their weights' gradients: a leaf of zeros, by which the
    layer's output is derived as by the weight.
    """

    def __init__(self, factored: Set[nn.Parameter], probe: bool = False) -> None:
        super().__init__()
        self._factored = factored
        self._probe = probe
        self.factors: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
        self.again: set[nn.Parameter] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            return _convolve(*args, **kwargs)
        if func is F.batch_norm:
            return _normalize(*args, **kwargs)
        if func is F.linear and len(args) > 1 and args[1] in self._factored:
            return self._linear(*args, **kwargs)
        return func(*args, **kwargs)

    def _linear(
        self, x: Tensor, weight: nn.Parameter, bias: Tensor | None = None
    ) -> Tensor:
        if weight in self.factors:
            self.again.add(weight)
        if x.dim() != 2 or not (self._probe or 2 * len(x) <= weight.shape[1]):
            return F.linear(x, weight, bias)
        q, r = torch.linalg.qr(widen(x.detach()).T)
        coordinates = r.new_zeros(len(weight), len(r)).requires_grad_()
        self.factors[weight] = coordinates, q
        return F.linear(x, weight.detach(), bias) + F.linear(r.T, coordinates)


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
    return cast(Tensor, _Convolution.apply(x, weight, bias, geometry))  # type: ignore[no-untyped-call]


class _Convolution(Function):
    """y = x * w + b."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry
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
    """Gradients by x, w and b of ``<at_y, x * w + b>``: linear in at_y, and differentiated by at_y
    alone."""

    @staticmethod
    def forward(
        ctx: Any,
        at_y: Tensor,
        x: Tensor,
        weight: Tensor,
        wanted: Sequence[bool],
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
            list(wanted),
        )

    @staticmethod
    def backward(
        ctx: Any, of_x: Tensor | None, of_weight: Tensor | None, of_bias: Tensor | None
    ) -> Any:
        x, weight = ctx.saved_tensors
        tangent: Tensor | float = 0.0
        if of_weight is not None:
            tangent, of_bias = F.conv2d(x, of_weight, of_bias, *ctx.geometry), None
        if of_x is not None:
            tangent, of_bias = (
                tangent + F.conv2d(of_x, weight, of_bias, *ctx.geometry),
                None,
            )
        if of_bias is not None:
            tangent = of_bias.view(-1, 1, 1).expand(ctx.shape)
        return tangent, None, None, None, None


def _normalize(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if (
        training and x.numel() == x.shape[1]
    ):  # as torch refuses it: one value has no variance
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}"
        )
    statistics = (running_mean, running_var, training, momentum, eps)
    return cast(Tensor, _Normalization.apply(x, weight, bias, statistics))  # type: ignore[no-untyped-call]


class _Normalization(Function):
    """y = w (x - mean) / deviation + b, a channel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Any
    ) -> Tensor:
        running_mean, running_var, training, _, eps = statistics
        y, mean, inverse = torch.native_batch_norm(x, weight, bias, *statistics)
        if not training:
            mean, inverse = running_mean.clone(), (running_var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.training, ctx.eps = training, eps
        return y

    @staticmethod
    def backward(ctx: Any, at_y: Tensor) -> Any:
        x, weight, mean, inverse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        return *_NormalizationTranspose.apply(  # type: ignore[no-untyped-call]
            at_y, x, weight, mean, inverse, wanted, ctx.training, ctx.eps
        ), None


class _NormalizationTranspose(Function):
    """Gradients by x, w and b of ``<at_y, y>``: linear in at_y, differentiated by it alone,
    symmetric in x and y."""

    @staticmethod
    def forward(
        ctx: Any,
        at_y: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        inverse: Tensor,
        wanted: Sequence[bool],
        training: bool,
        eps: float,
    ) -> Any:
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.training, ctx.eps, ctx.shape = training, eps, at_y.shape
        ctx.set_materialize_grads(False)
        return _normalization_backward(
            at_y, x, weight, mean, inverse, training, eps, wanted
        )

    @staticmethod
    def backward(
        ctx: Any, of_x: Tensor | None, of_weight: Tensor | None, of_bias: Tensor | None
    ) -> Any:
        x, weight, mean, inverse = ctx.saved_tensors
        tangent: Tensor | float = 0.0
        if of_x is not None:
            fixed = weight, mean, inverse, ctx.training, ctx.eps
            tangent = _normalization_backward(of_x, x, *fixed, (True, False, False))[0]
        if of_weight is not None:
            variance = inverse**-2 - ctx.eps
            tangent = (
                tangent
                + torch.native_batch_norm(
                    x, of_weight, of_bias, mean, variance, False, 0.0, ctx.eps
                )[0]
            )
        elif of_bias is not None:
            tangent = tangent + of_bias.view(-1, *[1] * (len(ctx.shape) - 2)).expand(
                ctx.shape
            )
        return tangent, *[None] * 7


def _normalization_backward(
    at_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
    training: bool,
    eps: float,
    wanted: Sequence[bool],
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
        list(wanted),
    )


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
