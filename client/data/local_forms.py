"""A real client's data in the forms that simulations read (``file:...``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedknow.client.data.arrays import Dataset
from fedknow.client.data.classes import whole_numbers
from fedknow.client.data.columns import Column
from fedknow.client.data.own import load_samples, read_arrays
from fedknow.client.data.ragged import Ragged
from fedknow.client.data.samples import Raw, SampleSpec
from fedknow.client.data.tables import table_files
from fedknow.protocols.config import ConfigError, DataConfig
from fedknow.protocols.texts import counted

__all__ = ["LocalForms", "find_forms"]

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class _Part:
    """Training or test samples of a client.

    Attributes
    ----------
    x : ndarray [n, ...] or Ragged
    y : ndarray of int64, shape (n,)
        Classes as the experiment numbers them.
    tasks : ndarray of str, shape (n,), or None
        What ``data.task_column`` says.
    """

    x: Raw
    y: NDArray[np.int64]
    tasks: NDArray[Any] | None


def find_forms(
    place: Path, config: DataConfig, spec: SampleSpec, classes: int
) -> LocalForms | None:
    """Read a client's data in one of the public forms.

    Parameters
    ----------
    place : Path
        A folder or a file; one that holds ``task-000.npz`` is none of these forms.
    config : DataConfig
        ``input``, ``label``, ``task_column`` and ``class_names`` are used.
    spec : SampleSpec
        What the experiment says a sample is.
    classes : int
        Classes of all tasks together.

    Returns
    -------
    LocalForms or None
        ``None`` where there is nothing of the kind.

    Raises
    ------
    ConfigError
        Naming the file, column or setting that is missing or wrong.
    """
    # Files of tasks win, whatever else lies beside them.
    if (place / "task-000.npz").exists() or not place.exists():
        return None
    if arrays := read_arrays(place):
        parts = _parts_of_arrays(arrays, place, config)
    elif table_files(place) is None and not any(place.glob("**/*.wav")):
        return None
    else:
        parts = _parts_of_samples(load_samples(config, place), place, config)
    return LocalForms(parts, config, spec, classes)


class LocalForms:
    """The tasks of a client, cut from its samples.

    A task has the rows whose ``data.task_column`` is its number, or else those of its block of
    classes.

    Parameters
    ----------
    parts : mapping of str to _Part
        ``train`` and ``test``.
    config : DataConfig
        ``tasks`` and ``classes_per_task`` say what a block is.
    spec : SampleSpec
        What a sample must be.
    classes : int
        Classes of all tasks together.

    Raises
    ------
    ConfigError
        If there are fewer classes than tasks need.
    """

    def __init__(
        self,
        parts: Mapping[str, _Part],
        config: DataConfig,
        spec: SampleSpec,
        classes: int,
    ) -> None:
        self._parts = parts
        self._spec = spec
        self._block = config.classes_per_task or classes // config.tasks
        self._has_column = bool(config.task_column)
        if not self._has_column and not 0 < self._block * config.tasks <= classes:
            raise ConfigError(
                f"data.tasks = {config.tasks} of "
                f"{counted(max(self._block, 1), 'class', 'classes')} each need more than the "
                f"{counted(classes, 'class', 'classes')} of data.classes; lower data.tasks or "
                "data.classes_per_task, or name a column of tasks by data.task_column"
            )

    def arrays(self, task: int) -> Arrays:
        """Give the arrays of a task, as a file ``task-000.npz`` has them."""
        arrays: Arrays = {}
        for name, part in self._parts.items():
            rows = np.flatnonzero(self._is_of(part, task))
            arrays[f"{name}_x"] = _filled_up(part.x[rows], self._spec)
            arrays[f"{name}_y"] = part.y[rows]
        if not self._has_column:
            # All of the block: a client need not show each class.
            arrays["classes"] = np.arange(
                task * self._block, (task + 1) * self._block
            )
        return arrays

    def _is_of(self, part: _Part, task: int) -> NDArray[np.bool_]:
        # As text, since a column may hold words as well as numbers.
        if part.tasks is not None:
            return np.asarray(part.tasks == str(task))
        return np.asarray(part.y // self._block == task)


def _filled_up(x: Raw, spec: SampleSpec) -> NDArray[Any]:
    return x.padded(spec.shape[0]) if isinstance(x, Ragged) else np.asarray(x)


def _parts_of_arrays(
    arrays: Mapping[str, NDArray[Any]], place: Path, config: DataConfig
) -> dict[str, _Part]:
    parts = {}
    for name in ("train", "test"):
        keys = [f"{name}_x", f"{name}_y"]
        if config.task_column:
            keys.append(f"{name}_{config.task_column}")
        for key in keys:
            if key not in arrays:
                raise ConfigError(
                    f"{place}: array {key!r} is missing; found: {', '.join(arrays)}"
                )
        tasks = arrays[keys[2]].astype(str) if config.task_column else None
        labels = np.asarray(arrays[keys[1]])
        # Texts that each client numbers by itself would mean other classes to others.
        if labels.dtype.kind not in "iuf":
            raise ConfigError(
                f"{place}: array {keys[1]!r} is {labels.dtype}; it must be whole numbers, the "
                "classes as the experiment counts them from 0"
            )
        labels = whole_numbers(f"{place}: array {keys[1]!r}", labels)
        parts[name] = _Part(arrays[keys[0]], labels, tasks)
    return parts


def _parts_of_samples(
    dataset: Dataset, place: Path, config: DataConfig
) -> dict[str, _Part]:
    if dataset.spec.kind == "tokens":
        raise ConfigError(
            f"{place}: texts would be numbered by the words of this client alone; give token "
            "ids, as NumPy arrays"
        )
    numbers = _class_numbers(dataset.class_names, place, config)
    column = _task_column(dataset, place, config)
    return {
        "train": _Part(
            dataset.train_x,
            numbers[dataset.train_y],
            np.array(column.names)[column.train] if column else None,
        ),
        "test": _Part(
            dataset.test_x,
            numbers[dataset.test_y],
            np.array(column.names)[column.test] if column else None,
        ),
    }


def _task_column(
    dataset: Dataset, place: Path, config: DataConfig
) -> Column | None:
    if not config.task_column:
        return None
    if config.task_column not in dataset.columns:
        has = ", ".join(dataset.columns) or "none"
        raise ConfigError(
            f"{place}: no column {config.task_column!r} of whole numbers or texts "
            f"(data.task_column); it has: {has}"
        )
    return dataset.columns[config.task_column]


def _class_numbers(
    names: Sequence[str], place: Path, config: DataConfig
) -> NDArray[np.int64]:
    """Give the experiment's number of each of the client's own classes."""
    if config.class_names:
        places = {name: number for number, name in enumerate(config.class_names)}
        return _looked_up(names, places.get, place, config.class_names)
    # Without a list only numbers mean the same to all clients.
    return _looked_up(names, _as_number, place, ())


def _as_number(name: str) -> int | None:
    return int(name) if name.isdecimal() else None


def _looked_up(
    names: Sequence[str],
    find: Callable[[str], int | None],
    place: Path,
    listed: Sequence[str],
) -> NDArray[np.int64]:
    numbers = []
    for name in names:
        number = find(name)
        if number is None:
            remedy = (
                f"data.class_names has: {', '.join(listed[:20])}"
                if listed
                else "name all classes by data.class_names, in one order for all clients, or "
                "number them from 0"
            )
            raise ConfigError(f"{place}: class {name!r} is not known; {remedy}")
        numbers.append(number)
    return np.array(numbers, np.int64)
