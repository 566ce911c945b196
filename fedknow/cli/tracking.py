"""The command that sends runs to trackers: track."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fedknow.cli.errors import explained
from fedknow.cli.options import split_names
from fedknow.cli.output import out
from fedknow.protocols.config import ConfigError
from fedknow.protocols.texts import counted

__all__ = ["track"]

RUNS = typer.Argument(metavar="RUN...")
TO = typer.Option(
    "--to",
    metavar="NAME,NAME",
    help="Which trackers (`fedknow list trackers`); may be given many times.",
)
PROJECT = typer.Option(
    "--project",
    metavar="NAME",
    help="Under which they list the run.  [default: the experiment's name]",
    show_default=False,
)
FOLLOW = typer.Option(
    "--follow/--no-follow", help="Stay with a run that is going on until it ends."
)


def track(
    runs: Annotated[list[Path], RUNS],
    to: Annotated[list[str], TO],
    project: Annotated[str, PROJECT] = "",
    follow: Annotated[bool, FOLLOW] = True,
) -> None:
    """Send runs to a tracker from their first event on.

    RUN is a run folder. It may be finished, interrupted or still going on. Each call makes a
    new run in the tracker. To have a run followed from its start, give `--track` to
    `fedknow simulate`, `compare` or `server`.

    For example:

    - `fedknow track runs/digits-fedknow-seed0 --to mlflow`
    """
    with explained(None, extra="server"):
        # Imported late, so that the command line starts fast and on an edge box.
        from fedknow.server.tracking import check_trackers, track_run

        names = split_names(",".join(to))
        if not names:
            raise ConfigError("--to: name a tracker (fedknow list trackers)")
        check_trackers(names)
        for run in runs:
            for name in names:
                count = track_run(run, name, project, follow)
                out.print(
                    f"{escape(str(run))}: {counted(count, 'event')} sent to {escape(name)}",
                    highlight=False,
                    soft_wrap=True,
                )
