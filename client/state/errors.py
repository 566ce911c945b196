"""Errors of client states."""

from __future__ import annotations

from fedknow.protocols.errors import FedknowError

__all__ = ["StateError", "StateLost"]


class StateError(FedknowError, RuntimeError):
    """A client's state that cannot be kept or read.

    The text names the file or the entry, and what is wrong.
    """


class StateLost(StateError):
    """A client's state that was kept and is missing or damaged."""

    is_resumable = False
