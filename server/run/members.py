"""Who takes part in a run: clients that are taken out, and let in again.

The file ``members.json`` of a run folder says so. The server reads it again when it changes, so
that a word of the operator counts within seconds and needs no restart.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedknow.protocols.config import ConfigError
from fedknow.protocols.files import write_atomic
from fedknow.protocols.texts import printable

__all__ = ["MEMBERS", "Ejection", "admit", "eject", "read_ejections"]

MEMBERS = "members.json"


@dataclass(frozen=True)
class Ejection:
    """Why a client is out of a run.

    Attributes
    ----------
    moment : float
        Seconds since 1970.
    reason : str
        The operator's words.
    """

    moment: float
    reason: str


def read_ejections(folder: Path) -> dict[int, Ejection]:
    """Read which clients are out of a run.

    Raises
    ------
    ConfigError
        If the file is not what these functions wrote.
    """
    path = folder / MEMBERS
    try:
        entries = json.loads(path.read_bytes())["ejected"]
        return {
            int(client): Ejection(float(entry["time"]), str(entry["reason"]))
            for client, entry in entries.items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: not a list of members ({error!r}); remove it to admit everybody"
        ) from None


def eject(folder: Path, clients: Collection[int], reason: str) -> None:
    """Take clients out of a run, whether it goes on or is resumed later.

    Raises
    ------
    ConfigError
        If there is no such run or client.
    """
    _check_clients(folder, clients)
    moment = time.time()
    entry = Ejection(round(moment, 3), printable(reason, 500))
    _write(folder, read_ejections(folder) | dict.fromkeys(clients, entry))


def admit(folder: Path, clients: Collection[int]) -> None:
    """Let clients in again.

    Raises
    ------
    ConfigError
        If there is no such run or client, or one of them is not out.
    """
    _check_clients(folder, clients)
    ejections = read_ejections(folder)
    for client in clients:
        if client not in ejections:
            raise ConfigError(
                f"--client {client}: it is not out of the run in {folder}"
            )
        del ejections[client]
    _write(folder, ejections)


def _check_clients(folder: Path, clients: Collection[int]) -> None:
    # Imported late: it reads runs, and the server's event loop needs only the list.
    from fedknow.server.run.folder import RunFolder

    count = RunFolder.open(folder).config.data.clients
    for client in clients:
        if client >= count:
            raise ConfigError(
                f"--client {client}: the run in {folder} has {count} (data.clients), from 0"
            )


def _write(folder: Path, ejections: Mapping[int, Ejection]) -> None:
    entries = {
        str(client): {"time": ejection.moment, "reason": ejection.reason}
        for client, ejection in sorted(ejections.items())
    }
    text = json.dumps({"ejected": entries}, indent=1) + "\n"
    write_atomic(folder / MEMBERS, text.encode())
