"""Data sets of other samples than images, in parquet files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedknow.client.data.arrays import Dataset, Labels, require
from fedknow.client.data.columns import Column
from fedknow.client.data.samples import Raw, SampleSpec
from fedknow.protocols.config import ConfigError
from fedknow.protocols.texts import counted

__all__ = ["RecordedLayout", "RecordedSource", "Records", "Rows", "numbered"]


@dataclass(frozen=True)
class Rows:
    """Samples of one part of a data set, with what is known of each.

    Attributes
    ----------
    samples : ndarray [N, ...] or Ragged
        Samples as stored.
    labels : ndarray, shape (N,)
        Names of classes, or whole numbers.
    columns : mapping of str to ndarray, shape (N,)
        Other columns, by name.
    """

    samples: Raw
    labels: NDArray[Any]
    columns: Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Records:
    """All samples of a data set.

    Attributes
    ----------
    sample : SampleSpec
        What a sample is.
    train, test : Rows
        Its parts.
    groups : str
        The column that says which classes belong together; empty where none does.
    normalize : bool
        See :meth:`~fedknow.client.data.Dataset.from_arrays`.
    """

    sample: SampleSpec
    train: Rows
    test: Rows
    groups: str = ""
    normalize: bool = True

    def dataset(self, name: str) -> Dataset:
        """Make a data set, whose classes and columns are numbers.

        Raises
        ------
        ConfigError
            If a class has no samples in one of the parts.
        """
        names, train_y = numbered(self.train.labels)
        train_columns = self.train.columns
        groups: list[list[int]] = []
        # Numbered by group, so that the classes of a task stand side by side.
        if self.groups:
            names, train_y, groups = _grouped(
                self.train.labels, train_columns[self.groups]
            )
        places = {value: label for label, value in enumerate(names)}
        # Missing from one part, whichever it is.
        missing = set(self.test.labels.tolist()) ^ set(names)
        if missing:
            raise ConfigError(
                f"data.name = {name!r}: class {min(missing)!r} has samples for training alone, "
                "or for testing alone; every class needs both"
            )
        test_y = [places[value] for value in self.test.labels.tolist()]
        columns = {
            column: Column.from_values(values, self.test.columns[column])
            for column, values in train_columns.items()
        }
        return Dataset.from_arrays(
            name,
            self.train.samples,
            train_y,
            self.test.samples,
            np.array(test_y, np.int64),
            [str(value) for value in names],
            groups,
            columns,
            self.sample,
            self.normalize,
        )


@dataclass(frozen=True)
class RecordedSource:
    """A data set found on disk, and what reads it."""

    files: Mapping[str, Sequence[Path]]
    read: Callable[..., Records]
    columns: tuple[str, ...]
    has_texts: bool = False

    def dataset(self, name: str, tokenizer: str = "words") -> Dataset:
        """Read the files.

        Parameters
        ----------
        name : str
            Of the data set, for messages.
        tokenizer : str
            ``data.tokenizer``, for texts.

        Raises
        ------
        ConfigError
            If a file or a column cannot be read.
        """
        tables = {
            part: _table(files, self.columns)
            for part, files in self.files.items()
        }
        if self.has_texts:
            return self.read(tables, tokenizer).dataset(name)
        return self.read(tables).dataset(name)


@dataclass(frozen=True)
class RecordedLayout:
    """How such a data set lies in its folder.

    Attributes
    ----------
    read : callable
        From a table of each part to its records.
    columns : tuple of str
        Columns that are read.
    parts : tuple of str
        How the names of files begin.
    has_texts : bool
        Whether ``read`` takes a tokenizer too.
    """

    read: Callable[..., Records]
    columns: tuple[str, ...]
    parts: tuple[str, ...] = ("train", "test")
    has_texts: bool = False

    wants = "train-*.parquet"

    def find(self, place: Path) -> RecordedSource | None:
        """Look for the data set in a folder, or in its folder ``data``.

        Returns
        -------
        RecordedSource or None
            None if a part is missing.
        """
        # Copies of the hub keep their files in `data`.
        for folder in (place, place / "data"):
            files = {
                part: sorted(folder.glob(f"{part}-*.parquet"))
                for part in self.parts
            }
            # A folder with one of two parts is no find.
            if all(files.values()):
                return RecordedSource(
                    files, self.read, self.columns, self.has_texts
                )
        return None


def numbered(values: NDArray[Any]) -> tuple[list[Any], Labels]:
    """Give the sorted values, and each row's place among them."""
    names, numbers = np.unique(values, return_inverse=True)
    # NumPy 2.0 gave the inverse another shape than versions before and after it.
    return names.tolist(), numbers.reshape(-1).astype(np.int64)


def _grouped(
    labels: NDArray[Any], groups: NDArray[Any]
) -> tuple[list[Any], Labels, list[list[int]]]:
    """Give classes in the order of their groups, and each row's place."""
    pairs = sorted(set(zip(groups.tolist(), labels.tolist(), strict=True)))
    names = [label for _, label in pairs]
    if len(set(names)) < len(names):
        raise ConfigError(
            "a class belongs to two groups; each class needs one of its own"
        )
    places = {label: place for place, label in enumerate(names)}
    # The pairs are sorted, and a dictionary keeps the order of its entries.
    members: dict[Any, list[int]] = {}
    for place, (group, _) in enumerate(pairs):
        members.setdefault(group, []).append(place)
    numbers = np.array([places[label] for label in labels.tolist()], np.int64)
    return names, numbers, list(members.values())


def _table(files: Sequence[Path], columns: Sequence[str]) -> Any:
    """Read columns of parquet files one after another."""
    pa = require("pyarrow")
    parquet = require("pyarrow.parquet")
    tables = []
    for path in files:
        try:
            # The schema alone is read first, to refuse a wrong file before its rows are read.
            names = parquet.read_schema(path).names
            missing = [name for name in columns if name not in names]
            if missing:
                raise ConfigError(
                    f"{path}: column {', '.join(map(repr, missing))} is missing; needed: "
                    f"{', '.join(columns)}; found: {', '.join(names)}"
                )
            tables.append(parquet.read_table(path, columns=list(columns)))
        except (pa.ArrowException, OSError, ValueError) as error:
            # Our own error is a ValueError, too, and says more.
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"{path}: cannot be read as parquet: {error}"
            ) from error
    table = pa.concat_tables(tables)
    for name in columns:
        if table[name].null_count:
            raise ConfigError(
                f"{files[0]}: column {name!r} has {counted(table[name].null_count, 'empty cell')}"
            )
    return table
