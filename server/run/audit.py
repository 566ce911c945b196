"""The audit log: who came, who was turned away, and what the operator did.

Each line of ``audit.jsonl`` holds the SHA-256 of the line before, so no line but the last can be
changed or taken out without a break in the chain. A chain does not show a shorter end by itself,
nor that all its hashes were made anew. Whoever notes the last hash elsewhere can prove both.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedknow.protocols.config import ConfigError

__all__ = ["AUDIT", "AuditLog", "read_audit"]

log = logging.getLogger(__name__)

AUDIT = "audit.jsonl"
BEGIN = "0" * 64
"""What stands in the place of a hash before the first line."""
_TAIL = 1 << 16
"""Bytes at the end of a file that hold its last line."""


class AuditLog:
    """Appends lines to a run's audit log. Any thread may.

    Parameters
    ----------
    folder : Path
        The run folder.

    Raises
    ------
    ConfigError
        If the file ends with something that is no line of it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / AUDIT
        self._lock = threading.Lock()
        self._is_broken = False
        self._last = self._find_last()

    def write(self, event: str, **values: Any) -> None:
        """Append a line.

        A disk that is full costs this log and not the run; the server's log says so once.

        Parameters
        ----------
        event : str
            What happened.
        **values
            More about it, as JSON.
        """
        # A line holds the hash of the one before, so two threads must not write at once.
        with self._lock:
            if self._is_broken:
                return
            moment = round(time.time(), 3)
            entry = {"time": moment, "event": event, **values}
            line = json.dumps(entry | {"before": self._last})
            try:
                with self._path.open("ab") as file:
                    file.write(line.encode() + b"\n")
            except OSError as error:
                self._is_broken = True
                log.warning("%s is not written any more: %s", self._path, error)
                return
            # Only after it was written: the chain must not hold a line that is not there.
            self._last = _hash(line.encode())

    def _find_last(self) -> str:
        """Find the hash of the last line; cut what a kill left of half a line."""
        if not self._path.exists():
            return BEGIN
        with self._path.open("rb+") as file:
            size = file.seek(0, 2)
            # The end alone, as a log of months is long.
            file.seek(max(0, size - _TAIL))
            tail = file.read()
            length = tail.rfind(b"\n") + 1
            # Never more than half a line: it was not part of the chain yet.
            file.truncate(size - len(tail) + length)
        lines = tail[:length].splitlines()
        return _hash(lines[-1]) if lines else BEGIN


def read_audit(folder: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Read a run's audit log, and prove its chain.

    Parameters
    ----------
    folder : Path
        The run folder.

    Yields
    ------
    tuple of dict and str
        An entry, and the hash of its line.

    Raises
    ------
    ConfigError
        If there is none, or a line was changed, taken out or put in.
    """
    path = folder / AUDIT
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    previous = BEGIN
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            entry = json.loads(line)
            is_next = entry.pop("before") == previous
        except (ValueError, KeyError, AttributeError, TypeError):
            is_next = False
        if not is_next:
            raise ConfigError(
                f"{path}: the chain breaks at line {number}: this line or the one before was "
                "changed, or lines between them are missing"
            )
        previous = _hash(line)
        yield entry, previous


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()
