"""Sums of arrays that are the same to the bit in any order.

Floating-point addition rounds, so a sum depends on the order of its terms. Here each term is cut
into slices at fixed powers of two. The slices of one place are added without any rounding, as
they are whole multiples of one unit and too few to overflow. So the order cannot matter, and
sums of parts can be added to one another.

Source: J. Demmel and H. D. Nguyen, "Parallel reproducible summation", IEEE Transactions on
Computers 64(7), 2015, sections 3 and 4 (binned summation); here one exponent serves an array.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["ExactSum"]

WIDTH = 26
"""Bits of a slice. A double has 53: 2**26 terms can be added before a slice could round."""
SLICES = 3
"""Slices that are kept, from that of the largest term downwards: 53 bits or more below it."""
LOWEST = -30
"""Slice of an array of zeros, and of all that is smaller than about 1e-235."""
HIGHEST = 32
"""Slice above which the constant that cuts would overflow: terms of about 1e250 and more."""
MOST_TERMS = 2**26
CHUNK = 2**14
"""Elements that are cut at a time, so that they stay in the processor's cache."""


class ExactSum:
    """A sum of arrays of one shape, each times a weight.

    A term is ``array * weight``, rounded to float64. Terms are added without rounding, except that
    what lies 53 bits or more below the largest term of the array is rounded away, from each term
    by itself. Memory is 24 bytes an element.

    Parameters
    ----------
    shape : tuple of int
        Shape of the arrays.

    Examples
    --------
    >>> total = ExactSum((1,))
    >>> for value in (1e8, 1.0, -1e8):
    ...     total.add(np.array([value], np.float32), 1.0)
    >>> float(total.value()[0])
    1.0
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._terms = 0
        self._top = LOWEST
        self._slices = np.zeros((SLICES, math.prod(shape)))

    def add(self, array: np.ndarray, weight: float) -> None:
        """Add an array times a weight.

        Parameters
        ----------
        array : ndarray
            Real and finite, of any number type.
        weight : float

        Raises
        ------
        OverflowError
            If a term is about 1e250 or larger.
        """
        values = np.ascontiguousarray(array).reshape(-1)
        if not values.size:
            return
        # Not of |array|: that would be one more copy.
        largest = max(abs(float(values.max())), abs(float(values.min())))
        self._make_room(_slice_of(largest * abs(weight)), 1)
        term = np.empty(min(CHUNK, values.size))
        cut = np.empty_like(term)
        for begin in range(0, values.size, CHUNK):
            end = min(begin + CHUNK, values.size)
            part = term[: end - begin]
            np.multiply(values[begin:end], weight, out=part, dtype=np.float64)
            self._add_chunk(slice(begin, end), part, cut[: end - begin])

    def _add_chunk(
        self,
        place: slice,
        terms: np.ndarray,
        cut: np.ndarray,
    ) -> None:
        """Cut terms into slices, from the top, and add each where it belongs."""
        for depth in range(SLICES):
            # Adding so large a number rounds to the slice's unit; taking it away is exact.
            rounder = math.ldexp(1.5, 52 + WIDTH * (self._top - depth))
            np.add(terms, rounder, out=cut)
            np.subtract(cut, rounder, out=cut)
            self._slices[depth, place] += cut
            if depth + 1 < SLICES:
                np.subtract(terms, cut, out=terms)

    def merge(self, addend: ExactSum) -> None:
        """Add the terms of another sum; it stays as it is."""
        self._make_room(addend._top, addend._terms)
        # What lies below the lowest slice of the larger sum is left out of both.
        lower = self._top - addend._top
        if lower < SLICES:
            self._slices[lower:] += addend._slices[: SLICES - lower]

    def _make_room(self, top: int, terms: int) -> None:
        """Move the slices down, so that a term of slice ``top`` has its place."""
        self._terms += terms
        if self._terms > MOST_TERMS:
            raise OverflowError(f"more than {MOST_TERMS} terms")
        steps = top - self._top
        if steps <= 0:
            return
        surviving = self._slices[: max(SLICES - steps, 0)].copy()
        self._slices[:] = 0
        self._slices[SLICES - len(surviving) :] = surviving
        self._top = top

    def value(self) -> np.ndarray:
        """Return the sum, rounded to float64 (two roundings at most)."""
        total: np.ndarray = self._slices[-1].copy()
        # From the smallest, so that the last addition alone rounds what counts.
        for part in self._slices[-2::-1]:
            total += part
        return np.reshape(total, self.shape)


def _slice_of(largest: float) -> int:
    """Return the slice that the largest term of an array begins in."""
    if largest == 0:
        return LOWEST
    _, exponent = math.frexp(largest)
    # At most half a unit of the slice above: there, the term must round to nothing.
    place = math.ceil((exponent + 1) / WIDTH) - 1
    if place > HIGHEST:
        raise OverflowError(f"a term of {largest:g}")
    return max(place, LOWEST)
