"""The command that serves the live page of runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fedknow.cli.errors import explained
from fedknow.cli.output import out
from fedknow.protocols.config import ConfigError

__all__ = ["WATCH", "page_served", "watch"]

WATCH = typer.Option(
    "--watch",
    help="Serve a live page of the run to this machine alone, and print its address.",
)
RUN = typer.Argument(metavar="RUN")
PORT = typer.Option(
    "--port",
    metavar="N",
    min=0,
    max=65535,
    help="Port on 127.0.0.1; 0 is any free one.",
)


def watch(
    folder: Annotated[Path, RUN],
    port: Annotated[int, PORT] = 0,
) -> None:
    """Serve a live page of a run, or of several side by side.

    RUN is a run folder or a folder that holds run folders. The run may go on in another
    process, be over, or not have begun. The page is for browsers on this machine alone. It
    shows curves, clients, traffic, failures and the time left. Nothing in the folder is
    changed. Ctrl-C ends the page, and no run.

    For example:

    - `fedknow watch runs/digits-fedknow-seed0`

    - `fedknow watch runs/digits-compare --port 8800`
    """
    with explained(None, extra="server"):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(
                f"{folder} is a file; give a run folder or its parent"
            )
        # Imported late, so that the command line starts fast and on an edge box.
        from fedknow.server.watch.http import LivePage

        with LivePage(folder, port) as page:
            _announce(page.url, f"{folder}; Ctrl-C ends it")
            # Until a signal raises KeyboardInterrupt in this thread.
            threading.Event().wait()


@contextmanager
def page_served(folder: Path, is_wanted: bool) -> Iterator[None]:
    """Serve the live page of a folder during a command, where that is wanted."""
    if not is_wanted:
        yield
        return
    # Imported late, so that the command line starts fast and on an edge box.
    from fedknow.server.watch.http import LivePage

    with LivePage(folder) as page:
        _announce(
            page.url, "until the command ends; the report has it afterwards"
        )
        yield


def _announce(url: str, note: str) -> None:
    out.print(
        f"Live page: {url} ({escape(note)})", highlight=False, soft_wrap=True
    )
    # Whoever reads the address from a pipe must not wait for the buffer to fill.
    out.file.flush()
