"""Single values of a configuration: which ones can be settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

__all__ = ["bad_values", "is_finite", "show", "too_deep"]

DEEPEST = 8
"""Levels of tables and lists in a configuration; ours has three."""

LONGEST = 4096
"""Characters of a text: what a path may have on Linux."""

SHOWN = 80
"""Characters of a value that a message shows."""


def show(value: object) -> str:
    """Show a value in a message: as Python writes it, but never long.

    Examples
    --------
    >>> show("fast")
    "'fast'"
    >>> show(10**5000)
    'an integer of 16610 bits'
    """
    if isinstance(value, int) and value.bit_length() > 512:
        # Python refuses to write down integers of thousands of digits.
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except (
        ValueError,
        RecursionError,
    ):  # a list with such an integer; a list in a list in ...
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def is_finite(value: object) -> bool:
    """Say whether a value, and each number in it, is neither infinite nor NaN."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(map(is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_finite, value))
    return True


def too_deep(tree: Mapping[str, Any]) -> str:
    """Find a key that is nested more deeply than any setting is.

    The tree is walked without recursion, as it may be deep.

    Returns
    -------
    str
        The problem, or nothing.
    """
    pending: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    while pending:
        path, value = pending.pop()
        if len(path) > DEEPEST:
            key = ".".join(path)[:SHOWN]
            return f"{key}: nested more than {DEEPEST} levels deep; no setting is"
        pending += [((*path, key), entry) for key, entry in _entries(value)]
    return ""


def bad_values(tree: object, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Find values that no setting can have, one sentence each.

    Integers beyond 64 bits, texts that no file can hold, and dates: whoever reads the
    configuration next would fail on them in ways of its own.
    """
    for key, value in _entries(tree):
        place = (*path, key)
        if isinstance(value, Mapping | list | tuple):
            yield from bad_values(value, place)
        elif problem := _problem(value):
            yield f"{'.'.join(place)} = {show(value)}: {problem}"


def _entries(value: object) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(str(key), entry) for key, entry in value.items()]
    if isinstance(value, list | tuple):
        return [(str(place), entry) for place, entry in enumerate(value)]
    return []


def _problem(value: object) -> str:
    # Before int, as a bool is an int too.
    if isinstance(value, bool | float):
        return ""  # whether a number must be finite is for its own part to say
    if isinstance(value, int):
        # A larger one could be read from TOML, but not written to the wire.
        is_in_range = -(2**63) <= value < 2**63
        return (
            "" if is_in_range else "must fit into 64 bits, as TOML's integers do"
        )
    if isinstance(value, str):
        return _problem_of_text(value)
    return "must be a number, a text, true or false; write a date in quotes"


def _problem_of_text(text: str) -> str:
    if len(text) > LONGEST:
        return f"must have at most {LONGEST} characters"
    if "\0" in text:
        return "must not hold a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "must be valid Unicode, so that it can be written to a file"
    return ""
