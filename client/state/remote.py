"""Client states at a storage URL (``s3://bucket/folder``), by fsspec.

Each process reads and writes there by itself. A version of a state is a file that is written once
and never changed, so nothing has to be locked, and no listing has to be up to date.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from fedknow.client.state.errors import StateError
from fedknow.client.state.files import Files
from fedknow.client.state.layout import VERSION_SUFFIX, client_in
from fedknow.client.state.store import StateStore
from fedknow.protocols.config import ConfigError
from fedknow.protocols.extras import how_to_install
from fedknow.protocols.values import show

__all__ = ["UrlFiles", "check_url", "is_url", "open_states"]


class UrlFiles(Files):
    """Files in the clear at a storage URL.

    Parameters
    ----------
    url : str
        The folder; its scheme names one of fsspec's file systems.

    Attributes
    ----------
    root : Path
        The folder as that file system names it.

    Raises
    ------
    ConfigError
        If there is no such scheme, or its package is missing.
    """

    can_map = False

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self._fs, root = _file_system(url)
        self.root = Path(root)
        self._made: set[Path] = set()

    def make_folder(self, folder: Path) -> None:
        """Make a folder where the storage knows folders."""
        if folder not in self._made:
            with self._reaching(folder):
                self._fs.makedirs(str(folder), exist_ok=True)
            self._made.add(folder)

    def write(self, path: Path, data: bytes, durable: bool = True) -> None:
        """Write a file; the storage decides when it is safe."""
        # Not by way of a neighbour: nobody is told of a version before it is written whole, and
        # the same version always has the same bytes.
        with self._reaching(path):
            self._fs.pipe_file(str(path), data)

    def read(self, path: Path) -> bytes:
        """Read a file.

        Raises
        ------
        FileNotFoundError
            If there is none.
        StateError
            If the storage cannot be reached now.
        """
        with self._reaching(path):
            data: bytes = self._fs.cat_file(str(path))
            return data

    def delete(self, path: Path) -> None:
        """Delete a file."""
        with self._reaching(path):
            self._fs.rm_file(str(path))

    def list(
        self, root: Path, clients: Collection[int] | None = None
    ) -> list[Path]:
        """List the files of states, of some clients or of all."""
        with self._reaching(root):
            # What a listing remembers from before is of no use here.
            self._fs.invalidate_cache()
            present = [Path(name) for name in self._fs.find(str(root))]
        files = [path for path in present if VERSION_SUFFIX in path.name]
        if clients is None:
            return files
        return [path for path in files if int(client_in(path.name)) in clients]

    def size(self, path: Path) -> float:
        """Measure a file; infinity if it is missing."""
        try:
            with self._reaching(path):
                return float(self._fs.size(str(path)))
        except FileNotFoundError:
            return math.inf

    def stamp(self, path: Path) -> int:
        """Give the same for all times: a version is never written anew."""
        return 0

    def remove(self) -> None:
        """Delete the folder and all that is in it."""
        with self._reaching(self.root):
            if self._fs.exists(str(self.root)):
                self._fs.rm(str(self.root), recursive=True)

    @contextmanager
    def _reaching(self, path: Path) -> Iterator[None]:
        """Tell of a storage that cannot be reached, which is no lost state."""
        try:
            yield
        except FileNotFoundError:
            raise
        # Each storage has errors of its own.
        except Exception as error:
            raise StateError(
                f"engine.states = {show(self._url)}: {path.name} cannot be read or written: "
                f"{type(error).__name__}: {error}"
            ) from error


def is_url(place: str | os.PathLike[str]) -> bool:
    """Say whether a place is a storage URL, and no folder.

    Examples
    --------
    >>> is_url("s3://bucket/states"), is_url("/runs/digits/clients")
    (True, False)
    """
    return "://" in str(place)


def open_states(
    place: str | os.PathLike[str], memory_bytes: int, durable: bool = True
) -> StateStore:
    """Open the client states of a run.

    Parameters
    ----------
    place : str or PathLike
        A folder or a storage URL.
    memory_bytes, durable
        See :class:`~fedknow.client.state.StateStore`.

    Raises
    ------
    ConfigError
        See :class:`UrlFiles`.
    """
    if not is_url(place):
        return StateStore(place, memory_bytes, durable)
    files = UrlFiles(str(place))
    return StateStore(files.root, memory_bytes, durable, files)


def check_url(url: str) -> None:
    """Refuse a storage URL at which nothing can be written.

    Raises
    ------
    ConfigError
        Naming the reason.
    """
    files = UrlFiles(url)
    # A name of its own, as other runs may be at the same place.
    probe = files.root / f"fedknow-{secrets.token_hex(8)}"
    try:
        files.make_folder(files.root)
        files.write(probe, b"fedknow")
        files.read(probe)
        files.delete(probe)
    except (StateError, OSError) as error:
        raise ConfigError(
            f"{error}; name a place where this machine may read and write"
        ) from error


def _file_system(url: str) -> tuple[Any, str]:
    """Give the file system of a URL, and the folder in it."""
    setting = f"engine.states = {show(url)}"
    try:
        fsspec = import_module("fsspec")
    except ModuleNotFoundError:
        raise ConfigError(
            f"{setting}: the package fsspec is missing; {how_to_install('sim')}"
        ) from None
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        # fsspec says which package a scheme needs, or that it knows none.
        raise ConfigError(f"{setting}: {error}") from error
    return fs, str(root)
