"""Tables of a user's own: CSV, Parquet, and what Arrow gives."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedknow.client.data.arrays import Dataset, Labels, require
from fedknow.client.data.cells import read_inputs
from fedknow.client.data.classes import whole_numbers
from fedknow.client.data.columns import Column
from fedknow.protocols.config import ConfigError, DataConfig
from fedknow.protocols.texts import counted

__all__ = ["Roles", "each_fifth", "from_tables", "read_tables", "table_files"]

_EVERY = 5
"""Each fifth sample of a class is for testing, where nobody says which."""


@dataclass(frozen=True)
class Roles:
    """Which columns of a table are what.

    Attributes
    ----------
    input : sequence of str
        Columns of the sample.
    label : str
        Column of the class.
    split : str
        Column that says ``train`` or ``test``; empty: files say it, or each fifth sample of a
        class is for testing.
    task : str
        Column that says which classes belong together; empty where none does.
    tokenizer : str
        What turns texts into ids.
    """

    input: Sequence[str]
    label: str
    split: str = ""
    task: str = ""
    tokenizer: str = "words"

    @classmethod
    def read(cls, config: DataConfig) -> Roles:
        """Read the roles from settings.

        Raises
        ------
        ConfigError
            If input or label is missing.
        """
        for key in ("input", "label"):
            if not getattr(config, key):
                raise ConfigError(
                    f"data.{key}: with data.name = {config.name!r} name the column of the "
                    f"{key}, for example data.{key} = "
                    f"{['x', 'y'] if key == 'input' else repr('label')}"
                )
        return cls(
            config.input,
            config.label,
            config.split_column,
            config.task_column,
            config.tokenizer,
        )


_ENDINGS = (".csv", ".parquet")


def table_files(place: Path) -> tuple[list[Path], list[Path]] | None:
    """Find the files of training and of test samples; the latter may be none."""
    if place.suffix in _ENDINGS:
        return [place], []
    # Copies of the hub keep their files in `data`.
    for folder in (place, place / "data"):
        for ending in _ENDINGS:
            # Also train-00000-of-00004.parquet: large tables come in pieces.
            train = sorted(folder.glob(f"train*{ending}"))
            if train:
                return train, sorted(folder.glob(f"test*{ending}"))
    return None


def read_tables(files: Sequence[Path]) -> Any | None:
    """Read tables one after another; None where there is no file."""
    if not files:
        return None
    # Looked for late: most experiments read no tables, and pyarrow is an extra.
    arrow = require("pyarrow")
    tables = []
    for path in files:
        try:
            if path.suffix == ".csv":
                tables.append(require("pyarrow.csv").read_csv(path))
            else:
                tables.append(require("pyarrow.parquet").read_table(path))
        except (arrow.ArrowException, ValueError) as error:
            raise ConfigError(
                f"{path}: cannot be read as {path.suffix[1:]}: {error}"
            ) from error
    try:
        return arrow.concat_tables(tables)
    except arrow.ArrowInvalid as error:
        raise ConfigError(
            f"{files[0].parent}: its files differ in their columns: {error}"
        ) from error


def from_tables(name: str, train: Any, test: Any | None, roles: Roles) -> Dataset:
    """Make a data set of tables.

    All other columns of whole numbers or texts stay known: ``data.client_column`` and
    ``data.domain_column`` may name them.

    Parameters
    ----------
    name : str
        What the data set is called in messages.
    train : pyarrow.Table
        Training samples, or all of them.
    test : pyarrow.Table or None
        Test samples.
    roles : Roles
        Which column is what.

    Raises
    ------
    ConfigError
        Naming a column that is missing, has empty cells, or is of another kind.
    """
    required = [*roles.input, roles.label, roles.split, roles.task]
    for table in (train, test):
        if table is not None:
            _check_table(name, table, list(filter(None, required)))
            # Before the split, which would find no class twice.
            _labels(name, table, roles.label)
    if test is None:
        train, test = _split_table(name, train, roles)
    inputs, spec = read_inputs(name, (train, test), roles.input, roles.tokenizer)
    labels = [_labels(name, table, roles.label) for table in (train, test)]
    classes = _class_names(train, roles.label, np.concatenate(labels))
    places = {value: place for place, value in enumerate(classes)}
    numbers = [_numbers(values, places) for values in labels]
    columns = _other_columns(train, test, required)
    groups = []
    if roles.task:
        groups = _groups(name, roles.task, (train, test), numbers)
    dataset = Dataset.from_arrays(
        name,
        inputs[0],
        numbers[0],
        inputs[1],
        numbers[1],
        list(
            map(str, classes.values() if isinstance(classes, dict) else classes)
        ),
        groups,
        columns,
        spec,
        # Silence must stay zero, as what fills a recording up is.
        normalize=spec.kind != "waveform",
    )
    dataset.check_labels()
    return dataset


def _check_table(name: str, table: Any, required: Sequence[str]) -> None:
    for column in required:
        if column not in table.column_names:
            raise ConfigError(
                f"data set {name!r}: column {column!r} is missing; found: "
                f"{', '.join(table.column_names)}. Set data.input, data.label, "
                "data.split_column or data.task_column"
            )
        # How to fill a gap is for those to decide who know the data.
        if table[column].null_count:
            raise ConfigError(
                f"data set {name!r}: column {column!r} has "
                f"{counted(table[column].null_count, 'empty cell')}; fill them or leave "
                "these rows out"
            )
    if table.num_rows == 0:
        raise ConfigError(f"data set {name!r}: a table holds no rows")


def _split_table(name: str, table: Any, roles: Roles) -> tuple[Any, Any]:
    if roles.split:
        values = _values(table[roles.split])
        is_train, is_test = values == "train", values == "test"
        if not is_train.any() or not is_test.any():
            raise ConfigError(
                f"data set {name!r}: column {roles.split!r} must say 'train' and 'test'; it "
                f"holds {', '.join(map(repr, np.unique(values).tolist()[:5]))}"
            )
        return table.filter(is_train), table.filter(is_test)
    # By class and not over all rows, so that rare classes are in both parts too.
    is_test = each_fifth(_values(table[roles.label]))
    return table.filter(~is_test), table.filter(is_test)


def each_fifth(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Choose each fifth sample of a class for testing, in their order."""
    is_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        is_test[rows[_EVERY - 1 :: _EVERY]] = True
    return is_test


def _values(column: Any) -> NDArray[Any]:
    # By Python's values, as a column comes in pieces and in many types of Arrow.
    return np.asarray(column.to_pylist())


def _labels(name: str, table: Any, column: str) -> NDArray[Any]:
    """Give labels: whole numbers or texts."""
    values = _values(table[column])
    if values.dtype.kind != "f":
        return values
    return whole_numbers(f"data set {name!r}: column {column!r}", values)


def _class_names(
    table: Any, column: str, labels: NDArray[Any]
) -> dict[Any, str] | list[Any]:
    """List the classes in order; numbers may have names in the metadata."""
    # The hub writes the names of classes into the metadata of a file.
    described = json.loads(
        (table.schema.metadata or {}).get(b"huggingface", b"{}")
    )
    feature = described.get("info", {}).get("features", {}).get(column, {})
    names = feature.get("names") if isinstance(feature, dict) else None
    present: list[Any] = np.unique(labels).tolist()
    # Names that do not cover all labels are of something else.
    if names and max(present) < len(names):
        return {value: names[value] for value in present}
    return present


def _numbers(values: NDArray[Any], places: Mapping[Any, int]) -> Labels:
    return np.array([places[value] for value in values.tolist()], np.int64)


def _other_columns(
    train: Any, test: Any, required: Sequence[str]
) -> dict[str, Column]:
    """Keep what else is known: columns of whole numbers and of texts."""
    columns = {}
    for field in train.schema:
        # Known of every sample of both parts, else some would belong to no client or domain.
        is_whole = (
            field.name in test.column_names
            and not train[field.name].null_count
            and not test[field.name].null_count
        )
        if _is_discrete(field.type) and is_whole and field.name not in required:
            columns[field.name] = Column.from_values(
                _values(train[field.name]), _values(test[field.name])
            )
    return columns


def _is_discrete(kind: Any) -> bool:
    """Tell whether an Arrow type holds whole numbers or texts."""
    types = require("pyarrow").types
    # pandas writes texts as large strings, and its categories as a dictionary.
    if types.is_dictionary(kind):
        kind = kind.value_type
    tests = (
        types.is_integer,
        types.is_boolean,
        types.is_string,
        types.is_large_string,
        types.is_string_view,
    )
    return any(is_of(kind) for is_of in tests)


def _groups(
    name: str,
    column: str,
    tables: Sequence[Any],
    numbers: Sequence[Labels],
) -> list[list[int]]:
    """List the classes of each task, by a column."""
    values = np.concatenate([_values(table[column]) for table in tables])
    labels = np.concatenate(numbers)
    groups = []
    for value in np.unique(values):
        groups.append(np.unique(labels[values == value]).tolist())
    # A class of two tasks is counted twice, so that the sum is too large.
    if sum(map(len, groups)) > len(np.unique(labels)):
        raise ConfigError(
            f"data.task_column = {column!r}: a class of {name!r} belongs to several tasks; "
            "give each class one, or make domains of them: data.scenario = "
            "'domain-incremental', data.domain = 'column'"
        )
    return groups
