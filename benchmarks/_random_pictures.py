"""Pictures of noise, as large as CIFAR's: for times, not accuracies."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedknow.client.data import Dataset

CLASSES = 6


def make(config: Any) -> Dataset:
    """Make 1,200 pictures of six classes to train on, and 60 to test."""
    draws = np.random.default_rng(0)

    def pictures(count: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        x = draws.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        return x, np.arange(count) % CLASSES

    train_x, train_y = pictures(1200)
    test_x, test_y = pictures(60)
    names = tuple(f"class {number}" for number in range(CLASSES))
    channels = (0.5, 0.5, 0.5)
    return Dataset(
        "noise", train_x, train_y, test_x, test_y, names, channels, channels
    )
