"""Commands of experiments with real clients: server, client, status, forget, certs."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from fedknow.cli.errors import explained
from fedknow.cli.options import (
    CLIENT_TLS,
    DATA_DIR,
    EXPERIMENT,
    INSECURE,
    OUT,
    QUIET,
    SERVER,
    SET,
    default_run_folder,
    read_experiment,
)
from fedknow.cli.output import out, progress_shown, show_run
from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.transport import check_address

if TYPE_CHECKING:
    from fedknow.client.edge.client import EdgeClient

__all__ = ["certs", "client", "forget", "server", "status"]


def certs(
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    clients: Annotated[
        int, typer.Option("--clients", min=1, help="How many clients there shall be.")
    ],
    hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--host",
            metavar="NAME",
            help="Name or address of the server, without a port; `*.example.org` stands for all names with one part "
            "before; may be given many times.",
        ),
    ] = None,
    days: Annotated[
        int, typer.Option("--days", min=1, help="How long certificates are valid.")
    ] = 365,
) -> None:
    """Make the certificates and tokens of a run: its CA, one folder for the server and one for
    each client.

    Give `DIR/server` to the server and `DIR/clients/NNN` to client NNN; `DIR/ca.key` stays
    where it is. What is there is never changed, so the same command with more clients adds the
    new ones.

    Example:

    - `fedknow certs certs --clients 20 --host fl.example.org --host 192.0.2.7`
    """
    with explained(None):
        from fedknow.server.certs import make_certificates

        for made in make_certificates(folder, clients, hosts or [], days):
            out.print(escape(str(made)), highlight=False, soft_wrap=True)


def server(
    experiment: Annotated[str, EXPERIMENT] = "digits",
    listen: Annotated[
        str,
        typer.Option(
            "--listen",
            metavar="HOST:PORT",
            help="Where clients connect; port 0 is any free one.",
        ),
    ] = "127.0.0.1:8700",
    tls: Annotated[
        Path | None,
        typer.Option(
            "--tls",
            metavar="DIR",
            help="`server/` of a folder that `fedknow certs` made.",
        ),
    ] = None,
    tokens: Annotated[
        bool,
        typer.Option(
            "--tokens",
            help="Let clients in by their tokens instead of their certificates.",
        ),
    ] = False,
    insecure: Annotated[bool, INSECURE] = False,
    changes: Annotated[list[str] | None, SET] = None,
    folder: Annotated[Path | None, OUT] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run in the run folder, from its last round; else begin.",
        ),
    ] = False,
    data_dir: Annotated[Path | None, DATA_DIR] = None,
    port_file: Annotated[
        Path | None,
        typer.Option(
            "--port-file",
            metavar="FILE",
            help="Write the port here when clients can connect.",
        ),
    ] = None,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Run one experiment with real clients (`fedknow client`) and write a report.

    EXPERIMENT is a preset's name (`fedknow list presets`) or a TOML file; without one it is
    `digits`. The run begins when all `data.clients` clients are connected
    (`engine.min_clients`), and waits for those that drop, or with `engine.round_timeout` goes
    on without them.

    Clients that lose the server come back by themselves. Ctrl-C and SIGTERM are safe: go on
    later with `--resume`.

    Examples:

    - `fedknow server digits --set data.clients=4` with four `fedknow client` on this machine

    - `fedknow server digits --listen 0.0.0.0:8700 --tls certs/server --out runs/field --resume`
    """
    with explained(folder, "server"):
        config = read_experiment(experiment, changes, data_dir)
        run = folder or default_run_folder(config)
    with explained(run, "server", extra=_extra_of_server(config)):
        from fedknow.client.state import write_atomic
        from fedknow.server.serve import serve

        def ready(port: int) -> None:
            logging.getLogger("fedknow").info(
                "listening on %s:%d", listen.rpartition(":")[0], port
            )
            if port_file is not None:
                write_atomic(port_file, f"{port}\n".encode())

        _log_plainly(quiet)
        with progress_shown(config, quiet) as observers:
            serve(
                config,
                run,
                listen,
                tls=tls,
                tokens=tokens,
                insecure=insecure,
                resume=resume,
                observers=observers,
                ready=ready,
            )
        show_run(run, quiet)


def client(
    server: Annotated[str, SERVER],
    tls: Annotated[Path | None, CLIENT_TLS] = None,
    insecure: Annotated[bool, INSECURE] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="DIR",
            help="This client's own data (`task-000.npz`, ...) where the experiment says `data.name = local`; else the "
            "folder of the experiment's data set. Without it `FEDKNOW_DATA` is used; `digits` needs neither.",
        ),
    ] = None,
    state: Annotated[
        Path,
        typer.Option(
            "--state",
            metavar="DIR",
            help="What this client keeps; a folder of its own.",
        ),
    ] = Path("fedknow-state"),
    number: Annotated[
        int | None,
        typer.Option(
            "--client",
            metavar="N",
            min=0,
            help="Which client this is; a certificate says it by itself.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="What to compute on: `cpu`, `cuda`, `cuda:1`, ... or `auto`, a GPU if there is one.  [as the "
            "experiment's `engine.device` says]",
        ),
    ] = None,
    give_up: Annotated[
        float | None,
        typer.Option(
            "--give-up",
            metavar="SECONDS",
            min=0,
            help="End after so long without a connection.  [never]",
        ),
    ] = None,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Take part in the experiment of a server (`fedknow server`) until it is over.

    All that this machine needs is the server's address, its certificate and its data; the
    server says what the experiment is. What is kept in `--state` survives a reboot in any
    second. The exit code is 0 when the run is over, 1 when the client gave up, 2 when the
    server refuses it or the command cannot be run.

    Examples:

    - `fedknow client --server 127.0.0.1:8700 --state state/0`

    - `fedknow client --server fl.example.org:8700 --tls certs/clients/003 --data ~/data --state
      ~/fedknow-state`
    """
    with explained(None):
        from fedknow.client.edge.client import EdgeClient, run_client

        check_address(server, tls, insecure)
        _log_plainly(quiet)
        edge = EdgeClient(
            server,
            state,
            tls=tls,
            data=data,
            client=number,
            device=device,
            give_up=give_up,
        )
        with _not_waiting_for(edge), explained(None):
            run_client(edge)


def status(
    server: Annotated[str, SERVER],
    tls: Annotated[Path | None, CLIENT_TLS] = None,
    insecure: Annotated[bool, INSECURE] = False,
) -> None:
    """Print how the run of a server stands, as JSON: who is connected, what is being done, bytes,
    refusals."""
    with explained(None):
        from fedknow.client.edge.client import fetch_status

        check_address(server, tls, insecure)
        typer.echo(json.dumps(json.loads(fetch_status(server, tls)), indent=1))


def forget(
    folder: Annotated[Path, typer.Argument(metavar="RUN")],
    clients: Annotated[
        list[int],
        typer.Option(
            "--client",
            metavar="N",
            min=0,
            help="Which client; may be given many times.",
        ),
    ],
) -> None:
    """Have clients of an unfinished run begin anew when it is resumed: the way back for one that
    lost its state.

    RUN is the run folder, of `fedknow simulate` or of `fedknow server`; nothing is to be done
    on the client. It keeps its number and its data, and goes on as a client that has not
    trained yet. The record says so.

    Example:

    - `fedknow forget runs/field --client 3`, then `fedknow server ... --out runs/field --resume`
    """
    with explained(None, extra="server"):
        from fedknow.server.run.forget import forget_clients

        for client in forget_clients(folder, clients):
            out.print(
                f"Client {client} begins anew when the run is resumed.", highlight=False
            )


def _log_plainly(quiet: bool) -> None:
    """Write our log as plain lines, with the time, to stderr."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", force=True)
    logging.getLogger("fedknow").setLevel(logging.WARNING if quiet else logging.INFO)


@contextmanager
def _not_waiting_for(edge: EdgeClient) -> Iterator[None]:
    """End the process although a client trains: nothing can interrupt that, and it is done again
    next time."""
    try:
        yield
    except typer.Exit as end:
        if edge.busy:
            sys.stderr.flush()
            os._exit(end.exit_code)
        raise


def _extra_of_server(config: ExperimentConfig) -> str:
    """The extra that a server of an experiment needs: clients with data of their own spare it."""
    from fedknow.client.data.local import LOCAL

    return "server" if config.data.name == LOCAL else "server,data"
