"""Updates and sums as whole numbers, whose sum is exact in any order.

A number of an update becomes the nearest multiple of ``2**-32``, and one of a sum over samples
the nearest multiple of its unit. Multiples are added in the ring of ``2**64`` elements. The bound
keeps the sum of all clients within it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedknow.protocols.messages import Arrays

__all__ = [
    "SumLayout",
    "Summand",
    "decode",
    "decode_sums",
    "encode",
    "encode_sums",
    "size_of",
    "sum_size",
]

Whole = NDArray[np.uint64]

_ONE = 2.0**32


@dataclass(frozen=True)
class Summand:
    """An array that each client gives a summand of.

    Attributes
    ----------
    shape : tuple of int
        The same for all clients.
    unit : float
        A power of two, known to both sides. A client's numbers are rounded to multiples of it.
    remedy : str
        How a user makes numbers fit that are too large for the unit.
    """

    shape: tuple[int, ...]
    unit: float
    remedy: str = ""


SumLayout = Mapping[str, Summand]
"""Summands by name, in the order of their numbers."""


def size_of(arrays: Mapping[str, np.ndarray]) -> int:
    """Count the numbers of some arrays."""
    return sum(array.size for array in arrays.values())


def sum_size(layout: SumLayout) -> int:
    """Count the numbers of all summands of a client."""
    return sum(math.prod(summand.shape) for summand in layout.values())


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
    numbers = np.concatenate(parts) * weight
    return _to_units("the update", numbers, 1 / _ONE, clients, "lower train.lr")


def encode_sums(
    sums: Mapping[str, np.ndarray], layout: SumLayout, clients: int
) -> Whole:
    """Encode a client's summands.

    Parameters
    ----------
    sums : mapping of str to ndarray
        Of the layout's names and shapes, floats.
    layout : SumLayout
        What both sides agreed on.
    clients : int
        How many summands are added at most.

    Returns
    -------
    uint64 [n]
        Multiples of the units, modulo ``2**64``.

    Raises
    ------
    ValueError
        If names or shapes are others, or a number is not finite, or so large that a sum of as
        many could wrap around.
    """
    if sums.keys() != layout.keys():
        raise ValueError(f"sums {list(sums)} are not {list(layout)}")
    parts = [np.zeros(0, np.uint64)]
    for name, summand in layout.items():
        if sums[name].shape != summand.shape:
            raise ValueError(
                f"{name} has shape {sums[name].shape}, not {summand.shape}"
            )
        numbers = sums[name].astype(np.float64).ravel()
        parts.append(
            _to_units(name, numbers, summand.unit, clients, summand.remedy)
        )
    return np.concatenate(parts)


def _to_units(
    name: str,
    numbers: NDArray[np.float64],
    unit: float,
    clients: int,
    remedy: str,
) -> Whole:
    """Round numbers to multiples of a unit."""
    # Numbers beyond float64 are infinite, and refused below.
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        scaled = numbers / unit
    bound = 2.0**62 / clients
    largest = float(np.abs(scaled).max(initial=0.0))
    # A comparison with NaN is false, so it is asked this way round.
    if not largest < bound:
        raise ValueError(
            f"{name} is too large for secure aggregation: {largest * unit:.3g} is not below "
            f"{bound * unit:.3g} for {clients} clients; {remedy}, or set privacy.secure = false"
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


def decode_sums(total: Whole, layout: SumLayout) -> Arrays:
    """Decode the sum of what :func:`encode_sums` gave.

    Returns
    -------
    Arrays
        Of the layout's names and shapes, float64.
    """
    numbers = total.view(np.int64).astype(np.float64)
    sizes = [math.prod(summand.shape) for summand in layout.values()]
    return Arrays(
        (name, piece.reshape(summand.shape) * summand.unit)
        for (name, summand), piece in zip(
            layout.items(), _split(numbers, sizes), strict=True
        )
    )


def _split(
    numbers: NDArray[np.float64], sizes: Sequence[int]
) -> list[NDArray[np.float64]]:
    ends = np.cumsum(np.asarray(sizes, np.int64))
    return np.split(numbers, ends[:-1])
