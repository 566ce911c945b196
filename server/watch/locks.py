"""Who holds the lock of a file, found out without touching the lock.

To try the lock would take it for a moment, in which a run that begins would be refused.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["is_locked"]

LOCKS = Path("/proc/locks")
"""The kernel's list of locks; Linux only."""


def is_locked(file: Path, locks: Path = LOCKS) -> bool:
    """Return whether a process of this machine holds a file's lock.

    Parameters
    ----------
    file : Path
        The file; it need not exist.
    locks : Path
        The kernel's list. Where there is none, no lock is known.
    """
    try:
        inode = str(file.stat().st_ino)
        text = locks.read_text("ascii")
    except OSError:
        return False
    for line in text.splitlines():
        # "1: FLOCK  ADVISORY  WRITE 28696 fe:00:2311041 0 EOF"
        words = line.split()
        if (
            len(words) > 5
            and words[1] == "FLOCK"
            and words[5].split(":")[-1] == inode
        ):
            return True
    return False
