"""A file of lines that another process writes, read as it grows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedknow.server.run.integrity import chain_start, read_lines

__all__ = ["News", "Tail"]


@dataclass(frozen=True)
class News:
    """The new lines of a file.

    Attributes
    ----------
    events : list of dict
        The new events, oldest first.
    is_anew : bool
        Whether everything that was read before is void: the file was cut back or replaced.
    fault : str
        A sentence on why the file cannot be read on; empty if it can.
    """

    events: list[dict[str, Any]]
    is_anew: bool = False
    fault: str = ""


class Tail:
    """Reads a file of sealed lines as it grows.

    A resumed run cuts its record back and writes other lines. They may reach further than the
    old ones before the next look, so size alone does not tell. The checksums do: each covers all
    lines before.

    Parameters
    ----------
    path : Path
        The file; it need not exist yet.
    fingerprint : str
        The run's, from which the checksums start.
    """

    def __init__(self, path: Path, fingerprint: str = "") -> None:
        self._path = path
        self._start = chain_start(fingerprint)
        self._seen: tuple[int, int, int] | None = None
        self._forget()

    def read(self) -> News:
        """Read the lines that were added since the last call."""
        try:
            state = self._path.stat()
        except FileNotFoundError:
            is_anew = self._position > 0
            self._forget()
            self._seen = None
            return News([], is_anew)
        look = (state.st_ino, state.st_size, state.st_mtime_ns)
        if look == self._seen:
            return News([])
        is_replaced = self._seen is not None and self._seen[0] != state.st_ino
        self._seen = look
        was_read = self._position > 0
        if is_replaced or state.st_size < self._position:
            self._forget()
        is_anew = was_read and self._position == 0
        try:
            return News(self._new_events(), is_anew)
        except ValueError:
            # Cut back and grown again: what is there now is read from its beginning.
            self._forget()
        try:
            return News(self._new_events(), was_read)
        except ValueError as error:
            self._forget()
            fault = f"{self._path.name} is not what the run wrote: {error}"
            return News([], was_read, fault)

    def _forget(self) -> None:
        self._position = 0
        self._chain = self._start

    def _new_events(self) -> list[dict[str, Any]]:
        with self._path.open("rb") as file:
            file.seek(self._position)
            data = file.read()
        # Half a line is being written; it is read when its end is there.
        size = data.rfind(b"\n") + 1
        lines = list(read_lines(data[:size], self._chain))
        self._position += size
        if lines:
            self._chain = lines[-1][1]
        return [event for event, _ in lines]
