"""Data sets as the Hugging Face hub gives them: parquet files with a column of images and columns
of labels."""

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
        Columns that make a class together; where there are two, the first groups the classes.
    test : str
        How the files of test samples begin; those of training samples begin with ``train``.
    folders : tuple of str
        Where in the data set's folder the files may lie.
    """

    image: str
    labels: tuple[str, ...]
    test: str = "test"
    folders: tuple[str, ...] = ("", "data")

    wants = "train-*.parquet"

    def find(self, place: Path) -> Source | None:
        """The data set in a folder, or None if there are no training samples.

        Raises
        ------
        ConfigError
            If there are no test samples beside them.
        """
        here = next(
            (
                place / f
                for f in self.folders
                if any((place / f).glob("train-*.parquet"))
            ),
            None,
        )
        if here is None:
            return None
        train, test = (
            sorted(here.glob(f"{part}-*.parquet")) for part in ("train", self.test)
        )
        if not test:
            raise ConfigError(
                f"{here}: train-*.parquet is there but {self.test}-*.parquet is missing; both are needed"
            )
        return Source([*train, *test], lambda: self._read(train, test))

    def _read(self, train: Sequence[Path], test: Sequence[Path]) -> Contents:
        tables = [self._labels(files) for files in (train, test)]
        keys = [
            np.stack(
                [_integers(table, column, files) for column in self.labels], axis=1
            )
            for table, files in zip(tables, (train, test), strict=True)
        ]
        classes, train_y = np.unique(
            keys[0], axis=0, return_inverse=True
        )  # sorted by the label columns in order
        places = {tuple(row): label for label, row in enumerate(classes.tolist())}
        unknown = {tuple(row) for row in keys[1].tolist()} - places.keys()
        if unknown:
            raise ConfigError(
                f"{test[0]}: {self.labels} = {min(unknown)} is not among the training samples; "
                "every class needs samples in both files"
            )
        test_y = np.array([places[tuple(row)] for row in keys[1].tolist()], np.int64)
        groups: list[list[int]] = []
        if len(self.labels) > 1:
            groups = [
                np.flatnonzero(classes[:, 0] == group).tolist()
                for group in np.unique(classes[:, 0])
            ]
        names = _names(train[0], tables[0].schema.metadata, self.labels[-1])
        return Contents(
            self._part(train, train_y.reshape(-1).astype(np.int64)),
            self._part(test, test_y),
            [names.get(row[-1], "/".join(map(str, row))) for row in classes.tolist()],
            groups,
        )

    def _labels(self, files: Sequence[Path]) -> Any:
        """The columns of labels, after a look at all columns."""
        pa, parquet = require("pyarrow"), require("pyarrow.parquet")
        tables = []
        for path in files:
            try:
                schema = parquet.read_schema(path)
                self._check_columns(path, schema)
                tables.append(parquet.read_table(path, columns=list(self.labels)))
            except ConfigError:
                raise
            except (
                pa.ArrowException,
                OSError,
                ValueError,
            ) as error:  # names may be no UTF-8
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
        """Refuse a file without the columns needed, or with an image column of another type."""
        needed = [self.image, *self.labels]
        missing = [column for column in needed if column not in schema.names]
        if missing:
            raise ConfigError(
                f"{path}: column {', '.join(map(repr, missing))} is missing; "
                f"needed: {', '.join(needed)}; found: {', '.join(schema.names)}"
            )
        pa = require("pyarrow")
        kind = schema.field(self.image).type
        if not (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
            raise ConfigError(
                f"{path}: column {self.image!r} is {kind}; it must be struct<bytes: binary, path: string>"
            )

    def _part(self, files: Sequence[Path], labels: Labels) -> Part:
        cells = _Cells(files, self.image)
        pillow = require("PIL.Image")
        kind = files[0].name.split("-")[0]
        return Part(
            labels,
            # A cell without bytes (the image left in a file of its own) cannot be decoded
            # either: None is no bytes.
            lambda row: pillow.open(io.BytesIO(cells[row] or b"")),
            lambda row: f"{files[0].parent}: {kind} row {row}: column {self.image!r}",
        )


class _Cells:
    """The bytes of a column of images, of which one row group at a time is in memory."""

    def __init__(self, files: Sequence[Path], column: str) -> None:
        parquet = require("pyarrow.parquet")
        self._column = column
        self._groups: list[tuple[Path, int]] = []
        sizes = []
        for path in files:
            about = parquet.read_metadata(path)
            for group in range(about.num_row_groups):
                self._groups.append((path, group))
                sizes.append(about.row_group(group).num_rows)
        self._starts = [0, *accumulate(sizes)]
        self._held: tuple[int, Any] = -1, None

    def __getitem__(self, row: int) -> bytes | None:
        number = bisect.bisect_right(self._starts, row) - 1
        if number != self._held[0]:
            path, group = self._groups[number]
            with require("pyarrow.parquet").ParquetFile(path) as file:
                column = file.read_row_group(group, columns=[self._column])[
                    self._column
                ]
            self._held = (
                number,
                require("pyarrow.compute").struct_field(column, "bytes"),
            )
        cell: bytes | None = self._held[1][row - self._starts[number]].as_py()
        return cell


def _integers(table: Any, column: str, files: Sequence[Path]) -> Labels:
    values = table[column]
    if not str(values.type).startswith(("int", "uint")) or values.null_count:
        raise ConfigError(
            f"{files[0]}: column {column!r} is {values.type} with "
            f"{counted(values.null_count, 'empty cell')}; "
            "it must be whole numbers throughout"
        )
    labels = values.to_numpy()
    if len(labels) and not 0 <= labels.min() <= labels.max() <= np.iinfo(np.int64).max:
        raise ConfigError(
            f"{files[0]}: column {column!r} runs from {labels.min()} to {labels.max()}; labels are "
            "whole numbers from 0 (the hub marks samples without a label by -1: leave these out)"
        )
    return np.asarray(labels, np.int64)


def _names(
    path: Path, metadata: Mapping[bytes, bytes] | None, column: str
) -> dict[int, str]:
    """Names of a column's values, which Hugging Face keeps as JSON in the file's metadata.

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
            f"{path}: its metadata of Hugging Face are damaged ({error}); fetch the file again"
        ) from error
