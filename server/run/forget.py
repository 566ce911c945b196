"""Have clients of an unfinished run begin anew, as their states are lost."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from fedknow.protocols.config import ConfigError
from fedknow.server.run.checkpoint import (
    Checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from fedknow.server.run.disk import running_out_of_disk
from fedknow.server.run.events import ClientBegunAnew
from fedknow.server.run.folder import RunFolder
from fedknow.server.run.recorder import Recorder

__all__ = ["forget_clients"]


def forget_clients(path: Path, clients: Collection[int]) -> list[int]:
    """Make clients fresh in a run's last checkpoint, and record it.

    The server says with each piece of work from which version of its state a client starts. So
    this is all there is to do, be the clients virtual or real: the next work starts from none.

    Parameters
    ----------
    path : Path
        The run folder; no process may be at work in it.
    clients : collection of int
        Which.

    Returns
    -------
    list of int
        The clients, ascending.

    Raises
    ------
    ConfigError
        If there is no such unfinished run or client, or a client keeps nothing.
    RunError
        If the run folder is damaged, or the disk is full.
    """
    with (
        RunFolder.resume(path, RunFolder.open(path).config) as folder,
        running_out_of_disk(path),
    ):
        checkpoint = load_checkpoint(folder.checkpoints)
        if checkpoint is None:
            raise ConfigError(
                f"{path} has no checkpoint yet, so no client has kept anything; resume it as it is"
            )
        chosen = sorted(set(clients))
        for client in chosen:
            _check(client, checkpoint, folder)
        # Before the events are added, which belong behind the last complete round.
        folder.cut_back(checkpoint.position, checkpoint.chain)
        for client in chosen:
            _record(client, checkpoint, folder)
        versions = {
            client: version
            for client, version in checkpoint.versions.items()
            if client not in chosen
        }
        changed = replace(
            checkpoint,
            versions=versions,
            position=folder.position(),
            chain=folder.chain,
        )
        # Joined, as the process ends right after, and the folder must hold one checkpoint.
        save_checkpoint(folder.checkpoints, changed).join()
    return chosen


def _check(client: int, checkpoint: Checkpoint, folder: RunFolder) -> None:
    count = folder.config.data.clients
    if client >= count:
        raise ConfigError(
            f"--client {client}: {folder.path} has clients 0 to {count - 1}"
        )
    if not checkpoint.versions.get(client):
        raise ConfigError(
            f"--client {client}: this client keeps nothing that could be forgotten; leave it out"
        )


def _record(client: int, checkpoint: Checkpoint, folder: RunFolder) -> None:
    reason = (
        f"client {client} begins anew: its state was given up by fedknow forget"
    )
    place = {"task": checkpoint.task, "round": checkpoint.round}
    Recorder(folder).record(
        ClientBegunAnew(client=client, **place, reason=reason)
    )
