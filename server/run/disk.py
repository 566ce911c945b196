"""Full disks: told apart from other errors, and turned into a sentence."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedknow.server.checks.faults import RunError

__all__ = ["is_disk_full", "running_out_of_disk"]


def is_disk_full(error: BaseException) -> bool:
    """Say whether a full disk or quota is the cause of an error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
        ):
            return True
        # Libraries and our own errors wrap the error of the system.
        cause = cause.__cause__
    return False


@contextmanager
def running_out_of_disk(path: Path) -> Iterator[None]:
    """Turn a full disk into a :class:`RunError` that says what to do."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise RunError(
            f"the disk that holds {path} is full; all up to the last checkpoint is safe: "
            f"make room, "
            "then go on with --resume"
        ) from error
