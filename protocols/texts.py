"""Words of messages and pages that depend on a number."""

from __future__ import annotations

__all__ = ["counted"]


def counted(number: int, noun: str, plural: str = "") -> str:
    """Write a number with its noun in the right form.

    Parameters
    ----------
    number : int
        How many there are.
    noun : str
        The noun for one.
    plural : str
        The noun for all other numbers; by default the noun with an s.

    Examples
    --------
    >>> counted(1, "client")
    '1 client'
    >>> counted(3, "class", "classes")
    '3 classes'
    """
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
