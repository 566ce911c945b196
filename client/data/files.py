"""Folders of pictures: the entries of a data set, and their state on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fedknow.protocols.config import ConfigError

__all__ = ["fingerprint", "pictures", "subfolders"]

_ENDINGS = frozenset(
    (
        ".png",
        ".jpg",
        ".jpeg",
        ".bmp",
        ".gif",
        ".webp",
        ".tif",
        ".tiff",
        ".pgm",
        ".ppm",
    )
)
# Systems and servers leave these behind, where users hardly see them.
_CLUTTER = frozenset(
    (
        "__macosx",
        "__pycache__",
        "@eadir",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "thumbs.db",
        "desktop.ini",
    )
)
"""Entries that operating systems and tools leave beside a user's own; in lower case."""


def pictures(folder: Path) -> list[Path]:
    """List the pictures in a folder by name, without hidden files.

    A hidden ``._x.png`` is no picture: macOS keeps there what belongs to ``x.png``.

    Raises
    ------
    ConfigError
        If there is none, or one is no file: a pipe or a device would be waited for.
    """
    entries = [
        entry for entry in _entries(folder) if _ending(entry.name) in _ENDINGS
    ]
    for entry in entries:
        _require_file(entry)
    # Folders list their entries in any order; labels and splits must not depend on it.
    names = sorted(entry.name for entry in entries)
    if not names:
        endings = ", ".join(f"*{ending}" for ending in sorted(_ENDINGS))
        raise ConfigError(f"{folder}: no images there ({endings})")
    return [folder / name for name in names]


def subfolders(folder: Path) -> list[Path]:
    """List the folders in a folder by name, without those of tools."""
    names = [entry.name for entry in _entries(folder) if entry.is_dir()]
    return [folder / name for name in sorted(names)]


def fingerprint(path: Path) -> tuple[object, ...]:
    """Describe the state of a file, or of all files in a folder.

    Two states that differ have different descriptions: names, sizes, and times of change. The
    time of an entry's last change (``ctime``) is among them. A tool may set the time of the
    content's last change back, and files of one size are then alike otherwise.

    Parameters
    ----------
    path : Path
        A file, or a folder, of which hidden entries do not count. A folder is read in one pass.

    Returns
    -------
    tuple
        Absolute path and state.

    Raises
    ------
    OSError
        If there is no such file or folder.
    """
    if not path.is_dir():
        return str(path.resolve()), *_state(path.stat())
    entries = sorted(
        (entry.name, *_entry_state(entry)) for entry in _entries(path)
    )
    return str(path.resolve()), entries


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if (
                not entry.name.startswith(".")
                and entry.name.lower() not in _CLUTTER
            ):
                yield entry


def _require_file(entry: os.DirEntry[str]) -> None:
    """Refuse a pipe, a device or a folder with a picture's name."""
    # A broken link passes: the error of opening it names it.
    is_broken_link = entry.is_symlink() and not os.path.exists(entry.path)
    if entry.is_file() or is_broken_link:
        return
    raise ConfigError(
        f"{entry.path}: no file, though it has the name of a picture; move it away"
    )


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _state(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _entry_state(entry: os.DirEntry[str]) -> tuple[int, ...]:
    try:
        return _state(entry.stat())
    except FileNotFoundError:
        # A link to nothing: the error of decoding it names it.
        return (-1, -1, -1)
