"""Counting every operation of PyTorch, while that is on."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
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
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
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


_FORMULAS = flop_registry | {
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
