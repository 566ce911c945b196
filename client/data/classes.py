"""Classes of a user's own data as whole numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedknow.client.data.arrays import Labels
from fedknow.protocols.config import ConfigError

__all__ = ["whole_numbers"]


def whole_numbers(place: str, values: NDArray[Any]) -> Labels:
    """Give labels as whole numbers; floats may hold them too.

    Parameters
    ----------
    place : str
        Where the labels are from, for messages.
    values : ndarray of any shape
        Labels.

    Returns
    -------
    ndarray of int64, of the same shape

    Raises
    ------
    ConfigError
        If one is no whole number. Cut to one, a quantity would pass for a class.

    Examples
    --------
    >>> import numpy as np
    >>> from fedknow.client.data.classes import whole_numbers
    >>> whole_numbers("labels", np.array([0.0, 2.0])).tolist()
    [0, 2]
    """
    if values.dtype.kind in "biu":
        return values.astype(np.int64)
    if values.dtype.kind != "f":
        raise ConfigError(
            f"{place} is {values.dtype}; classes are whole numbers from 0, as "
            "np.unique(y, return_inverse=True) gives them"
        )
    broken = values[~np.isfinite(values) | (values != np.floor(values))]
    if broken.size:
        raise ConfigError(
            f"{place} holds {broken.flat[0]:g}, which is no class. fedknow learns classes and "
            "does not predict quantities; np.digitize makes classes of them"
        )
    return values.astype(np.int64)
