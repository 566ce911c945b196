"""The messages of secure aggregation: their kinds, keys and counts."""

from __future__ import annotations

import math

__all__ = [
    "KEYS",
    "MASKED",
    "MASK_KEY",
    "MASK_KEYS",
    "MINIMUM",
    "NODES",
    "SEALED",
    "SECURE",
    "SESSION",
    "SHARES",
    "SHARE_KEY",
    "SHARE_KEYS",
    "SURVIVORS",
    "UNMASK",
    "threshold_of",
]

KEYS = "train.secure_keys"
"""Make keys. Config: ``session``. Answer: ``share-key``, ``mask-key``."""
SHARES = "train.secure_shares"
"""Deal shares. Config: ``session``, ``nodes``, ``share-keys``, ``mask-keys``. Answer: ``sealed``,
in the order of ``nodes``."""
UNMASK = "train.secure_unmask"
"""Open the sum. Config: ``session``, ``survivors``, ``sealed`` by each node that was to train.
Answer: ``train.secure_shares``, one of each of these nodes."""

SECURE = "secure"
"""Record of answers, and of ``train`` and ``train.end_task`` messages: ``session`` and the
``nodes`` that dealt shares."""
SESSION = "session"
NODES = "nodes"
SHARE_KEY = "share-key"
SHARE_KEYS = "share-keys"
MASK_KEY = "mask-key"
MASK_KEYS = "mask-keys"
SEALED = "sealed"
SURVIVORS = "survivors"
MASKED = "masked"
"""Name of the one array of a masked answer, uint64: an update, or sums when a task ends."""

MINIMUM = 3
"""Clients of a round: of two, each would know the other's update from the sum."""


def threshold_of(share: float, clients: int) -> int:
    """Count the clients that must stay until a sum is opened.

    Examples
    --------
    >>> threshold_of(0.66, 10), threshold_of(0.66, 3)
    (7, 2)
    """
    return max(2, math.ceil(share * clients))
