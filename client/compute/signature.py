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
from collections.abc import Callable, Hashable, Iterable, Mapping
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

_NUMBERS = (int, float)
_OPAQUE = (
    *_NUMBERS,
    Meter,
    Optimizer,
    torch.Generator,
    np.random.Generator,
    type,
    types.ModuleType,
)
_Describer = Callable[[Any, int], Hashable]
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
            is_number = isinstance(value, _NUMBERS)
            parts.append(bool(value) if is_number else describe(value))
    return tuple(parts)


def describe(value: Any, depth: int = 0) -> Hashable:
    """Describe what the cost of work on a value can depend on."""
    kind = type(value)
    describer = _describers.get(kind)
    if describer is None:
        # Once for each type: asking what a value is took longer than describing it.
        describer = _describers[kind] = _choose(kind)
    if depth == DEPTH and describer not in _AT_ANY_DEPTH:
        return _describe_type(value, depth)
    return describer(value, depth)


def _choose(kind: type) -> _Describer:
    """Choose how values of a type are described."""
    for kinds, describer in _BY_KIND:
        if issubclass(kind, kinds):
            return describer
    is_callable = any("__call__" in vars(base) for base in kind.__mro__)
    return _describe_callable if is_callable else _describe_object


def _describe_value(value: Hashable, depth: int) -> Hashable:
    return value


def _describe_type(value: Any, depth: int) -> Hashable:
    return cast(Hashable, type(value))


def _describe_tensor(value: Tensor, depth: int) -> Hashable:
    return (value.shape, value.dtype, value.requires_grad)


def _describe_array(value: np.ndarray[Any, Any], depth: int) -> Hashable:
    return (value.shape, value.dtype)


def _describe_set(value: AbstractSet[Any], depth: int) -> Hashable:
    return (type(value), len(value))  # its order is not the same in all processes


def _describe_sequence(value: Iterable[Any], depth: int) -> Hashable:
    return (type(value), *_describe_all(value, depth))


def _describe_mapping(value: Mapping[Any, Any], depth: int) -> Hashable:
    # Keys name parameters or number tasks: only how many there are matters.
    return (type(value), *_describe_all(value.values(), depth))


def _describe_object(value: Any, depth: int) -> Hashable:
    entries = getattr(value, "__dict__", {})
    return (type(value), *_describe_all(entries.values(), depth))


def describe_values(values: Iterable[tuple[str, object]]) -> Hashable:
    """Describe settings, of which each value matters."""
    return tuple((name, repr(value)) for name, value in values)


def _describe_all(values: Iterable[Any], depth: int) -> Iterable[Hashable]:
    return [describe(value, depth + 1) for value in values]


def _describe_module(module: nn.Module, depth: int) -> Hashable:
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
    return _describe_type(function, depth)


# The first that fits, so that a network is not taken for a function.
_BY_KIND: tuple[tuple[tuple[type, ...], _Describer], ...] = (
    ((types.NoneType, bool, str), _describe_value),
    ((Tensor,), _describe_tensor),
    ((nn.Module,), _describe_module),
    (_OPAQUE, _describe_type),
    ((np.ndarray,), _describe_array),
    ((AbstractSet,), _describe_set),
    ((list, tuple), _describe_sequence),
    ((Mapping,), _describe_mapping),
)
_AT_ANY_DEPTH = {_describe_value, _describe_tensor, _describe_module}
_describers: dict[type, _Describer] = {}
