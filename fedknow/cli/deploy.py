"""Commands of experiments with real clients."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from fedknow.cli.errors import explained
from fedknow.cli.logs import LogFormat, start_log
from fedknow.cli.options import (
    CLIENT_TLS,
    DATA_DIR,
    EXPERIMENT,
    INSECURE,
    OUT,
    QUIET,
    SERVER,
    SET,
    TRACK,
    default_run_folder,
    read_experiment,
)
from fedknow.cli.output import out, progress_shown, show_run
from fedknow.cli.watch import WATCH, page_served
from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.errors import FAILED
from fedknow.protocols.transport import check_address

if TYPE_CHECKING:
    from fedknow.client.edge.client import EdgeClient

__all__ = ["certs", "client", "server", "status"]

CERTS_DIR = typer.Argument(metavar="DIR")
CLIENTS = typer.Option(
    "--clients", min=1, help="How many clients there shall be."
)
HOSTS = typer.Option(
    "--host",
    metavar="NAME",
    help="Name or address of the server, without a port; `*.example.org` stands for "
    "all names with one part before; may be given many times.",
)
DAYS = typer.Option("--days", min=1, help="How long certificates are valid.")
LISTEN = typer.Option(
    "--listen",
    metavar="HOST:PORT",
    help="Where clients connect; port 0 is any free one.",
)
TLS = typer.Option(
    "--tls",
    metavar="DIR",
    help="`server/` of a folder that `fedknow certs` made.",
)
TOKENS = typer.Option(
    "--tokens",
    help="Let clients in by their tokens instead of their certificates.",
)
RESUME = typer.Option(
    "--resume",
    help="Go on with the run in the run folder, from its last round; else begin.",
)
PORT_FILE = typer.Option(
    "--port-file",
    metavar="FILE",
    help="Write the port here when clients can connect.",
)
METRICS = typer.Option(
    "--metrics-listen",
    metavar="HOST:PORT",
    help="Serve `/metrics` for Prometheus here, behind the credentials of `fedknow "
    "status`; port 0 is any free one.",
)
RENEW = typer.Option(
    "--renew",
    metavar="DIR",
    help="Folder of `fedknow certs` with `ca.key`: renew clients' certificates in the last "
    "third of their time.",
)
SIGNATURE = typer.Option(
    "--signature",
    metavar="FILE",
    help="The experiment's signature (`fedknow sign`), for clients with `--signed-by`.",
)
SIGNED_BY = typer.Option(
    "--signed-by",
    metavar="FILE",
    help="Run only experiments that this public key (`KEY.pub`) has signed.  [any]",
    show_default=False,
)
LOG_FORMAT = typer.Option(
    "--log-format",
    envvar="FEDKNOW_LOG",
    help="Write the log as plain lines or as one JSON object a line.",
)
DATA = typer.Option(
    "--data",
    metavar="PATH",
    help="This client's own data where the experiment says `data.name = local`: a folder of "
    "`task-000.npz` and so on, a table, an archive or a folder of sounds; else the folder of "
    "the experiment's data set. Without it `FEDKNOW_DATA` is used; `digits` needs neither.",
)
STATE = typer.Option(
    "--state",
    metavar="DIR",
    help="Where this client stores its state; a folder of its own.",
)
STATE_KEY = typer.Option(
    "--state-key",
    metavar="FILE",
    help="Encrypt the state with this file of 32 random bytes.  [not encrypted]",
    show_default=False,
)
NUMBER = typer.Option(
    "--client",
    metavar="N",
    min=0,
    help="Which client this is; a certificate says it by itself.",
)
DEVICE = typer.Option(
    "--device",
    metavar="DEVICE",
    help="The device to compute on: `cpu`, `cuda`, `cuda:1`, ... or `auto`, a GPU if "
    "there is one.  [as the experiment's `engine.device` says]",
)
GIVE_UP = typer.Option(
    "--give-up",
    metavar="SECONDS",
    min=0,
    help="End after so long without a connection.  [never]",
)
ALLOW = typer.Option(
    "--allow",
    metavar="MODULE:NAME",
    help="Code of your own that the server may name, with the settings that it may choose: "
    "`my_models:build(width)`; a file, `file:PATH`; or `download`, for data sets of a public "
    "hub. May be given many times.  [none]",
    show_default=False,
)
LIMIT = typer.Option(
    "--limit",
    metavar="KEY=NUMBER",
    help="The largest experiment to take part in: batch_size, epochs, classes, clients, tasks, "
    "parameters, image_values, message_mb, disk_mb.  [4096, 1000, 100000, 10000, 1000, "
    "200000000, 4000000, 1024, 16384]",
    show_default=False,
)
KEEP_OWN = typer.Option(
    "--keep-own",
    help="Refuse experiments in which this client would send parameters that its method "
    "keeps with it, such as its head (`evaluation.global_model`).",
)


def certs(
    folder: Annotated[Path, CERTS_DIR],
    clients: Annotated[int, CLIENTS],
    hosts: Annotated[list[str] | None, HOSTS] = None,
    days: Annotated[int, DAYS] = 365,
) -> None:
    """Make the certificates and tokens of a run.

    They are its CA, one folder for the server and one for each client. Give `DIR/server` to the
    server and `DIR/clients/NNN` to client NNN; `DIR/ca.key` stays where it is. Existing files
    are never changed, so the same command with more clients adds the new ones.

    For example:

    - `fedknow certs certs --clients 20 --host fl.example.org --host 192.0.2.7`
    """
    with explained(None):
        # Imported late, so that the command line starts fast and on an edge box.
        from fedknow.server.certs import make_certificates

        for path in make_certificates(folder, clients, hosts or [], days):
            out.print(escape(str(path)), highlight=False, soft_wrap=True)


def server(  # noqa: PLR0913  # a command's options are its arguments
    experiment: Annotated[str, EXPERIMENT] = "digits",
    listen: Annotated[str, LISTEN] = "127.0.0.1:8700",
    tls: Annotated[Path | None, TLS] = None,
    tokens: Annotated[bool, TOKENS] = False,
    insecure: Annotated[bool, INSECURE] = False,
    changes: Annotated[list[str] | None, SET] = None,
    folder: Annotated[Path | None, OUT] = None,
    resume: Annotated[bool, RESUME] = False,
    data_dir: Annotated[Path | None, DATA_DIR] = None,
    port_file: Annotated[Path | None, PORT_FILE] = None,
    watch: Annotated[bool, WATCH] = False,
    track: Annotated[list[str] | None, TRACK] = None,
    metrics_listen: Annotated[str, METRICS] = "",
    renew: Annotated[Path | None, RENEW] = None,
    signature: Annotated[Path | None, SIGNATURE] = None,
    log_format: Annotated[LogFormat, LOG_FORMAT] = LogFormat.PLAIN,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Run one experiment with real clients and write a report.

    EXPERIMENT is a preset's name (`fedknow list presets`) or a TOML file; without one it is
    `digits`. The run begins when all `data.clients` clients (`fedknow client`) are connected
    (`engine.min_clients`), and waits for those that drop, or with `engine.round_timeout` goes
    on without them.

    Clients that lose the server come back by themselves. Ctrl-C and SIGTERM are safe: go on
    later with `--resume`.

    For example:

    - `fedknow server digits --set data.clients=4` with four `fedknow client` on this machine

    - `fedknow server digits --listen 0.0.0.0:8700 --tls certs/server --out runs/field --resume`
    """
    with explained(folder, "server"):
        config = read_experiment(experiment, changes, data_dir, track)
        run = folder or default_run_folder(config)
    # Twice: only with a configuration are the folder and the packages known.
    with explained(run, "server", extra=_extra_of_server(config)):
        # Imported late, so that the command line starts fast and on an edge box.
        from fedknow.server.serve import serve

        start_log(log_format, quiet, {"run": str(run)})
        with page_served(run, watch), progress_shown(config, quiet) as observers:
            serve(
                config,
                run,
                listen,
                tls=tls,
                tokens=tokens,
                insecure=insecure,
                resume=resume,
                observers=observers,
                ready=partial(_announce, listen, port_file),
                metrics_listen=metrics_listen,
                renew=renew,
                signature=signature,
            )
        show_run(run, quiet)


def client(  # noqa: PLR0913  # a command's options are its arguments
    server: Annotated[str, SERVER],
    tls: Annotated[Path | None, CLIENT_TLS] = None,
    insecure: Annotated[bool, INSECURE] = False,
    data: Annotated[Path | None, DATA] = None,
    state: Annotated[Path, STATE] = Path("fedknow-state"),
    state_key: Annotated[Path | None, STATE_KEY] = None,
    number: Annotated[int | None, NUMBER] = None,
    device: Annotated[str | None, DEVICE] = None,
    give_up: Annotated[float | None, GIVE_UP] = None,
    allow: Annotated[list[str] | None, ALLOW] = None,
    limit: Annotated[list[str] | None, LIMIT] = None,
    signed_by: Annotated[Path | None, SIGNED_BY] = None,
    keep_own: Annotated[bool, KEEP_OWN] = False,
    log_format: Annotated[LogFormat, LOG_FORMAT] = LogFormat.PLAIN,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Take part in the experiment of a server until it is over.

    This machine needs only the server's address, its certificate and its data; the server
    describes the experiment. The state in `--state` survives a reboot in any second. The exit
    code is 0 when the run is over, 1 when the client gave up, 2 when the server refuses it or
    the command cannot be run.

    A server can make this machine run what fedknow ships, and of other code only what `--allow`
    names.

    For example:

    - `fedknow client --server 127.0.0.1:8700 --state state/0`

    - `fedknow client --server fl.example.org:8700 --tls certs/clients/003 --data ~/data --state
      ~/fedknow-state`
    """
    with explained(None):
        # Imported late, so that the command line starts fast and on an edge box.
        from fedknow.client.edge.client import EdgeClient, run_client
        from fedknow.client.permissions import Limits, Permissions
        from fedknow.protocols.security.signing import PublicKey

        check_address(server, tls, insecure)
        start_log(log_format, quiet, {} if number is None else {"client": number})
        edge = EdgeClient(
            server,
            state,
            tls=tls,
            data=data,
            client=number,
            device=device,
            give_up=give_up,
            state_key=state_key,
            permissions=Permissions(
                frozenset(allow or []),
                Limits.parse(limit or []),
                None if signed_by is None else PublicKey(signed_by),
                keep_own,
            ),
        )
        # The inner block turns a failure into an exit, which the outer one hastens.
        with _end_at_once(edge), explained(None):
            run_client(edge)


def status(
    server: Annotated[str, SERVER],
    tls: Annotated[Path | None, CLIENT_TLS] = None,
    insecure: Annotated[bool, INSECURE] = False,
) -> None:
    """Print the state of a server's run, as JSON.

    It says which clients are connected and which work is under way, and counts bytes and
    refusals.
    """
    with explained(None):
        # Imported late, so that the command line starts fast and on an edge box.
        from fedknow.client.edge.status import fetch_status

        check_address(server, tls, insecure)
        typer.echo(json.dumps(json.loads(fetch_status(server, tls)), indent=1))


def _announce(listen: str, port_file: Path | None, port: int) -> None:
    """Say where clients can connect now."""
    from fedknow.protocols.files import write_atomic

    # From the right, as an IPv6 address has colons of its own.
    address = f"{listen.rpartition(':')[0]}:{port}"
    logging.getLogger("fedknow").info("listening on %s", address)
    if port_file is not None:
        # Whole or not at all: a script may read the file the moment it appears.
        write_atomic(port_file, f"{port}\n".encode())


@contextmanager
def _end_at_once(edge: EdgeClient) -> Iterator[None]:
    """End the process although the client is training.

    Nothing can interrupt the training, and it is repeated next time. An ordinary exit would
    stop its thread inside PyTorch, which aborts the process.
    """
    exit_code = 0
    try:
        yield
    except typer.Exit as end:
        exit_code = end.exit_code
    except Exception:
        # A fault of this program: its traceback is shown before the process ends.
        traceback.print_exc()
        exit_code = FAILED
    if not edge.join():
        # os._exit leaves out what is still in buffers.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    raise typer.Exit(exit_code)


def _extra_of_server(config: ExperimentConfig) -> str:
    """Return the extras that the server of an experiment needs.

    Clients with data of their own spare it the packages for data sets.
    """
    # Imported late, so that the command line starts fast and on an edge box.
    from fedknow.client.data.local import LOCAL

    return "server" if config.data.name == LOCAL else "server,data"
