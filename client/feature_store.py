"""Features of single samples, in one file a network."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

__all__ = ["FeatureStore"]

log = logging.getLogger(__name__)

_WAIT = 60.0
"""Seconds to wait for another process that writes."""
_AT_ONCE = 500
"""Keys of one question: SQLite bears 999 at least."""


class FeatureStore:
    """A file of features by the keys of their samples.

    Several processes may use it at once. A file that is damaged, or cannot be written, costs time
    and no number: a warning says so, and what is missing is computed again.

    Parameters
    ----------
    path : Path
        The file, which need not be there.

    Examples
    --------
    >>> import tempfile
    >>> store = FeatureStore(Path(tempfile.mkdtemp()) / "network.sqlite")
    >>> store.put({b"sample": np.ones(2, np.float32)})
    >>> store.get([b"sample", b"other"])
    {b'sample': array([1., 1.], dtype=float32)}
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """Read features, flat float32 [d]; keys that are not there are left out."""
        if not self._path.exists():
            return {}
        stored: dict[bytes, np.ndarray] = {}
        try:
            with self._open() as database:
                for start in range(0, len(keys), _AT_ONCE):
                    part = keys[start : start + _AT_ONCE]
                    marks = ",".join("?" * len(part))
                    rows = database.execute(
                        f"SELECT key, feature FROM features WHERE key IN ({marks})",
                        part,
                    )
                    stored.update(
                        (key, np.frombuffer(feature, np.float32))
                        for key, feature in rows
                    )
        except (sqlite3.Error, ValueError) as error:
            self._give_up(error)
            return {}
        return stored

    def put(self, features: Mapping[bytes, np.ndarray]) -> None:
        """Keep features, float32 [d], by the keys of their samples."""
        rows = [(key, value.tobytes()) for key, value in features.items()]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._open() as database, database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS features "
                    "(key BLOB PRIMARY KEY, feature BLOB) WITHOUT ROWID"
                )
                # Another process may have computed the same ones meanwhile.
                database.executemany(
                    "INSERT OR IGNORE INTO features VALUES (?, ?)", rows
                )
        except (OSError, sqlite3.Error) as error:
            log.warning(
                "%s: features cannot be cached (%s); they are computed again next time. Set "
                "FEDKNOW_CACHE to a folder with room in it.",
                self._path,
                error,
            )

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._path, timeout=_WAIT)) as database:
            yield database

    def _give_up(self, error: Exception) -> None:
        """Begin anew where the file is damaged."""
        log.warning(
            "%s: damaged features (%s); they are computed again",
            self._path,
            error,
        )
        # A file that is only busy stays: others still read it.
        if isinstance(error, sqlite3.OperationalError):
            return
        self._path.unlink(missing_ok=True)
