"""The setting ``data.held_out``: people who are no clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from fedknow.protocols.values import show

if TYPE_CHECKING:
    from fedknow.protocols.config.data import DataConfig

__all__ = ["HeldOut", "check_held_out"]


def _read(value: Any) -> Any:
    """Let text with commas stand for a list, and refuse all else early."""
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",") if name.strip()]
    # A column of numbers names people by them, and TOML gives numbers.
    if isinstance(value, list) and value and all(map(_is_name, value)):
        return [str(name) for name in value]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 0 <= value < 1:
        return float(value)
    raise ValueError(
        f"data.held_out = {show(value)}: give a share of the people, at least 0 and below 1, or "
        "their names, for example data.held_out = 0.2 or data.held_out = ['ann', 'bob']"
    )


def _is_name(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


HeldOut = Annotated[float | list[str], BeforeValidator(_read)]
"""A share of the people, or their names."""


def check_held_out(data: DataConfig) -> None:
    """Refuse people held out of a stream that has none, or no common time.

    Raises
    ------
    ValueError
        Naming a key, its value and the remedy.
    """
    if not data.held_out:
        return
    key = f"data.held_out = {show(data.held_out)}"
    if data.partition != "natural":
        raise ValueError(
            f"{key} with data.partition = {data.partition!r}: only people can be held out; set "
            "data.partition = 'natural' and data.client_column, or leave data.held_out at 0"
        )
    # After a task they are scored on the tasks so far, which must be the same for all.
    if data.task_order != "same":
        raise ValueError(
            f"{key} with data.task_order = {data.task_order!r}: clients meet tasks in orders "
            "of their own, so nobody can say which ones were learned; set data.task_order = "
            "'same'"
        )
    if data.arrival != "same":
        raise ValueError(
            f"{key} with data.arrival = {data.arrival!r}: the global model is scored when a "
            "task is over for all clients at once; set data.arrival = 'same'"
        )
