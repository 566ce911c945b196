"""FEMNIST: handwritten characters with their writers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedknow.client.data.arrays import require
from fedknow.client.data.columns import Column
from fedknow.client.data.parquet import Parquet
from fedknow.client.data.source import Contents, Source
from fedknow.protocols.config import ConfigError

__all__ = ["Femnist"]

_EVERY = 10
"""Each tenth picture of a writer is for testing."""
_LAYOUT = Parquet("image", ("character",))


@dataclass(frozen=True)
class Femnist:
    """Pictures of 62 characters; some 3,600 writers are natural clients.

    The hub's copy ``flwrlabs/femnist`` has ``image``, ``writer_id`` and ``character`` in files
    ``train-*.parquet`` alone. No split is published there: of each writer's pictures, in their
    order, each tenth is for testing, as LEAF leaves a tenth.

    References
    ----------
    Caldas et al., "LEAF: A Benchmark for Federated Settings", 2018, arXiv 1812.01097.
    """

    wants = "train-*.parquet"

    def find(self, place: Path) -> Source | None:
        """Look for the files in a folder, or in its folder ``data``."""
        for folder in (place, place / "data"):
            files = sorted(folder.glob("train-*.parquet"))
            if files:
                return Source(files, partial(_contents, files))
        return None


def _contents(files: Sequence[Path]) -> Contents:
    pool, class_names = _LAYOUT.read_pool(files)
    writers = _writers(files)
    is_test = _each_tenth(writers)
    train, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    return Contents(
        pool.pick(train),
        pool.pick(test),
        class_names,
        columns={"writer": Column.from_values(writers[train], writers[test])},
    )


def _writers(files: Sequence[Path]) -> NDArray[np.str_]:
    parquet = require("pyarrow.parquet")
    writers: list[str] = []
    for path in files:
        if "writer_id" not in parquet.read_schema(path).names:
            raise ConfigError(f"{path}: column 'writer_id' is missing")
        table = parquet.read_table(path, columns=["writer_id"])
        writers += map(str, table["writer_id"].to_pylist())
    return np.array(writers)


def _each_tenth(writers: NDArray[np.str_]) -> NDArray[np.bool_]:
    is_test = np.zeros(len(writers), bool)
    order = np.argsort(writers, kind="stable")
    _, starts = np.unique(writers[order], return_index=True)
    for rows in np.split(order, starts[1:]):
        is_test[rows[_EVERY - 1 :: _EVERY]] = True
    return is_test
