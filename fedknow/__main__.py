"""``fedknow`` and ``python -m fedknow``: the command line, which can be interrupted from the start."""

from __future__ import annotations

import sys

from fedknow.protocols.errors import INTERRUPTED
from fedknow.protocols.interruption import heed_signals

__all__ = ["main"]


def main() -> None:
    """Entry point of the ``fedknow`` command."""
    heed_signals()
    try:
        # Takes seconds on a small board, which is when a service may be stopped as well.
        from fedknow.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
