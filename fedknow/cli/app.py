"""The application: its commands, in the order of ``--help``."""

from __future__ import annotations

from typing import Annotated

import typer

from fedknow import __version__
from fedknow.cli import (
    deploy,
    inspect,
    members,
    models,
    new,
    runs,
    sign,
    split,
    tracking,
)
from fedknow.cli.output import out
from fedknow.cli.ranks import ranks
from fedknow.cli.watch import watch

__all__ = ["app", "main"]

app = typer.Typer(
    name="fedknow",
    no_args_is_help=True,
    # A traceback is for whoever reports a fault, so it is Python's own.
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(is_asked: bool) -> None:
    if is_asked:
        out.print(f"fedknow {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _fedknow(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_version,
            is_eager=True,
            help="Print the version.",
        ),
    ] = False,
) -> None:
    """Run experiments of federated continual learning.

    Clients learn a stream of tasks together without sharing data.

    An experiment says which data, clients, tasks, model, learner (the method on the clients)
    and strategy (the method on the server). It is a preset or a TOML file, and every setting
    can be changed with `--set`.

    For example:

    - `fedknow compare digits --learners fedavg,fedknow` puts FedKNOW beside FedAvg.

    - `fedknow simulate digits --set data.clients=50 --set train.rounds=5` runs one experiment.

    - `fedknow simulate digits --set strategy=own_strategy:ShortUpdates` uses your own strategy
      from `own_strategy.py`.

    - `fedknow show digits` prints every setting with its value, ready to be saved as a TOML file.
    """


for command in (
    runs.simulate,
    runs.compare,
    runs.search,
    runs.paper,
    deploy.certs,
    sign.sign,
    deploy.server,
    deploy.client,
    deploy.status,
    members.forget,
    members.members,
    members.eject,
    members.admit,
    members.revoke,
    members.audit,
    watch,
    inspect.report,
    ranks,
    tracking.track,
    models.export,
    models.evaluate,
    models.predict,
    inspect.show,
    split.split,
    new.new,
    inspect.calibrate,
):
    app.command()(command)
# ``list`` is a name of Python's.
app.command("list")(inspect.list_)


def main() -> None:
    """Run the ``fedknow`` command."""
    # Its own name, in completion scripts too, when it is started with python -m.
    app(prog_name="fedknow")
