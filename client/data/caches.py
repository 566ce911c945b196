"""The folder of decoded samples, and folders in it that appear as a whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["cache_folder", "filled"]


def cache_folder() -> Path:
    """Return the folder of caches: ``$FEDKNOW_CACHE``, or one of the user's."""
    folder = os.environ.get("FEDKNOW_CACHE") or "~/.cache/fedknow"
    return Path(folder).expanduser()


@contextmanager
def filled(target: Path) -> Iterator[Path]:
    """Give a folder to fill; it becomes the target as a whole or not at all.

    Raises
    ------
    OSError
        If it cannot be made or renamed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, as a rename works within one file system only.
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield draft
        try:
            draft.rename(target)
        except OSError:
            # If the target is there, another process was quicker, with the same content.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
