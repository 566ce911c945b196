"""Bounds of arguments and options of commands."""

from __future__ import annotations

from fedknow.protocols.config import ConfigError
from fedknow.protocols.values import show

__all__ = ["check_between"]


def check_between(
    option: str,
    value: float,
    low: float,
    high: float,
    remedy: str = "",
) -> None:
    """Refuse a number that is not finite, too small or too large.

    Python's comparisons with NaN are all false, so a lower bound alone lets it pass.

    Parameters
    ----------
    option : str
        What messages call it, for example ``--seeds``.
    value : float
        The number.
    low, high : float
        The smallest and the largest that are allowed.
    remedy : str
        What to do about it, if that is more than to give another number.

    Raises
    ------
    ConfigError
        Naming the option, the value and the bounds.

    Examples
    --------
    >>> check_between("--seeds", 3, 1, 100)
    >>> check_between("--seconds", math.nan, 0, 100)
    Traceback (most recent call last):
    ...
    fedknow.protocols.config.ConfigError: --seconds nan: must be a number from 0 to 100
    """
    if low <= value <= high:  # false for NaN
        return
    kind = (
        "whole number"
        if isinstance(low, int)
        and isinstance(high, int)
        and isinstance(value, int)
        else "number"
    )
    end = f"; {remedy}" if remedy else ""
    raise ConfigError(
        f"{option} {show(value)}: must be a {kind} from {low:.10g} to {high:.10g}{end}"
    )
