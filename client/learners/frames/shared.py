"""Checks of what clients share, before the server's half uses it."""

from __future__ import annotations

import numpy as np

__all__ = ["check_classes", "check_large"]

LARGEST = 1e15
"""Size of a number that a sum over samples may have: more is no honest client's."""


def check_classes(name: str, labels: np.ndarray, classes: int) -> None:
    """Refuse labels that are no classes of the model.

    Raises
    ------
    ValueError
        Naming the array and the bounds.

    Examples
    --------
    >>> check_classes("classes", np.array([0, 4]), 5)
    """
    if labels.size and not (labels.min() >= 0 and labels.max() < classes):
        raise ValueError(
            f"{name}: {labels.min()} to {labels.max()}, and the model's classes are 0 to "
            f"{classes - 1}"
        )


def check_large(name: str, array: np.ndarray, clients: int = 1) -> None:
    """Refuse numbers that are too large to be added up.

    Parameters
    ----------
    name : str
    array : ndarray
    clients : int
        Whose numbers are added up in it.

    Raises
    ------
    ValueError
        Naming the array and its largest number.
    """
    largest = float(np.abs(array).max(initial=0.0))
    limit = LARGEST * clients
    if largest > limit:
        raise ValueError(f"{name}: a number of {largest:.1e}, above {limit:.0e}")
