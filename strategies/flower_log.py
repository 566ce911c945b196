"""Flower's log while it works for us."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["heard_from_flower", "quiet_flower"]

LOGGER = "flwr"


@contextmanager
def quiet_flower() -> Iterator[None]:
    """Keep Flower's log to errors, then leave the logger as it was."""
    logger = logging.getLogger(LOGGER)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def heard_from_flower() -> Iterator[list[str]]:
    """Collect Flower's warnings instead of printing them.

    Strategies say by a warning why they aggregate nothing.

    Yields
    ------
    list of str
        The warnings so far, each once.
    """
    logger = logging.getLogger(LOGGER)
    level = logger.level
    heard = _Heard()
    logger.addFilter(heard)
    # A quieter level would drop warnings before the filter sees them.
    logger.setLevel(logging.WARNING)
    try:
        yield heard.texts
    finally:
        logger.setLevel(level)
        logger.removeFilter(heard)


class _Heard(logging.Filter):
    """Takes warnings out of a log and keeps them; errors pass."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        # Errors are never hidden.
        if record.levelno >= logging.ERROR:
            return True
        text = record.getMessage().strip()
        # A strategy may repeat a warning for each answer.
        if record.levelno == logging.WARNING and text not in self.texts:
            self.texts.append(text)
        return False
