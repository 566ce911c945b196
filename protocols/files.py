"""Files that are written whole, and safe against loss of power."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

__all__ = ["sync_disk", "write_atomic"]


def write_atomic(
    path: Path,
    data: bytes,
    durable: bool = True,
    mode: int = 0o666,
) -> None:
    """Write a file whole or not at all: a neighbour is written and renamed.

    Parameters
    ----------
    path : Path
        The file.
    data : bytes
        What it is to hold.
    durable : bool
        Make the file and its name safe against loss of power at once, which takes a disk some
        milliseconds. Otherwise they are safe after :func:`sync_disk`, and until then only
        against the end of the process.
    mode : int
        Permissions of the file from its first moment on, before the process's umask.

    Raises
    ------
    OSError
        If the file cannot be written (a full disk, for example); what was there before is intact.
    """
    # Two processes may write the same file, so that each needs a neighbour of its own.
    neighbour = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        # One of an ended process with this id would keep the permissions that it has.
        neighbour.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with open(os.open(neighbour, flags, mode), "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(neighbour, path)
    # Ctrl-C as well: a half-written neighbour must not stay behind.
    except BaseException:
        neighbour.unlink(missing_ok=True)
        raise
    if durable:
        # The new name is an entry of the folder, which is on the disk only now.
        _sync_folder(path.parent)


def sync_disk(folder: Path) -> None:
    """Make the file system of a folder safe against loss of power.

    One call for many files costs little more than one for a single file.

    Raises
    ------
    OSError
        If something could not be written.
    """
    system = ctypes.CDLL(None, use_errno=True)
    # Only Linux can sync one file system; elsewhere all of them are synced.
    if not hasattr(system, "syncfs"):
        os.sync()
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if system.syncfs(descriptor):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(folder))
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make sure that a folder's entries are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
