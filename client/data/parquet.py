"""Data sets as the Hugging Face hub gives them: parquet files.

A file has a column of images and columns of labels.
"""

from __future__ import annotations

import bisect
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from fedknow.client.data.arrays import Labels, require
from fedknow.client.data.columns import Column
from fedknow.client.data.source import Contents, Part, Source
from fedknow.protocols.config import ConfigError
from fedknow.protocols.texts import counted

__all__ = ["Parquet"]


@dataclass(frozen=True)
class Parquet:
    """How a data set lies in its parquet files.

    Attributes
    ----------
    image : str
        Column of images, ``struct<bytes, path>``.
    labels : tuple of str
        Columns that make a class together. Where there are two, the one in front groups the
        classes.
    test : str
        How the files of test samples begin; those of training samples begin with ``train``.
    folders : tuple of str
        Where in the data set's folder the files may lie.
    columns : tuple of str
        Columns of whole numbers that tell more of a sample; read where all files have them.
    """

    image: str
    labels: tuple[str, ...]
    test: str = "test"
    folders: tuple[str, ...] = ("", "data")
    columns: tuple[str, ...] = ()

    wants = "train-*.parquet"

    def find(self, place: Path) -> Source | None:
        """Look for the data set in a folder.

        Returns
        -------
        Source or None
            None if there are no training samples.

        Raises
        ------
        ConfigError
            If there are no test samples beside them.
        """
        places = [place / folder for folder in self.folders]
        train: list[Path] = []
        for candidate in places:
            # In the order of their numbers, as labels and images are found by a row's place in
            # all files.
            train = sorted(candidate.glob("train-*.parquet"))
            if train:
                break
        if not train:
            return None
        folder = train[0].parent
        test = sorted(folder.glob(f"{self.test}-*.parquet"))
        if not test:
            raise ConfigError(
                f"{folder}: train-*.parquet is there but {self.test}-*.parquet is missing; "
                "both are needed"
            )
        return Source(
            [*train, *test], lambda: self._read(train, test), self.columns
        )

    def _read(self, train: Sequence[Path], test: Sequence[Path]) -> Contents:
        train_table = self._labels(train)
        test_table = self._labels(test)
        train_keys = self._keys(train_table, train)
        test_keys = [tuple(row) for row in self._keys(test_table, test).tolist()]
        # Sorted by the label columns in order. So classes of one group stand together.
        classes, train_y = np.unique(train_keys, axis=0, return_inverse=True)
        labels = {tuple(row): label for label, row in enumerate(classes.tolist())}
        unknown = set(test_keys) - labels.keys()
        if unknown:
            raise ConfigError(
                f"{test[0]}: {self.labels} = {min(unknown)} is not among the training "
                "samples; every class needs samples in both files"
            )
        test_y = np.array([labels[key] for key in test_keys], np.int64)
        names = _names(train[0], train_table.schema.metadata, self.labels[-1])
        # A class without a name in the file is called by its numbers.
        class_names = [
            names.get(key[-1], "/".join(map(str, key))) for key in labels
        ]
        return Contents(
            # NumPy 2.0 gave the inverse another shape than versions before and after it.
            self._part(train, train_y.reshape(-1).astype(np.int64)),
            self._part(test, test_y),
            class_names,
            self._groups(classes[:, 0]),
            self._columns(train, test),
        )

    def _columns(
        self, train: Sequence[Path], test: Sequence[Path]
    ) -> dict[str, Column]:
        """Read what else is known of the samples."""
        parquet = require("pyarrow.parquet")
        schemas = [parquet.read_schema(path).names for path in [*train, *test]]
        columns = {}
        for name in self.columns:
            # Copies without it serve for all that does not ask for people.
            if all(name in names for names in schemas):
                parts = [_column(files, name) for files in (train, test)]
                columns[name] = Column.from_values(*parts)
        return columns

    def read_pool(self, files: Sequence[Path]) -> tuple[Part, list[str]]:
        """Read files that nobody has split.

        Returns
        -------
        (Part, list of str)
            All samples, and the names of their classes.

        Raises
        ------
        ConfigError
            If a file cannot be read, or lacks a column.
        """
        table = self._labels(files)
        keys = self._keys(table, files)
        classes, labels = np.unique(keys, axis=0, return_inverse=True)
        names = _names(files[0], table.schema.metadata, self.labels[-1])
        class_names = [
            names.get(key[-1], "/".join(map(str, key)))
            for key in classes.tolist()
        ]
        pool = self._part(files, labels.reshape(-1).astype(np.int64))
        return pool, class_names

    def _keys(self, table: Any, files: Sequence[Path]) -> Labels:
        """Read the label columns side by side, int64 [rows, columns]."""
        columns = [_integers(table, column, files) for column in self.labels]
        return np.stack(columns, axis=1)

    def _groups(self, superclasses: Labels) -> list[list[int]]:
        """List the classes of each superclass, where there are superclasses."""
        if len(self.labels) == 1:
            return []
        return [
            np.flatnonzero(superclasses == group).tolist()
            for group in np.unique(superclasses)
        ]

    def _labels(self, files: Sequence[Path]) -> Any:
        """Read the columns of labels, after a look at all columns."""
        pa = require("pyarrow")
        parquet = require("pyarrow.parquet")
        tables = []
        for path in files:
            try:
                schema = parquet.read_schema(path)
                self._check_columns(path, schema)
                tables.append(parquet.read_table(path, columns=list(self.labels)))
            except ConfigError:
                raise
            # ValueError: names of columns may be no UTF-8.
            except (pa.ArrowException, OSError, ValueError) as error:
                raise ConfigError(
                    f"{path}: cannot be read as parquet: {error}"
                ) from error
        try:
            table = pa.concat_tables(tables)
        except pa.ArrowInvalid as error:
            raise ConfigError(
                f"{files[0].parent}: its parquet files differ in their columns: {error}"
            ) from error
        if table.num_rows == 0:
            raise ConfigError(f"{files[0]}: the file holds no rows")
        return table

    def _check_columns(self, path: Path, schema: Any) -> None:
        """Refuse a file that lacks columns or has images of another type."""
        required = [self.image, *self.labels]
        missing = [column for column in required if column not in schema.names]
        if missing:
            raise ConfigError(
                f"{path}: column {', '.join(map(repr, missing))} is missing; "
                f"needed: {', '.join(required)}; found: {', '.join(schema.names)}"
            )
        pa = require("pyarrow")
        kind = schema.field(self.image).type
        if not (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
            raise ConfigError(
                f"{path}: column {self.image!r} is {kind}; "
                "it must be struct<bytes: binary, path: string>"
            )

    def _part(self, files: Sequence[Path], labels: Labels) -> Part:
        # Lazily: all pictures of a data set together need not fit into memory.
        cells = _Cells(files, self.image)
        pillow = require("PIL.Image")
        kind = files[0].name.split("-")[0]
        return Part(
            labels,
            # A cell without bytes (the image left in a file of its own) cannot be decoded
            # either: None is no bytes.
            lambda row: pillow.open(io.BytesIO(cells[row] or b"")),
            lambda row: (
                f"{files[0].parent}: {kind} row {row}: column {self.image!r}"
            ),
        )


class _Cells:
    """The bytes of a column of images, one row group in memory at a time."""

    def __init__(self, files: Sequence[Path], column: str) -> None:
        parquet = require("pyarrow.parquet")
        self._column = column
        # Row groups are the smallest piece that a parquet file can be read by.
        self._groups: list[tuple[Path, int]] = []
        sizes = []
        for path in files:
            metadata = parquet.read_metadata(path)
            for group in range(metadata.num_row_groups):
                self._groups.append((path, group))
                sizes.append(metadata.row_group(group).num_rows)
        self._starts = [0, *accumulate(sizes)]
        self._loaded = -1
        self._cells: Any = None

    def __getitem__(self, row: int) -> bytes | None:
        # To the right, so that empty groups, which start where the next one does, are passed
        # over.
        number = bisect.bisect_right(self._starts, row) - 1
        if number != self._loaded:
            self._cells = self._load(*self._groups[number])
            self._loaded = number
        cell: bytes | None = self._cells[row - self._starts[number]].as_py()
        return cell

    def _load(self, path: Path, group: int) -> Any:
        with require("pyarrow.parquet").ParquetFile(path) as file:
            table = file.read_row_group(group, columns=[self._column])
        return require("pyarrow.compute").struct_field(
            table[self._column], "bytes"
        )


def _column(files: Sequence[Path], name: str) -> Labels:
    parquet = require("pyarrow.parquet")
    tables = [parquet.read_table(path, columns=[name]) for path in files]
    table = require("pyarrow").concat_tables(tables)
    return _integers(table, name, files)


def _integers(table: Any, column: str, files: Sequence[Path]) -> Labels:
    values = table[column]
    if not str(values.type).startswith(("int", "uint")) or values.null_count:
        raise ConfigError(
            f"{files[0]}: column {column!r} is {values.type} with "
            f"{counted(values.null_count, 'empty cell')}; "
            "it must be whole numbers throughout"
        )
    # Checked before the conversion: unsigned labels may be too large for int64.
    labels = values.to_numpy()
    if (
        len(labels)
        and not 0 <= labels.min() <= labels.max() <= np.iinfo(np.int64).max
    ):
        raise ConfigError(
            f"{files[0]}: column {column!r} runs from {labels.min()} to {labels.max()}; "
            "labels are whole numbers from 0 (the hub marks samples without a label by -1: "
            "leave these out)"
        )
    return np.asarray(labels, np.int64)


def _names(
    path: Path, metadata: Mapping[bytes, bytes] | None, column: str
) -> dict[int, str]:
    """Read the names of a column's values.

    Hugging Face keeps them as JSON in the file's metadata.

    Returns
    -------
    dict
        Names by value; empty where the file has none.

    Raises
    ------
    ConfigError
        If they are damaged.
    """
    try:
        described = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        feature = described.get("info", {}).get("features", {}).get(column, {})
        names = feature.get("names") or []
        return {value: str(name) for value, name in enumerate(names)}
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{path}: its metadata of Hugging Face are damaged ({error}); "
            "fetch the file again"
        ) from error
