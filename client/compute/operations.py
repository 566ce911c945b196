"""Counting every operation of PyTorch, while that is on."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from torch.utils.hooks import RemovableHandle

__all__ = ["Counting", "Tally"]


class Tally(Protocol):
    """A part of the work, which operations are booked on."""

    flops: int
    samples: int

    def book(self, tensor: Tensor) -> None:
        """Book a new tensor."""


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees each operation, and books it on the innermost part."""

    def __init__(self, parts: Sequence[Tally], network: nn.Module | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parts = parts
        self._network = network
        self._watching: RemovableHandle | None = (
            None  # only while it counts: a module with hooks is slower
        )
        self._on = self._collecting = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to skip it takes longer than most operations

    def set(self, on: bool) -> None:
        """Turn counting on or off."""
        if on and not self._on:
            # What is only freed by the garbage collector would be there for a time that nobody
            # knows.
            self._collecting = gc.isenabled()
            gc.disable()
            if self._network is not None:
                self._watching = self._network.register_forward_pre_hook(
                    self._note
                )
            self.__enter__()  # type: ignore[no-untyped-call]
        elif self._on and not on:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            if self._watching is not None:
                self._watching.remove()
            if self._collecting:
                gc.enable()
        self._on = on

    def _note(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            self._parts[-1].samples += len(inputs[0])

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        kwargs = kwargs or {}
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is None and _composite(func):
            # The mode is off within its own handler; on again, the parts are seen too.
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        part = self._parts[-1]
        if formula is not None:
            part.flops += int(formula(*args, **kwargs, out_val=result))
        if _allocates(func):
            for leaf in (
                (result,) if isinstance(result, Tensor) else tree_leaves(result)
            ):
                if isinstance(leaf, Tensor):
                    part.book(leaf)
        return result


def _vectors(
    x: Tensor, y: Tensor, *_: Any, out_val: Any = None, **__: Any
) -> int:
    """Count the operations of a matrix or a vector times a vector."""
    return 2 * x.numel()


def _attention(
    query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    """Count the operations of attention on a processor."""
    shapes = query.shape, key.shape, value.shape
    return int(sdpa_flop_count(*shapes))  # type: ignore[no-untyped-call]


def _attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: Any,
    **__: Any,
) -> int:
    """Count the operations of attention's backward pass on a processor."""
    shapes = gradient.shape, query.shape, key.shape, value.shape
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


def _lstm(x: Tensor, inputs: Tensor, state: Tensor, *_: Any, **__: Any) -> int:
    """Count a fused LSTM layer on a processor: two products a step."""
    return 2 * _steps(x) * (inputs.numel() + state.numel())


def _lstm_backward(x: Tensor, *weights: Any, **_: Any) -> int:
    """Count gradients by the inputs and by the weights: a product each."""
    return 2 * _lstm(x, *weights)


def _recurrent(x: Tensor, weights: Sequence[Tensor], *_: Any, **__: Any) -> int:
    """Count fused recurrent layers on a GPU: products with all matrices."""
    matrices = [weight.numel() for weight in weights if weight.dim() == 2]
    return 2 * _steps(x) * sum(matrices)


def _recurrent_backward(
    x: Tensor, weights: Sequence[Tensor], *_: Any, **__: Any
) -> int:
    """Count gradients by the inputs and by the weights: a product each."""
    return 2 * _recurrent(x, weights)


def _steps(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _encoder_layer(
    x: Tensor, dim: int, heads: int, *arguments: Any, **_: Any
) -> int:
    """Count PyTorch's fused encoder layer: its matrices, and attention."""
    matrices = [w for w in arguments if isinstance(w, Tensor) and w.dim() == 2]
    # A mask has the size of a matrix, and stands behind the weights.
    products = sum(weight.numel() for weight in matrices[:4])
    return 2 * (x.numel() // dim) * products + _scores(x, dim)


def _native_attention(
    x: Tensor, key: Tensor, value: Tensor, dim: int, *arguments: Any, **_: Any
) -> int:
    """Count PyTorch's fused multi-head attention of a sequence to itself."""
    matrices = [w for w in arguments if isinstance(w, Tensor) and w.dim() == 2]
    products = sum(weight.numel() for weight in matrices[:2])
    return 2 * (x.numel() // dim) * products + _scores(x, dim)


def _scores(x: Tensor, dim: int) -> int:
    """Count products of queries with keys, and of scores with values."""
    if x.is_nested:  # sequences of unequal lengths, without what fills them up
        lengths = x._nested_tensor_size()[:, 0].tolist()
    else:
        lengths = [x.shape[1]] * x.shape[0]
    return sum(4 * int(length) ** 2 * dim for length in lengths)


def _fourier(x: Tensor, *_: Any, **__: Any) -> int:
    """Count a real Fourier transform: 5/2 n log2 n (Cooley and Tukey)."""
    length = x.shape[-1]
    return int(2.5 * x.numel() * math.log2(max(2, length)))


_aten = torch.ops.aten
_FORMULAS = flop_registry | {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten.mkldnn_rnn_layer: _lstm,
    _aten.mkldnn_rnn_layer_backward: _lstm_backward,
    _aten._transformer_encoder_layer_fwd: _encoder_layer,
    _aten._native_multi_head_attention: _native_attention,
    _aten._cudnn_rnn: _recurrent,
    _aten._cudnn_rnn_backward: _recurrent_backward,
    _aten._fft_r2c: _fourier,
    torch.ops.aten.mv: _vectors,
    torch.ops.aten.dot: _vectors,
    torch.ops.aten.vdot: _vectors,
}


@cache
def _composite(func: Any) -> bool:
    """Whether an operation consists of others, as in inference mode."""
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        )
    )


@cache
def _allocates(func: Any) -> bool:
    """Whether an operation returns new memory.

    It does not where it returns a view, or what it was given.
    """
    return all(value.alias_info is None for value in func._schema.returns)
