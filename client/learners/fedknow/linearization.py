"""A network's body, linearised at one batch.

Products with its Jacobian come from one forward pass.

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

import weakref
from collections.abc import Iterator, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fedknow.client.learners.fedknow.flat import flatten, views
from fedknow.client.learners.fedknow.second_order import convolve, normalize
from fedknow.client.learners.frames.learner import widen

__all__ = ["Linearization", "factorable"]


_FUSED = (nn.RNNBase, nn.MultiheadAttention)
"""Modules that may run kernels whose backward pass has no derivative."""


@contextmanager
def plain_kernels(body: nn.Module) -> Iterator[None]:
    """Run a body's layers so that they can be differentiated twice.

    Fused kernels of attention and of recurrent layers cannot; the plain ones give the same
    up to rounding. Bodies without such layers are left alone.

    Parameters
    ----------
    body : nn.Module
        Samples to features.
    """
    if not _has_fused_layers(body):
        yield
        return
    with (
        sdpa_kernel(SDPBackend.MATH),
        torch.backends.mkldnn.flags(enabled=False),
        torch.backends.cudnn.flags(enabled=False),
    ):
        yield


def _has_fused_layers(body: nn.Module) -> bool:
    if body not in _fused:
        # Once a body: a walk through all modules takes longer than a small step.
        modules = body.modules()
        _fused[body] = any(isinstance(module, _FUSED) for module in modules)
    return _fused[body]


_fused: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def factorable(
    body: nn.Module, x: Tensor, threshold: int = 1 << 16
) -> frozenset[nn.Parameter]:
    """Find the large weights that a body uses once, in a product of matrices.

    Parameters
    ----------
    body : nn.Module
        Samples to features; it is put in evaluation mode.
    x : Tensor
        A few samples to try it on.
    threshold : int
        Entries from which on a weight is large.
    """
    # Dropout and batch statistics must not decide what is factored.
    body.eval()
    weights = {
        p
        for p in body.parameters()
        # A small weight's gradient is short already, and its factors cost a decomposition.
        if p.requires_grad and p.dim() == 2 and p.numel() >= threshold
    }
    tracer = _Tracer(weights, probe=True)
    with tracer:
        features = body(x)
    if not (weights and features.requires_grad):
        return frozenset()
    # Any gradient left shows another use, as the factored one is detached.
    elsewhere = torch.autograd.grad(
        features.sum(), list(weights), allow_unused=True
    )
    once = {
        w
        for w, gradient in zip(weights, elsewhere, strict=True)
        if gradient is None
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
        Samples to features ``[n, f]``.
    x : Tensor
        The batch, [n, ...].
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
        with context or nullcontext(), plain_kernels(body), tracer:
            self._features = widen(body(x))
        self.features = self._features.detach()
        self.parameters = [
            parameter
            for parameter in body.parameters()
            if parameter.requires_grad
        ]
        self.reached = [False] * len(self.parameters)
        self._factors = tracer.factors
        self._leaves = [
            # By its coordinates a factored weight has fewer entries than the weight itself.
            tracer.factors[p][0] if p in tracer.factors else p
            for p in self.parameters
        ]
        self.size = sum(leaf.numel() for leaf in self._leaves)
        # None = None | Set by a pullback: J u is the derivative of J^T c by c.
        self._transpose: tuple[Tensor, list[Tensor]] | None = None

    def pullback(
        self,
        cotangent: Tensor,
        out: Tensor,
        forward: bool = False,
    ) -> Tensor:
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
        # A leaf of its own, by which the pullback is differentiated for pushforwards.
        cotangent = cotangent.detach().requires_grad_(forward)
        gradients = torch.autograd.grad(
            self._features,
            self._leaves,
            cotangent,
            retain_graph=True,
            create_graph=forward,
            allow_unused=True,
        )
        self.reached = [part is not None for part in gradients]
        parts = [
            torch.zeros_like(leaf) if part is None else part
            for part, leaf in zip(gradients, self._leaves, strict=True)
        ]
        if forward:
            self._transpose = cotangent, parts
        return flatten(parts, self._leaves, out)

    def pushforward(self, direction: Tensor) -> Tensor:
        """Compute J u: float [size] to float [n, f].

        A pullback with ``forward=True`` must come before.

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
            # A part that does not depend on the cotangent is zero in every pushforward.
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

    def full_length(self, flat: Tensor) -> Tensor:
        """Write a vector without coordinates: float [size] -> float [p]."""
        return flatten(self.expand(flat), self.parameters)

    def expand(self, flat: Tensor) -> list[Tensor]:
        """Split a flat vector into tensors of the parameters' shapes and strides.

        They may share its memory.
        """
        parts = views(flat, self._leaves)
        return [
            part @ self._factors[parameter][1].T
            if parameter in self._factors
            else part
            for parameter, part in zip(self.parameters, parts, strict=True)
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
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            return convolve(*args, **kwargs)
        if func is F.batch_norm:
            return normalize(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            # The fused kernels' backward pass has no derivative.
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **kwargs)
        if func is F.linear and len(args) > 1 and args[1] in self._factored:
            return self._linear(*args, **kwargs)
        return func(*args, **kwargs)

    def _linear(
        self,
        x: Tensor,
        weight: nn.Parameter,
        bias: Tensor | None = None,
    ) -> Tensor:
        if weight in self.factors:
            # Used twice, its gradient is a sum that one set of coordinates does not span.
            self.again.add(weight)
        # With a large batch the coordinates are no shorter than the gradient.
        if x.dim() != 2 or not (self._probe or 2 * len(x) <= weight.shape[1]):
            return F.linear(x, weight, bias)
        # A linear layer's gradient lies in the span of its inputs, of which Q is a basis.
        q, r = torch.linalg.qr(widen(x.detach()).T)
        coordinates = r.new_zeros(len(weight), len(r)).requires_grad_()
        self.factors[weight] = coordinates, q
        # The coordinates are zero: they change no answer, and only take the gradient.
        return F.linear(x, weight.detach(), bias) + F.linear(r.T, coordinates)
