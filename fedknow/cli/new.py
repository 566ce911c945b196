"""The command that begins a project: new."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from fedknow.cli.errors import explained
from fedknow.cli.output import out

__all__ = ["new"]

NAME = typer.Argument(metavar="NAME")


def new(name: Annotated[str, NAME]) -> None:
    """Write a small project: a learner, a strategy, a data set and a test.

    The folder NAME gets an experiment too, and a package whose parts have a name wherever it
    is installed. All of it runs as it is; change one file after the other.

    For example:

    - `fedknow new mymethod`, then `cd mymethod` and `fedknow simulate experiment.toml`
    """
    with explained(None):
        # Imported late, so that the command line starts fast and on an edge box.
        from fedknow.api.projects import write_project

        for path in write_project(name):
            out.print(escape(str(path)), highlight=False, soft_wrap=True)
        out.print(
            f"Next: cd {name}, then: fedknow simulate experiment.toml, python -m pytest "
            "(its test needs: pip install pytest)",
            highlight=False,
            soft_wrap=True,
        )
