"""Commands about who takes part in a run with real clients."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fedknow.cli.errors import explained
from fedknow.cli.output import out

__all__ = ["admit", "audit", "eject", "forget", "members", "revoke"]

RUN = typer.Argument(metavar="RUN")
CERTS_DIR = typer.Argument(metavar="DIR")
CLIENTS = typer.Option(
    "--client", metavar="N", min=0, help="Which client; may be given many times."
)
REASON = typer.Option(
    "--reason",
    metavar="TEXT",
    help="Why; the client is told.",
    show_default=False,
)
HEAD = typer.Option(
    "--head",
    metavar="HASH",
    help="A hash that an earlier call printed; the log must still contain it.",
    show_default=False,
)


def members(folder: Annotated[Path, RUN]) -> None:
    """Print which clients are in a run, and which were taken out.

    RUN is the run folder of `fedknow server`. `fedknow status` says who is connected.
    """
    with explained(None, extra="server"):
        # Imported late, so that the command line starts fast and on an edge box.
        from fedknow.server.run.folder import RunFolder
        from fedknow.server.run.members import read_ejections

        count = RunFolder.open(folder).config.data.clients
        ejections = read_ejections(folder)
        for client in range(count):
            ejection = ejections.get(client)
            if ejection is None:
                _say(f"client {client}: in the run")
                continue
            since = _moment(ejection.moment)
            _say(f"client {client}: out since {since}: {ejection.reason}")


def eject(
    folder: Annotated[Path, RUN],
    clients: Annotated[list[int], CLIENTS],
    reason: Annotated[str, REASON] = "the operator took it out",
) -> None:
    """Take clients out of a run, while it goes on or before it is resumed.

    Their streams end within seconds. They are given no work and are not waited for. Their
    credentials stay good for other runs (`fedknow revoke`).

    For example:

    - `fedknow eject runs/field --client 3 --reason "sends nonsense"`
    """
    with explained(None, extra="server"):
        # Imported late, so that the command line starts fast and on an edge box.
        from fedknow.server.run import members as lists

        lists.eject(folder, clients, reason)
        for client in clients:
            _say(f"Client {client} is out of the run.")


def admit(
    folder: Annotated[Path, RUN], clients: Annotated[list[int], CLIENTS]
) -> None:
    """Let clients that were taken out into a run again.

    They come back by themselves, within half a minute.

    For example:

    - `fedknow admit runs/field --client 3`
    """
    with explained(None, extra="server"):
        # Imported late, so that the command line starts fast and on an edge box.
        from fedknow.server.run import members as lists

        lists.admit(folder, clients)
        for client in clients:
            _say(f"Client {client} may come in again.")


def revoke(
    folder: Annotated[Path, CERTS_DIR],
    clients: Annotated[list[int], CLIENTS],
) -> None:
    """Let no certificate and no token of a client count any more.

    DIR is the folder of `fedknow certs`, or the server's part of it. A server that uses it ends
    the client's stream within seconds. `fedknow certs` then makes new credentials.

    For example:

    - `fedknow revoke certs --client 3`
    """
    with explained(None, extra="server"):
        # Imported late, so that the command line starts fast and on an edge box.
        from fedknow.server import certs

        for client in clients:
            certs.revoke(folder, client)
            _say(f"No credential of client {client} counts any more.")


def audit(
    folder: Annotated[Path, RUN],
    head: Annotated[str, HEAD] = "",
) -> None:
    """Print a run's audit log, and prove that no line of it was changed.

    Each line holds the hash of the one before. The last hash is printed: noted elsewhere, it
    proves later that the log did not lose its end (`--head`).

    For example:

    - `fedknow audit runs/field`
    """
    with explained(None, extra="server"):
        # Imported late, so that the command line starts fast and on an edge box.
        from fedknow.protocols.config import ConfigError
        from fedknow.protocols.texts import counted
        from fedknow.server.run.audit import read_audit

        hashes = []
        for entry, line_hash in read_audit(folder):
            hashes.append(line_hash)
            moment, event = _moment(entry.pop("time")), entry.pop("event")
            words = ", ".join(f"{name} {value}" for name, value in entry.items())
            _say(f"{moment} {event}: {words}")
        if head and head not in hashes:
            raise ConfigError(
                f"--head {head}: the log does not contain it, so its end was cut off"
            )
        newest = hashes[-1] if hashes else "none"
        _say(f"{counted(len(hashes), 'line')}; last hash {newest}")


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def forget(
    folder: Annotated[Path, RUN],
    clients: Annotated[list[int], CLIENTS],
) -> None:
    """Let clients of an unfinished run begin anew when it is resumed.

    This is the way back for a client that lost its state. RUN is the run folder, of `fedknow
    simulate` or of `fedknow server`; nothing is to be done on the client. It keeps its number
    and its data, and goes on as a client that has not trained yet. The record says so.

    For example:

    - `fedknow forget runs/field --client 3`, then `fedknow server ... --out runs/field --resume`
    """
    with explained(None, extra="server"):
        # Imported late, so that the command line starts fast and on an edge box.
        from fedknow.server.run.forget import forget_clients

        for client in forget_clients(folder, clients):
            out.print(
                f"Client {client} begins anew when the run is resumed.",
                highlight=False,
            )


def _say(text: str) -> None:
    out.print(escape(text), highlight=False, soft_wrap=True)
