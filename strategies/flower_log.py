"""Flower's log while it works for us."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet_flower"]


@contextmanager
def quiet_flower() -> Iterator[None]:
    """Keep Flower's log to errors, then leave the logger as it was."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
