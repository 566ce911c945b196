"""A user's own data in its own form: tables, arrays, folders of sound.

| form | ``data.name`` |
|---|---|
| CSV or Parquet, one file or a folder | ``file:sensors.csv`` |
| NumPy, an archive or a folder of mapped arrays | ``file:windows.npz`` |
| a folder of WAV files, one folder a class | ``file:words/`` |
| a set of the Hugging Face hub | ``hf:owner/name`` |

:mod:`~fedknow.client.data.objects` takes objects in Python.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedknow.client.data.arrays import Dataset, require
from fedknow.client.data.classes import whole_numbers
from fedknow.client.data.columns import Column
from fedknow.client.data.samples import Kind, SampleSpec
from fedknow.client.data.sounds import from_sounds
from fedknow.client.data.tables import (
    Roles,
    from_tables,
    read_tables,
    table_files,
)
from fedknow.protocols.config import ConfigError, DataConfig

__all__ = ["KINDS", "is_own", "load_own", "load_samples", "read_arrays"]

_FILE = "file:"
_HUB = "hf:"


def is_own(name: str) -> bool:
    """Say whether ``data.name`` names a file or a set of the hub."""
    return name.startswith((_FILE, _HUB))


def load_own(config: DataConfig) -> Dataset:
    """Load the data that ``file:...`` or ``hf:...`` names.

    Raises
    ------
    ConfigError
        Naming the file, column or setting that is missing or wrong.
    """
    if config.name.startswith(_HUB):
        place = _hub_folder(config)
    else:
        path = Path(config.name.removeprefix(_FILE)).expanduser()
        place = (
            path if path.is_absolute() else Path(config.dir).expanduser() / path
        )
    try:
        if place.exists() and (arrays := read_arrays(place)):
            return _from_arrays(config, arrays)
        return load_samples(config, place)
    except OSError as error:
        raise ConfigError(
            f"data.name = {config.name!r}: {error.filename or place}: "
            f"{error.strerror or error}"
        ) from error


def load_samples(config: DataConfig, place: Path) -> Dataset:
    """Load tables or sounds from a file or a folder.

    Parameters
    ----------
    config : DataConfig
        Says which columns are what. Where each client has data of its own, a column of tasks
        stays one among others.
    place : Path
        The file or folder.

    Raises
    ------
    ConfigError
        If it holds something else.
    """
    if not place.exists():
        raise ConfigError(
            f"data.name = {config.name!r}: there is no {place}; give a file or a folder, from "
            "data.dir or the present folder on"
        )
    if tables := table_files(place):
        train, test = (read_tables(files) for files in tables)
        roles = Roles.read(config)
        if config.name == "local":
            # Its rows say their task; a class may be of several.
            roles = replace(roles, task="")
        return from_tables(config.name, train, test, roles)
    if next(place.glob("**/*.wav"), None):
        return from_sounds(config.name, place)
    entries = sorted(path.name for path in place.glob("*"))
    raise ConfigError(
        f"data.name = {config.name!r}: {place} is neither .csv, .parquet nor .npz, and no "
        "folder of train*.csv, train*.parquet, train_x.npy or CLASS/*.wav "
        f"(it holds: {', '.join(entries[:8]) or 'nothing'})"
    )


def read_arrays(place: Path) -> dict[str, NDArray[Any]]:
    """Read an archive, or map the arrays of a folder; empty if it is neither.

    Raises
    ------
    ConfigError
        If the archive is damaged.
    """
    if place.suffix == ".npz":
        try:
            # Without pickle: a file from elsewhere must not run code.
            with np.load(place, allow_pickle=False) as file:
                return {key: file[key] for key in file.files}
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ConfigError(
                f"{place}: not a file that numpy.savez wrote: {error}"
            ) from error
    return _mapped(place) if (place / "train_x.npy").is_file() else {}


# --- NumPy ----------------------------------------------------------------------------------


def _mapped(folder: Path) -> dict[str, NDArray[Any]]:
    """Map the arrays of a folder: none of them is read."""
    return {
        # Mapped, as a user's arrays may be larger than the memory.
        path.stem: np.load(path, mmap_mode="r", allow_pickle=False)
        for path in sorted(folder.glob("*.npy"))
    }


def _from_arrays(config: DataConfig, arrays: dict[str, NDArray[Any]]) -> Dataset:
    """Make a data set of named arrays.

    ``train_x``, ``train_y``, ``test_x``, ``test_y``; ``train_NAME`` and ``test_NAME`` become
    columns; with ``mean`` and ``std`` the samples are not read for statistics.
    """
    required = ("train_x", "train_y", "test_x", "test_y")
    missing = [key for key in required if key not in arrays]
    if missing:
        raise ConfigError(
            f"data.name = {config.name!r}: array {missing[0]!r} is missing; found: "
            f"{', '.join(arrays)}"
        )
    columns = {}
    for key, values in arrays.items():
        column = key.removeprefix("train_")
        if key.startswith("train_") and key not in required:
            columns[column] = Column.from_values(
                values, arrays.get(f"test_{column}", values[:0])
            )
    x = arrays["train_x"]
    spec = _spec(config, x)
    labels = [
        whole_numbers(f"data.name = {config.name!r}: array {key!r}", arrays[key])
        for key in ("train_y", "test_y")
    ]
    names = tuple(map(str, range(1 + int(labels[0].max()))))
    if "mean" in arrays and "std" in arrays:
        return Dataset(
            config.name,
            x,
            labels[0],
            arrays["test_x"],
            labels[1],
            names,
            tuple(arrays["mean"].tolist()),
            tuple(arrays["std"].tolist()),
            columns=columns,
            sample=spec,
        )
    dataset = Dataset.from_arrays(
        config.name,
        x,
        labels[0],
        arrays["test_x"],
        labels[1],
        names,
        columns=columns,
        sample=spec,
    )
    dataset.check_labels()
    return dataset


KINDS: Mapping[int, Kind] = {4: "image", 3: "series", 2: "table"}


def _spec(config: DataConfig, x: NDArray[Any]) -> SampleSpec:
    """Say what the samples of an array are, by its axes and ``data.kind``."""
    kind = config.kind
    # The default says nothing of what the user wants.
    if kind == "image" and x.ndim in KINDS:
        kind = KINDS[x.ndim]
    return SampleSpec(
        kind, x.shape[1:], str(x.dtype), vocabulary=config.vocabulary
    )


# --- the hub --------------------------------------------------------------------------------


def _hub_folder(config: DataConfig) -> Path:
    """Find a set of the hub: in ``data.dir``, or downloaded."""
    repository = config.name.removeprefix(_HUB)
    if config.dir:
        # With and without the owner's name, as both are usual.
        for folder in (repository, repository.rpartition("/")[2]):
            place = Path(config.dir).expanduser() / folder
            if place.is_dir():
                return place
        raise ConfigError(
            f"data.dir = {config.dir!r}: no folder {repository} there; put the set's files "
            "into it, or leave data.dir empty to fetch them"
        )
    hub = require("huggingface_hub")
    try:
        copy = hub.snapshot_download(
            repository,
            repo_type="dataset",
            allow_patterns=["*.parquet", "*.csv"],
        )
    # A dozen types, from several HTTP libraries. All mean the same to a user.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"data.name = {config.name!r}: could not be fetched from the Hugging Face hub "
            f"({reason}); go online, or name a folder that holds {repository}/ by data.dir"
        ) from error
    return Path(copy)
