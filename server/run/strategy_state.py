"""A strategy's memory in a form for checkpoints, without pickle."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp.strategy import Strategy

from fedknow.protocols.flower import to_arrays, to_record

__all__ = ["restore_strategy", "strategy_state"]


def strategy_state(
    strategy: Strategy,
) -> tuple[dict[str, Any], list[str]]:
    """Give a strategy's memory in a form that can be stored.

    A strategy that has ``state_dict`` and ``load_state_dict`` is asked; of any other all
    attributes are taken that are numbers, text, NumPy arrays, torch tensors, generators of
    random numbers, Flower's records, strategies it wraps, or lists, tuples and dictionaries of
    these. Functions are code and are left out.

    Returns
    -------
    tuple
        A :data:`fedknow.client.state.State` for :func:`restore_strategy`, and the names of what
        could not be stored.
    """
    if hasattr(strategy, "state_dict") and hasattr(strategy, "load_state_dict"):
        try:
            # A strategy knows best what it needs to go on.
            return {"own": _freeze(strategy.state_dict())}, []
        except _CannotFreeze as error:
            return {}, [f"what state_dict gives ({error})"]
    frozen, lost = _attributes(strategy, "")
    return {"attributes": frozen}, lost


def restore_strategy(strategy: Strategy, state: Mapping[str, Any]) -> None:
    """Give a new strategy what :func:`strategy_state` took from an old one."""
    if "own" in state:
        strategy.load_state_dict(_thaw(state["own"], None))  # type: ignore[attr-defined]
    for name, value in state.get("attributes", {}).items():
        # Over what the constructor has set, which is a strategy at its first round.
        setattr(
            strategy,
            name,
            _thaw(value, getattr(strategy, name, None)),
        )


class _CannotFreeze(Exception):
    pass


def _attributes(
    strategy: Strategy, prefix: str
) -> tuple[dict[str, Any], list[str]]:
    frozen: dict[str, Any] = {}
    lost: list[str] = []
    for name, value in vars(strategy).items():
        if isinstance(value, Strategy):  # what a wrapper wraps
            inner, inner_lost = _attributes(value, f"{prefix}{name}.")
            # By attributes, as its constructor's arguments are not known here.
            frozen[name] = {
                "is": "strategy",
                "attributes": inner,
            }
            lost += inner_lost
        # Functions come again with the strategy's own constructor.
        elif not callable(value):
            try:
                frozen[name] = _freeze(value)
            except _CannotFreeze as error:
                lost.append(f"{prefix}{name} ({error})")
    return frozen, lost


def _freeze(value: Any) -> Any:
    """Make a tree of values that ``save_state`` can store.

    Dictionaries carry under ``is`` the type that a value had.
    """
    if (
        value is None
        or type(value) in (bool, int, float, str)
        or isinstance(value, torch.Tensor)
    ):
        return value
    # The order matters: NumPy's numbers and texts are Python's too.
    for freeze in (
        _freeze_numbers,
        _freeze_container,
        _freeze_record,
        _freeze_random,
    ):
        frozen = freeze(value)
        if frozen is not None:
            return frozen
    raise _CannotFreeze(f"a {type(value).__name__}")


def _freeze_numbers(value: Any) -> Any:
    match value:
        case np.generic():
            return {
                "is": "scalar",
                "value": _freeze(np.asarray(value)),
            }
        case np.ndarray():
            # Objects and texts have no safetensors type.
            if value.dtype.kind not in "biufc":
                raise _CannotFreeze(f"an array of {value.dtype}")
            return value
        case bytes():
            return {
                "is": "bytes",
                "value": np.frombuffer(value, np.uint8),
            }
    return None


def _freeze_container(value: Any) -> Any:
    match value:
        case list():
            return [_freeze(item) for item in value]
        # A named tuple, or a dictionary of a type of its own, would not come back as one.
        case tuple() if type(value) is tuple:
            return {
                "is": "tuple",
                "items": [_freeze(item) for item in value],
            }
        case dict() if type(value) is dict:
            return {"is": "dict", "items": _items(value)}
    return None


def _freeze_record(value: Any) -> Any:
    match value:
        case Array():
            return {
                "is": "array",
                "value": _freeze(value.numpy()),
            }
        case ArrayRecord():
            return {
                "is": "ArrayRecord",
                "items": _items(to_arrays(value)),
            }
        case MetricRecord() | ConfigRecord() | RecordDict():
            return {
                "is": type(value).__name__,
                "items": _items(value),
            }
    return None


def _freeze_random(value: Any) -> Any:
    match value:
        case np.random.Generator():
            return {
                "is": "generator",
                "kind": type(value.bit_generator).__name__,
                "state": _freeze(value.bit_generator.state),
            }
        case random.Random():
            return {
                "is": "random",
                "state": _freeze(value.getstate()),
            }
    return None


def _items(mapping: Mapping[Any, Any]) -> list[Any]:
    return [[_freeze(key), _freeze(value)] for key, value in mapping.items()]


def _thaw(value: Any, current: Any) -> Any:
    """Undo :func:`_freeze`; a wrapped strategy is filled in where it stands."""
    if isinstance(value, list):
        return [_thaw(item, None) for item in value]
    if not isinstance(value, dict):
        return value
    if value["is"] == "strategy":
        restore_strategy(current, value)
        return current
    return _THAWING[value["is"]](value)


def _thaw_items(value: Mapping[str, Any]) -> dict[Any, Any]:
    return {_thaw(key, None): _thaw(item, None) for key, item in value["items"]}


def _thaw_generator(
    value: Mapping[str, Any],
) -> np.random.Generator:
    # The kind of generator comes first: states of different kinds do not fit.
    bits = getattr(np.random, value["kind"])()
    bits.state = _thaw(value["state"], None)
    return np.random.Generator(bits)


def _thaw_random(value: Mapping[str, Any]) -> random.Random:
    generator = random.Random()
    generator.setstate(_thaw(value["state"], None))
    return generator


_THAWING: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "scalar": lambda value: value["value"][()],
    "bytes": lambda value: value["value"].tobytes(),
    "tuple": lambda value: tuple(_thaw(value["items"], None)),
    "array": lambda value: Array(value["value"]),
    "dict": _thaw_items,
    "ArrayRecord": lambda value: to_record(dict(value["items"])),
    "MetricRecord": lambda value: MetricRecord(_thaw_items(value)),
    "ConfigRecord": lambda value: ConfigRecord(_thaw_items(value)),
    "RecordDict": lambda value: RecordDict(_thaw_items(value)),
    "generator": _thaw_generator,
    "random": _thaw_random,
}
"""How each type that :func:`_freeze` names is made again."""
