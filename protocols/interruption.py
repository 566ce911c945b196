"""Interruption: Ctrl-C and SIGTERM end a command in the same orderly way."""

from __future__ import annotations

import signal
import time
from types import FrameType

__all__ = ["heed_signals", "is_interrupted"]

REPEAT_SECONDS = 10.0
"""A SIGTERM so soon after an interruption asks for the same: who ends a job may signal a process
twice, by itself and with its group, and the second must not cut short what is saved."""

_interrupted_at: float | None = None
"""When this process was interrupted, by the monotonic clock."""


def heed_signals() -> None:
    """Have SIGTERM raise KeyboardInterrupt as Ctrl-C does.

    To be called in the main thread. A Ctrl-C that is ignored stays so: a shell has the commands
    that it starts in the background ignore it.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    # Another handler belongs to whoever embeds this process, such as a notebook.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def is_interrupted() -> bool:
    """Whether a signal has come since :func:`heed_signals`.

    An import or a library call may turn the interruption that reaches it into an error of its own.
    """
    return _interrupted_at is not None


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _interrupted_at
    moment = time.monotonic()
    is_repeat = (
        _interrupted_at is not None and moment - _interrupted_at < REPEAT_SECONDS
    )
    _interrupted_at = moment
    if number == signal.SIGINT or not is_repeat:
        raise KeyboardInterrupt
