"""Ranges of settings: what a search over any setting draws from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from fedknow.protocols.config import ConfigError

__all__ = ["Choice", "Dimension", "Integers", "Reals", "Value", "read_space"]

Value = float | int | str | bool
N = TypeVar("N", int, float)

# The first part is lazy: numbers have points of their own, as in 0.5..1.5.
_RANGE = re.compile(r"(?P<low>[^:]+?)\.\.(?P<high>[^:]+?)(?:/(?P<points>\d+))?")
_HOW = (
    "write log:1e-4..1e-1, uniform:0..1, int:1..5 or choice:a,b; a number of points "
    "for a grid may follow, as in log:1e-4..1e-1/4"
)


@dataclass(frozen=True)
class Reals:
    """Numbers of an interval.

    Attributes
    ----------
    low, high : float
        Both belong to it.
    is_log : bool
        Whether equal ratios are equally likely, and not equal differences.
    points : int
        How many a grid has; 0: none is given.
    """

    low: float
    high: float
    is_log: bool = False
    points: int = 0

    @property
    def grid(self) -> list[Value]:
        """The points of a grid, from low to high."""
        if self.points < 2:
            return []
        steps = [place / (self.points - 1) for place in range(self.points)]
        # Equal ratios between neighbours: a learning rate matters by its order of magnitude.
        if self.is_log:
            ratio = self.high / self.low
            # Six digits: in a configuration 0.30000000000000004 would help nobody.
            return [float(f"{self.low * ratio**step:.6g}") for step in steps]
        width = self.high - self.low
        return [float(f"{self.low + width * step:.6g}") for step in steps]

    @property
    def ends(self) -> list[Value]:
        """Values that must all be valid settings."""
        # Limits of settings are intervals: what both ends fulfil, all between them fulfils.
        return [self.low, self.high]


@dataclass(frozen=True)
class Integers:
    """Whole numbers from ``low`` to ``high``, with both."""

    low: int
    high: int

    @property
    def grid(self) -> list[Value]:
        """Each number once."""
        return list(range(self.low, self.high + 1))

    @property
    def ends(self) -> list[Value]:
        """Values that must all be valid settings."""
        return [self.low, self.high]


@dataclass(frozen=True)
class Choice:
    """Values of any kind, none of which is nearer to another."""

    values: tuple[Value, ...]

    @property
    def grid(self) -> list[Value]:
        """Each value once."""
        return list(self.values)

    @property
    def ends(self) -> list[Value]:
        """Values that must all be valid settings."""
        return list(self.values)


Dimension = Reals | Integers | Choice


def read_space(
    source: Iterable[str] | Mapping[str, Any],
) -> dict[str, Dimension]:
    """Read the ranges of settings.

    Parameters
    ----------
    source : iterable of str, or mapping
        ``KEY=RANGE`` each, or ranges by key. A range is text such as ``log:1e-4..1e-1``,
        ``uniform:0..1``, ``int:1..5``, ``choice:sgd,adam`` or ``sgd,adam``; in a mapping also a
        list of values.

    Returns
    -------
    dict
        The ranges by key, in their order.

    Raises
    ------
    ConfigError
        Naming the key and the range that cannot be read.

    Examples
    --------
    >>> read_space(["train.lr=log:1e-4..1e-1", "train.optimizer=sgd,adam"])
    ... # doctest: +NORMALIZE_WHITESPACE
    {'train.lr': Reals(low=0.0001, high=0.1, is_log=True, points=0),
     'train.optimizer': Choice(values=('sgd', 'adam'))}
    """
    pairs = (
        list(source.items())
        if isinstance(source, Mapping)
        else [_split(text) for text in source]
    )
    space: dict[str, Dimension] = {}
    for key, value in pairs:
        if key in space:
            raise ConfigError(f"{key} is searched twice; give one range")
        section = key.partition(".")[0]
        # A better seed is luck, and how a run is executed changes no number.
        if section in ("seed", "engine", "tracking", "name"):
            raise ConfigError(
                f"{key}: cannot be searched, since no better result comes of it; "
                "leave it out, or set it with --set"
            )
        space[key] = _dimension(key, value)
    if not space:
        raise ConfigError("nothing to search: give one range or more")
    return space


def _split(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip() or not value.strip():
        raise ConfigError(f"--over {text!r}: write KEY=RANGE; {_HOW}")
    return key.strip(), value.strip()


def _dimension(key: str, value: Any) -> Dimension:
    if isinstance(value, str):
        kind, colon, inner = value.partition(":")
        if colon and kind in _KINDS:
            return _KINDS[kind](key, inner)
        # Without a kind, a comma is enough to tell a choice.
        if "," in value:
            return _read_choice(key, value)
        _refuse(key, value, f"is no range; {_HOW}")
    if isinstance(value, Sequence) and len(value) > 1:
        return _choice(key, list(value))
    _refuse(
        key, value, "must be a range as text, or a list of two values or more"
    )


def _read_log(key: str, text: str) -> Dimension:
    reals = _read_reals(key, text, is_log=True)
    if reals.low <= 0:
        _refuse(key, f"log:{text}", "a logarithmic range begins above 0")
    return reals


def _read_uniform(key: str, text: str) -> Dimension:
    return _read_reals(key, text, is_log=False)


def _read_reals(key: str, text: str, is_log: bool) -> Reals:
    low, high, points = _bounds(key, text, float)
    # Python reads `inf` and `nan` as numbers, too.
    if not (math.isfinite(low) and math.isfinite(high)):
        _refuse(key, text, "both ends must be finite")
    # 0 stands for no grid, and one point has no neighbour to be spaced from.
    if points == 1:
        _refuse(key, text, "a grid has two points or more")
    return Reals(low, high, is_log, points)


def _read_integers(key: str, text: str) -> Dimension:
    low, high, points = _bounds(key, text, int)
    if points:
        _refuse(
            key, f"int:{text}", "a grid takes every whole number; leave /N out"
        )
    return Integers(low, high)


def _bounds(key: str, text: str, number: Callable[[str], N]) -> tuple[N, N, int]:
    match = _RANGE.fullmatch(text.strip())
    if match is None:
        _refuse(key, text, f"is no range; {_HOW}")
    try:
        low, high = number(match["low"]), number(match["high"])
    except ValueError:
        _refuse(key, text, f"its ends are not both numbers; {_HOW}")
    # Asked this way round, as every comparison with NaN is false.
    if not low < high:
        _refuse(key, text, "must go from a smaller to a larger number")
    return low, high, int(match["points"] or 0)


def _read_choice(key: str, text: str) -> Dimension:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        _refuse(key, text, "has an empty value")
    return _choice(key, [_scalar(word) for word in words])


def _choice(key: str, values: Sequence[Any]) -> Choice:
    if len(values) < 2:
        _refuse(key, values, "is a single value; set it with --set")
    for value in values:
        if not isinstance(value, str | int | float):
            _refuse(key, value, "must be text, a number, true or false")
    # As JSON: in Python 1, 1.0 and true are equal.
    if len({json.dumps(value) for value in values}) < len(values):
        _refuse(key, list(values), "has a value twice")
    return Choice(tuple(values))


def _scalar(word: str) -> Value:
    """Read a word as JSON would, else as text."""
    try:
        value = json.loads(word)
    except ValueError:
        return word
    # JSON reads lists and null as well, which nothing can search.
    return value if isinstance(value, bool | int | float) else word


def _refuse(key: str, value: Any, problem: str) -> NoReturn:
    raise ConfigError(f"{key} = {value!r}: {problem}")


_KINDS: dict[str, Callable[[str, str], Dimension]] = {
    "log": _read_log,
    "uniform": _read_uniform,
    "int": _read_integers,
    "choice": _read_choice,
}
