"""The command line: each command reads its arguments, calls the package and shows what came of it.

It starts fast, and on an edge box without Flower and Ray. So the modules in this folder import at
their top what is light: typer, rich, pydantic and :mod:`fedknow.protocols`. A command imports the
rest when it runs, in the block of :func:`~fedknow.cli.errors.explained`, which turns a package that
is missing into the sentence how to install it. ``tests/fedknow/test_cli_start.py`` holds this.
"""

from fedknow.cli.app import app, main

__all__ = ["app", "main"]
