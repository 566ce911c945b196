"""Words of messages: numbers with nouns, and texts of the other side."""

from __future__ import annotations

__all__ = ["LONGEST_TEXT", "counted", "printable"]

LONGEST_TEXT = 2000
"""Characters of a text of the other side that are shown or logged."""


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


def printable(text: str, longest: int = LONGEST_TEXT) -> str:
    """Make a text of the other side fit for a log or a terminal.

    Characters that a terminal acts on are written as escapes: colours, cursor movements, new
    lines, and marks that turn the direction of writing. So a text cannot pass for several
    lines of a log.

    Parameters
    ----------
    text : str
        Whatever the other side sent.
    longest : int
        Characters of it that stay; the rest is counted.

    Returns
    -------
    str
        Printable characters only.

    Examples
    --------
    >>> printable("fine\\x1b[31m")
    'fine\\\\x1b[31m'
    >>> printable("abcdef", 3)
    'abc... (3 characters more)'
    """
    start = text[:longest]
    if not start.isprintable():
        start = "".join(map(_escaped, start))
    missing = len(text) - longest
    if missing <= 0:
        return start
    return f"{start}... ({counted(missing, 'character')} more)"


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")
