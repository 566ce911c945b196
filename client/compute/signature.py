"""Signatures: what the cost of a step can depend on, read off an object.

Two steps of a learner cost the same if they do the same operations on tensors of the same
shapes. What steers that lies in the learner's attributes: the tensors it holds, what is None
or empty, its flags, which parameters are to be trained. :func:`describe` makes a hashable
value of these. A :class:`~fedknow.client.compute.cost.Meter` counts the first step of each
signature, and charges later ones the same.

Numbers are taken for quantities and counters, which change from step to step and steer
nothing: of an attribute it matters only whether it is zero, and of an entry in a container
nothing at all. So an object says by a flag, a word, a list's length or None which kind of
step comes next, and not by a number.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Hashable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from itertools import count
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from fedknow.client.compute.cost import Meter

__all__ = ["describe", "describe_attributes", "describe_values"]

DEPTH = 6
"""How deep containers and objects are looked into; what lies deeper is told by its type."""

_OPAQUE = (
    Meter,
    Optimizer,
    torch.Generator,
    np.random.Generator,
    type,
    types.ModuleType,
)
_Module = tuple[int, tuple[nn.Parameter, ...]]
# Weak keys, so that a module that is gone frees its parameters.
_modules: weakref.WeakKeyDictionary[nn.Module, _Module] = (
    weakref.WeakKeyDictionary()
)
# And not id(), which another module may get once this one is gone.
_serial_numbers = count()


def describe_attributes(thing: object, skipped: AbstractSet[str]) -> Hashable:
    """Describe an object by its attributes, all but some.

    Parameters
    ----------
    thing : object
        With a ``__dict__``.
    skipped : set of str
        Attributes that are left out.
    """
    # One flat tuple: this runs before each step, and a pair for each attribute takes longer.
    parts: list[Hashable] = []
    for name, value in vars(thing).items():
        if name not in skipped:
            parts.append(name)
            is_number = isinstance(value, int | float)
            parts.append(bool(value) if is_number else describe(value))
    return tuple(parts)


def describe(value: Any, depth: int = 0) -> Hashable:
    """Describe what the cost of work on a value can depend on."""
    if value is None or isinstance(value, bool | str):
        return cast(Hashable, value)
    kind = cast(Hashable, type(value))
    if isinstance(value, Tensor):
        return (value.shape, value.dtype, value.requires_grad)
    if isinstance(value, nn.Module):
        return _describe_module(value)
    if (
        isinstance(value, int | float)
        or depth == DEPTH
        or isinstance(value, _OPAQUE)
    ):
        return kind
    if isinstance(value, np.ndarray):
        return (value.shape, value.dtype)
    if callable(value):
        return _describe_callable(value, depth)
    return _describe_container(value, depth)


def _describe_container(value: Any, depth: int) -> Hashable:
    """Describe a collection, or another object by its attributes."""
    kind = cast(Hashable, type(value))
    if isinstance(value, AbstractSet):
        return (kind, len(value))  # its order is not the same in all processes
    if isinstance(value, list | tuple):
        return (kind, *_describe_all(value, depth))
    # Keys name parameters or number tasks: only how many there are matters.
    entries = (
        value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    )
    return (kind, *_describe_all(entries.values(), depth))


def describe_values(values: Iterable[tuple[str, object]]) -> Hashable:
    """Describe settings, of which each value matters."""
    return tuple((name, repr(value)) for name, value in values)


def _describe_all(values: Iterable[Any], depth: int) -> Iterable[Hashable]:
    return [describe(value, depth + 1) for value in values]


def _describe_module(module: nn.Module) -> Hashable:
    """Tell which module it is, its mode, and which parameters are free."""
    entry = _modules.get(module)
    if entry is None:
        # Walking through a network takes longer than a small step may, so it is done once.
        entry = _modules[module] = (
            next(_serial_numbers),
            tuple(module.parameters()),
        )
    number, parameters = entry
    return (number, module.training, *[p.requires_grad for p in parameters])


def _describe_callable(function: Any, depth: int) -> Hashable:
    """Tell a function by its code and what it is bound to."""
    if isinstance(function, functools.partial):
        bound = (*function.args, *function.keywords.values())
        return (describe(function.func, depth + 1), *_describe_all(bound, depth))
    if isinstance(function, types.MethodType):
        # Without the object it is bound to, which may be the learner that is being described.
        return function.__func__.__code__
    if isinstance(function, types.FunctionType):
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        # Code and not the function: a lambda is another object each time it is made.
        return (function.__code__, *_describe_all(cells, depth))
    return cast(Hashable, type(function))
