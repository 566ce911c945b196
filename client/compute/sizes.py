"""Sizes of tensors, in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["module_bytes", "tensor_bytes"]


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested mappings and lists."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    if isinstance(tree, Mapping):
        return sum(map(tensor_bytes, tree.values()))
    return sum(map(tensor_bytes, tree)) if isinstance(tree, list | tuple) else 0


def module_bytes(*modules: nn.Module) -> int:
    """Bytes of all parameters and buffers of some modules, each counted once."""
    tensors: set[Tensor] = set()
    for module in modules:
        tensors.update(module.parameters())
        tensors.update(module.buffers())
    return sum(tensor.nbytes for tensor in tensors)
