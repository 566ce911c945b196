"""Values as JSON knows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["to_plain"]


def to_plain(value: Any) -> Any:
    """Make a tree of plain values; ``None`` where a number is not finite."""
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    # A text is a sequence too.
    if isinstance(value, Sequence | np.ndarray) and not isinstance(
        value, str | bytes
    ):
        return [to_plain(item) for item in value]
    return value
