"""The command line: commands read arguments and call the package.

It starts fast, and on an edge box without Flower and Ray. So the modules in this folder import
only light packages at their top: typer, rich, pydantic and :mod:`fedknow.protocols`. A command
imports the heavy ones when it runs, in the block of :func:`~fedknow.cli.errors.explained`. This
turns a missing package into a sentence that says how to install it.
``tests/fedknow/cli/test_start.py`` checks it.
"""

from fedknow.cli.app import app, main

__all__ = ["app", "main"]
