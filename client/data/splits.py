"""Splits as files: who holds which rows, for other runs and other people."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from fedknow.client.data.arrays import Dataset
from fedknow.client.data.packed import PackedShares
from fedknow.client.data.partition import Partition, Share
from fedknow.protocols.config import ConfigError, DataConfig

__all__ = ["load_split", "save_split"]

_FORMAT = 1
_ROWS = ("classes", "train", "test", "domains")
_KEPT = ("scenario", "domain", "tasks", "clients", "repeats")
"""Settings that a run must have as the run had that the split was made for."""


def save_split(
    path: str | os.PathLike[str],
    partition: Partition,
    dataset: Dataset,
    config: DataConfig,
) -> None:
    """Write a split to a file, which ``data.split`` can name.

    It holds row numbers and classes, and no sample.

    Parameters
    ----------
    path : path
        A file that ends in ``.npz``.
    partition : Partition
        The split.
    dataset : Dataset
        What its rows are of: a digest of the labels is kept.
    config : DataConfig
        The settings that it was made with.
    """
    shares = partition.tasks
    arrays: dict[str, Any] = {}
    for name in _ROWS:
        column = shares.columns[name]
        # Rows of all shares lie in one array: an archive of thousands of small ones is slow.
        arrays[name] = column.values.astype(np.int64)
        arrays[f"{name}_sizes"] = column.sizes
    arrays["domain"] = shares.domain
    arrays["lengths"] = shares.lengths
    description = {
        "format": _FORMAT,
        "digest": partition.digest,
        "labels": _labels_digest(dataset),
        "settings": {key: getattr(config, key) for key in _KEPT},
    }
    # As bytes, since an array of text would need pickle or a fixed width.
    arrays["about"] = np.frombuffer(json.dumps(description).encode(), np.uint8)
    with Path(path).open("wb") as file:
        np.savez_compressed(file, **arrays)


def load_split(
    path: str | os.PathLike[str], dataset: Dataset, config: DataConfig
) -> Partition:
    """Read a split that :func:`save_split` wrote.

    Raises
    ------
    ConfigError
        If the file is missing or damaged, or if it is of other data or other settings.
    """

    def error(problem: str) -> ConfigError:
        return ConfigError(f"data.split = {str(path)!r}: {problem}")

    try:
        # Without pickle: a file from elsewhere must not run code.
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        description = json.loads(arrays["about"].tobytes())
        digest = description["digest"]
        is_other = description["labels"] != _labels_digest(dataset)
        # Rows of other data may lie beyond the last one of these.
        if not is_other:
            partition = _read(arrays, dataset, description["settings"]["tasks"])
    except FileNotFoundError:
        raise error("no such file; write one by save_split") from None
    except (
        OSError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        EOFError,
        zipfile.BadZipFile,
    ) as cause:
        raise error(f"not a file that save_split wrote: {cause}") from cause
    if is_other:
        raise error(
            f"it is of other data than {dataset.name}; set data.name as its maker had it"
        )
    # A digest is no signature: it finds accidents, not forgers.
    if partition.digest != digest:
        raise error("its digest is wrong: it was changed; get the file again")
    for key, value in description["settings"].items():
        if getattr(config, key) != value:
            raise error(
                f"it was made with data.{key} = {value!r}, and this run has "
                f"{getattr(config, key)!r}; set data.{key} = {value!r}"
            )
    return partition


def _read(
    arrays: dict[str, np.ndarray], dataset: Dataset, tasks: int
) -> Partition:
    cut = {}
    for name in _ROWS:
        ends = np.cumsum(arrays[f"{name}_sizes"])
        cut[name] = np.split(arrays[name], ends[:-1])
    shares = []
    for place, train in enumerate(cut["train"]):
        # Counted anew, as the file holds the rows alone.
        held, counts = np.unique(dataset.train_y[train], return_counts=True)
        shares.append(
            Share(
                tuple(cut["classes"][place].tolist()),
                train,
                cut["test"][place],
                tuple(held.tolist()),
                tuple(counts.tolist()),
                int(arrays["domain"][place]),
                cut["domains"][place],
            )
        )
    ends = np.cumsum(arrays["lengths"]).tolist()
    starts = [0, *ends[:-1]]
    clients = [
        tuple(shares[start:end]) for start, end in zip(starts, ends, strict=True)
    ]
    return Partition(PackedShares(clients), tasks)


def _labels_digest(dataset: Dataset) -> str:
    """Digest of all labels, training and test: other data have another one."""
    total = hashlib.sha256()
    for y in (dataset.train_y, dataset.test_y):
        # The length too: else a label could pass from one part to the other unseen.
        total.update(np.array([len(y)], "<i8").tobytes())
        total.update(np.asarray(y, "<i8").tobytes())
    return total.hexdigest()
