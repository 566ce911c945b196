"""Columns: what is known of each sample besides its label.

A column says whose a sample is (a person, a drawer, a speaker) or where it is from (a site, a
day, an alphabet). Streams are cut along them: natural clients, domains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedknow.protocols.texts import counted

__all__ = [
    "Column",
    "Values",
    "check_columns",
    "read_columns",
    "write_columns",
]

Values = NDArray[np.int64]
"""A value for each sample: a place in the column's names."""


@dataclass(frozen=True, eq=False)
class Column:
    """A property of each sample, as a number with a name.

    Attributes
    ----------
    train, test : ndarray of int64, shape (N,)
        Value of each training and of each test sample, 0 to ``len(names) - 1``.
    names : tuple of str
        One name per value. A value need not occur in both parts: a person may have test
        samples only.

    Examples
    --------
    >>> import numpy as np
    >>> column = Column.from_values(np.array(["ann", "bob"]), np.array(["bob"]))
    >>> column.names, column.train.tolist(), column.test.tolist()
    (('ann', 'bob'), [0, 1], [1])
    """

    train: Values
    test: Values
    names: tuple[str, ...]

    @classmethod
    def from_values(cls, train: Any, test: Any) -> Self:
        """Make a column of plain values, numbered in sorted order.

        Parameters
        ----------
        train, test : array, shape (N,)
            Whole numbers or texts, one a sample.
        """
        values = np.concatenate([np.asarray(train), np.asarray(test)])
        different, places = np.unique(values, return_inverse=True)
        # NumPy 2.0 gave the inverse another shape than versions before and after it.
        numbers = places.reshape(-1).astype(np.int64)
        names = tuple(str(value) for value in different.tolist())
        return cls(numbers[: len(train)], numbers[len(train) :], names)


def check_columns(columns: Mapping[str, Column], train: int, test: int) -> str:
    """Say what is wrong with a data set's columns.

    Parameters
    ----------
    columns : mapping
        Columns by name.
    train, test : int
        Numbers of samples.

    Returns
    -------
    str
        Empty where they fit the samples.
    """
    for name, column in columns.items():
        parts = (("train", column.train, train), ("test", column.test, test))
        for part, values, count in parts:
            if (
                not isinstance(values, np.ndarray)
                or values.dtype != np.int64
                or values.shape != (count,)
            ):
                return (
                    f"column {name!r} must be int64 [{count}] for the {part} samples; "
                    "Column.from_values makes it of numbers or texts"
                )
            if len(values) and not (
                values.min() >= 0 and values.max() < len(column.names)
            ):
                return (
                    f"column {name!r}: {part} values run from {values.min()} to "
                    f"{values.max()}, but it names {counted(len(column.names), 'value')}; "
                    "Column.from_values makes it of numbers or texts"
                )
    return ""


def write_columns(
    folder: Path, columns: Mapping[str, Column]
) -> dict[str, tuple[str, ...]]:
    """Write columns to ``column-0-train.npy`` and so on.

    Returns
    -------
    dict
        What :func:`read_columns` needs to know: the values' names, by column.
    """
    # By number, as a column's name need be no name of a file.
    for number, column in enumerate(columns.values()):
        for part in ("train", "test"):
            path = folder / f"column-{number}-{part}.npy"
            np.save(path, getattr(column, part), allow_pickle=False)
    return {name: column.names for name, column in columns.items()}


def read_columns(
    folder: Path, names: Mapping[str, Sequence[str]]
) -> dict[str, Column]:
    """Undo :func:`write_columns`."""
    columns = {}
    for number, (name, values) in enumerate(names.items()):
        train, test = (
            np.load(folder / f"column-{number}-{part}.npy", allow_pickle=False)
            for part in ("train", "test")
        )
        columns[name] = Column(train, test, tuple(values))
    return columns
