"""``fedknow`` and ``python -m fedknow``: the command line, which can be interrupted from the start."""

from __future__ import annotations

import signal
import sys
from types import FrameType

__all__ = ["main"]

_INTERRUPTED = 130


def main() -> None:
    """Entry point of the ``fedknow`` command."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        # Takes seconds on a small board, which is when a service may be stopped as well.
        from fedknow.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(_INTERRUPTED)
    run()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
