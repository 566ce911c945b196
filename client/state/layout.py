"""Where the files of states lie in their folder.

Files of the first 1000 clients lie in the folder itself, and each further thousand has a folder of
its own in it. Each write and listing slows down as a folder grows.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

__all__ = [
    "PART_SUFFIX",
    "VERSION_SUFFIX",
    "client_in",
    "find",
    "list_files",
    "locate",
    "version_path",
]

VERSION_SUFFIX = ".safetensors"
PART_SUFFIX = ".part.safetensors"
PER_FOLDER = 1000
"""Clients whose files lie in one folder."""


def version_path(root: Path, client: int, version: int) -> Path:
    """Give the file of one version of a client's state."""
    name = f"{client:06d}-{version:x}{VERSION_SUFFIX}"
    return _folder_of(root, client) / name


def find(root: Path, name: str) -> Path:
    """Give the place of a file by its name."""
    return _folder_of(root, int(client_in(name))) / name


def locate(root: Path, name: str) -> Path:
    """Give the place of a file by its name, and make its folder."""
    path = find(root, name)
    path.parent.mkdir(exist_ok=True)
    return path


def list_files(root: Path, clients: Collection[int] | None = None) -> list[Path]:
    """List the files of states in a folder, of some clients or of all."""
    folders = [root]
    with os.scandir(root) as entries:
        folders += [Path(entry) for entry in entries if entry.is_dir()]
    files: list[Path] = []
    # Without glob, which matches each of a hundred thousand names by a pattern.
    for folder in folders:
        names = [name for name in os.listdir(folder) if VERSION_SUFFIX in name]
        if clients is not None:
            names = [name for name in names if int(client_in(name)) in clients]
        files += [folder / name for name in names]
    return files


def client_in(name: str) -> str:
    """Give the client that a file's name holds."""
    return name.partition("-")[0]


def _folder_of(root: Path, client: int) -> Path:
    thousand = client // PER_FOLDER
    return root / f"{thousand:04d}" if thousand else root
