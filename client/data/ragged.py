"""Samples of unequal lengths in one array, which may be memory-mapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Ragged"]


@dataclass(frozen=True, eq=False)
class Ragged:
    """Rows of unequal lengths, which share one array of values.

    To choose rows copies no values.

    Attributes
    ----------
    values : ndarray [total, ...]
        The steps of all samples, one sample after another.
    starts, lengths : ndarray of int64, shape (N,)
        Where each row begins among the values, and how many it has.

    Examples
    --------
    >>> import numpy as np
    >>> from fedknow.client.data.ragged import Ragged
    >>> rows = Ragged.join([np.array([1, 2]), np.array([3])])
    >>> rows.padded(3).tolist()
    [[1, 2, 0], [3, 0, 0]]
    """

    values: NDArray[Any]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @classmethod
    def join(cls, rows: Sequence[NDArray[Any]]) -> Ragged:
        """Join rows of one type, each [length, ...]."""
        lengths = np.array([len(row) for row in rows], np.int64)
        return cls(np.concatenate(rows), np.cumsum(lengths) - lengths, lengths)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values."""
        return self.values.dtype

    @property
    def step_shape(self) -> tuple[int, ...]:
        """Shape of one step of a row."""
        return self.values.shape[1:]

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of rows, and shape of one step; the lengths are left out."""
        return (len(self), *self.step_shape)

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.lengths)

    def __getitem__(self, rows: Any) -> Ragged:
        """Choose rows by places, int64 [n], or by a mask, bool [N]."""
        return Ragged(self.values, self.starts[rows], self.lengths[rows])

    def row(self, place: int) -> NDArray[Any]:
        """Give one row, [length, ...]; it may share memory."""
        start = self.starts[place]
        return self.values[start : start + self.lengths[place]]

    def padded(self, length: int) -> NDArray[Any]:
        """Copy all rows to one length: longer ones cut, shorter ones zero-filled.

        Returns
        -------
        ndarray [N, length, ...]
        """
        shape = (len(self), length, *self.step_shape)
        table = np.zeros(shape, self.dtype)
        # Row by row, so that of a mapped file only these rows are read.
        for place in range(len(self)):
            row = self.row(place)[:length]
            table[place, : len(row)] = row
        return table
