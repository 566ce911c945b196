"""Updates as whole numbers, whose sum is exact in any order.

A number becomes the nearest multiple of ``2**-32``. Multiples are added in the ring of ``2**64``
elements. The bound keeps the sum of all clients within it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedknow.protocols.messages import Arrays

__all__ = ["decode", "encode", "size_of"]

Whole = NDArray[np.uint64]

_ONE = 2.0**32


def size_of(arrays: Mapping[str, np.ndarray]) -> int:
    """Count the numbers of some arrays."""
    return sum(array.size for array in arrays.values())


def encode(trained: Arrays, sent: Arrays, weight: float, clients: int) -> Whole:
    """Encode a weighted update.

    Parameters
    ----------
    trained, sent : Arrays
        Parameters after and before training, of the same names; floats.
    weight : float
        What the update counts, for example the client's samples.
    clients : int
        How many updates are added at most.

    Returns
    -------
    uint64 [d]
        ``weight * (trained - sent)`` in units of ``2**-32``, modulo ``2**64``.

    Raises
    ------
    ValueError
        If a number is not finite, or so large that a sum of as many could wrap around.
    """
    parts = [
        (trained[name].astype(np.float64) - array.astype(np.float64)).ravel()
        for name, array in sent.items()
    ]
    scaled = np.concatenate(parts) * (weight * _ONE)
    bound = 2.0**62 / clients
    largest = float(np.abs(scaled).max(initial=0.0))
    # A comparison with NaN is false, so it is asked this way round.
    if not largest < bound:
        raise ValueError(
            f"the update is too large for secure aggregation: {largest / _ONE:.3g} is not below "
            f"{bound / _ONE:.3g} for {clients} clients; lower train.lr, or set "
            "privacy.secure = false"
        )
    return np.rint(scaled).astype(np.int64).view(np.uint64)


def decode(total: Whole, sent: Arrays, weight: float) -> Arrays:
    """Decode the sum of updates into the weighted mean of the parameters.

    Parameters
    ----------
    total : uint64 [d]
        Sum of what :func:`encode` gave.
    sent : Arrays
        The parameters that all updates began with.
    weight : float
        Sum of the weights.

    Returns
    -------
    Arrays
        Of the names, shapes and dtypes of ``sent``.
    """
    changes = total.view(np.int64).astype(np.float64) / (weight * _ONE)
    arrays = Arrays()
    pieces = _split(changes, [array.size for array in sent.values()])
    for (name, array), change in zip(sent.items(), pieces, strict=True):
        mean = array.astype(np.float64) + change.reshape(array.shape)
        arrays[name] = mean.astype(array.dtype)
    return arrays


def _split(
    numbers: NDArray[np.float64], sizes: Sequence[int]
) -> list[NDArray[np.float64]]:
    ends = np.cumsum(np.asarray(sizes, np.int64))
    return np.split(numbers, ends[:-1])
