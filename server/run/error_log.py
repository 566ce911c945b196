"""The traceback of a run that failed, in its folder."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedknow.server.run.run_reader import ERROR

__all__ = ["error_log"]


@contextmanager
def error_log(folder: Path) -> Iterator[None]:
    """Write the traceback of an error within into ``error.log``.

    The console shows one sentence only.
    """
    try:
        yield
    # Not KeyboardInterrupt: that is the user's wish, and the run's events say so.
    except Exception:
        # A disk too full for the run is too full for its log. The user must see the run's
        # error.
        with suppress(OSError):
            (folder / ERROR).write_text(traceback.format_exc(), "utf-8")
        raise
