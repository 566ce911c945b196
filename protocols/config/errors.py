"""Errors of configurations, and hints in them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from fedknow.protocols.errors import REFUSED, FedknowError

__all__ = ["ConfigError", "closest", "first_sentence"]


class ConfigError(FedknowError, ValueError):
    """A configuration that cannot be run.

    The text names the key, the value and what would be right.

    Examples
    --------
    >>> import fedknow
    >>> try:
    ...     fedknow.experiment("digits", train={"rounds": 0})
    ... except fedknow.ConfigError as error:
    ...     print("train.rounds" in str(error), error.exit_code)
    True 2
    """

    exit_code = REFUSED
    is_resumable = False


def closest(word: str, words: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` where a known word is near, else nothing."""
    match = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def first_sentence(error: Exception) -> str:
    """Give what an error of Python says, without its advice to programmers."""
    return str(error).partition(";")[0]
