"""The command line, started as ``fedknow`` or ``python -m fedknow``.

It can be interrupted from its first moment on.
"""

from __future__ import annotations

import sys

from fedknow.protocols.errors import INTERRUPTED
from fedknow.protocols.interruption import heed_signals

__all__ = ["main"]


def main() -> None:
    """Run the ``fedknow`` command."""
    heed_signals()
    try:
        # The import takes seconds on a small board, and a service may be stopped meanwhile.
        from fedknow.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
