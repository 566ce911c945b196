"""Checkpoints: a run's state between two rounds, without pickle.

A checkpoint is a folder ``checkpoint-<n>`` (n: rounds done) with the global parameters under
their own names (``arrays.safetensors``) and everything else (``state.safetensors``). The
one-line file ``latest`` names the one that counts; it is replaced only when the new checkpoint
is complete on the disk, with the clients' states and the events that belong to it, and older
ones are deleted after that. The disk is waited for once, for all of these together, and not for
what is deleted, which may take longer than all the rest.
"""

from __future__ import annotations

import re
import shutil
import threading
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from fedknow.client.state import (
    StateError,
    load_state,
    save_state,
)
from fedknow.protocols.files import sync_disk, write_atomic
from fedknow.protocols.messages import Arrays
from fedknow.server.checks.faults import RunError

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "find_arrays",
    "load_checkpoint",
    "save_checkpoint",
]

_LATEST = "latest"
_NAME = re.compile(r"checkpoint-[0-9]{1,18}(\.1)?")
_PUT_BACK = "put the folder back from a copy, or start again with another --out"


class CheckpointError(RunError):
    """A checkpoint that a run cannot go on from."""

    is_resumable = False


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run between two rounds.

    Attributes
    ----------
    task, round, server_round : int
        The last complete round: its task (from 0), its number in the task and in the run (from 1).
    arrays : Arrays
        Global parameters.
    strategy : dict
        See :func:`fedknow.server.run.strategy_state.strategy_state`.
    scores : dict of str to ndarray
        See :meth:`fedknow.server.run.evaluation.Scores.raw`.
    versions : dict of int to int
        Version of each client's state.
    traffic : dict
        Bytes and messages so far, by kind.
    position : int
        Length of ``metrics.jsonl``, bytes.
    seconds : float
        Time the run has taken so far.
    grid : dict
        See :meth:`fedknow.server.grids.base.MessageGrid.state`.
    arrivals : dict
        See :meth:`fedknow.server.run.task_times.TaskTimes.state`; empty where all clients are at
        the same task.
    client_memory : float
        Most memory that a client's work has needed so far, bytes.
    chain : int or None
        Checksum of the events so far (:attr:`fedknow.server.run.folder.RunFolder.chain`);
        ``None``: of an earlier version.
    partition : str
        Digest of the clients' data; empty: of an earlier version.
    """

    task: int
    round: int
    server_round: int
    arrays: Arrays
    strategy: dict[str, Any]
    scores: dict[str, np.ndarray]
    versions: dict[int, int]
    traffic: dict[str, dict[str, int]]
    position: int
    seconds: float
    grid: dict[str, Any] = field(default_factory=dict)
    arrivals: dict[str, Any] = field(default_factory=dict)
    client_memory: float = 0.0
    chain: int | None = None
    partition: str = ""


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> threading.Thread:
    """Write a checkpoint and let it take the place of the one before.

    Returns
    -------
    threading.Thread
        Deletes what does not count any more; Python waits for it before it ends.

    Raises
    ------
    OSError, StateError
        If it cannot be written, for example because the disk is full; the one before then still
        counts.
    """
    folder.mkdir(exist_ok=True)
    name = _free_name(folder, checkpoint.server_round)
    target = folder / name
    if target.exists():  # left by a run that ended just before it counted
        shutil.rmtree(target)
    target.mkdir()
    try:
        arrays = safetensors.save(checkpoint.arrays)
        # Not synced one by one: the disk is waited for once, below.
        write_atomic(target / "arrays.safetensors", arrays, durable=False)
        state = {
            "task": checkpoint.task,
            "round": checkpoint.round,
            "server_round": checkpoint.server_round,
            "names": list(
                checkpoint.arrays
            ),  # in order, which safetensors does not keep
            "crc32": zlib.crc32(arrays),  # nor a checksum
            "strategy": checkpoint.strategy,
            "scores": dict(checkpoint.scores),
            "versions": _version_table(checkpoint.versions),
            "traffic": checkpoint.traffic,
            "position": checkpoint.position,
            "seconds": checkpoint.seconds,
            "grid": checkpoint.grid,
            "arrivals": checkpoint.arrivals,
            "client_memory": checkpoint.client_memory,
            "chain": checkpoint.chain,
            "partition": checkpoint.partition,
        }
        save_state(target / "state.safetensors", state, durable=False)
        # The whole file system: clients' states and events belong to the checkpoint too.
        sync_disk(folder)
    # After an interrupt too, as half a checkpoint only fills the disk.
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    # Only now does the checkpoint count, as all it needs is on the disk.
    write_atomic(folder / _LATEST, f"{name}\n".encode())
    stale = [old for old in folder.glob("checkpoint-*") if old.name != name]
    # In a thread, as deleting may take longer than all the rest. It is no daemon: the process
    # waits for it.
    deleting = threading.Thread(
        target=_delete, args=(stale,), name="fedknow-delete"
    )
    deleting.start()
    return deleting


def _free_name(folder: Path, server_round: int) -> str:
    """Choose a name that the checkpoint that counts does not have."""
    name = f"checkpoint-{server_round}"
    # `fedknow forget` writes a second checkpoint of the same round, and the first counts until
    # then.
    return f"{name}.1" if _read_latest(folder) == name else name


def _read_latest(folder: Path) -> str | None:
    """Read the file ``latest``; ``None`` if there is none."""
    try:
        return (folder / _LATEST).read_text("utf-8", "replace").strip()
    except FileNotFoundError:
        return None


def _delete(folders: Sequence[Path]) -> None:
    for folder in folders:
        shutil.rmtree(
            folder, ignore_errors=True
        )  # what is left goes with the next


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the last complete checkpoint; ``None`` if there is none yet.

    Raises
    ------
    CheckpointError
        If it cannot be read, or is not what was written.
    """
    name = _read_latest(folder)
    if name is None:
        return _complete_one(folder)
    if not _NAME.fullmatch(name):
        text = (
            f"{folder / _LATEST}: the checkpoint cannot be read: {name[:40]!r} is no "
            f"checkpoint; {_PUT_BACK}"
        )
        raise CheckpointError(text)
    return _load(folder / name)


def find_arrays(folder: Path) -> Path:
    """Find the file of the global parameters in the last complete checkpoint.

    Raises
    ------
    FileNotFoundError
        If there is no checkpoint yet.
    CheckpointError
        If it cannot be read.
    """
    checkpoint = load_checkpoint(folder)
    if checkpoint is None:
        raise FileNotFoundError(folder)
    # `latest` is missing only in a folder that was tampered with.
    name = _read_latest(folder) or f"checkpoint-{checkpoint.server_round}"
    return folder / name / "arrays.safetensors"


def _version_table(versions: Mapping[int, int]) -> np.ndarray:
    """Make a table of clients and their states' versions, int64 [client, 2]."""
    # As an array: JSON of a hundred thousand clients takes longer than many a round.
    numbers = chain.from_iterable(versions.items())
    return np.fromiter(numbers, np.int64, 2 * len(versions)).reshape(-1, 2)


def _versions(stored: np.ndarray | Mapping[str, int]) -> dict[int, int]:
    # Earlier versions wrote names and numbers.
    if isinstance(stored, Mapping):
        return {int(client): version for client, version in stored.items()}
    clients, versions = stored.T.tolist()
    return dict(zip(clients, versions, strict=True))


def _complete_one(folder: Path) -> Checkpoint | None:
    """Load the newest complete checkpoint where ``latest`` is missing.

    Gives ``None`` if there is none.

    It was written with all that belongs to it, and nothing was deleted after it.
    """
    present = [
        path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)
    ]
    for path in sorted(
        present,
        key=lambda path: [int(part) for part in path.name[11:].split(".")],
        reverse=True,
    ):
        with suppress(
            CheckpointError
        ):  # a run that was killed left it half written
            return _load(path)
    return None


def _load(target: Path) -> Checkpoint:
    try:
        state = load_state(target / "state.safetensors")
        data = (target / "arrays.safetensors").read_bytes()
        if zlib.crc32(data) != state["crc32"]:
            raise ValueError("the checksum of arrays.safetensors is wrong")
        # A folder that was renamed by hand has right checksums all the same.
        if target.name[11:].partition(".")[0] != str(state["server_round"]):
            raise ValueError(f"it is that of round {state['server_round']}")
        arrays = safetensors.load(data)
        return Checkpoint(
            task=state["task"],
            round=state["round"],
            server_round=state["server_round"],
            arrays=Arrays((name, arrays[name]) for name in state["names"]),
            strategy=state["strategy"],
            scores=state["scores"],
            versions=_versions(state["versions"]),
            traffic=state["traffic"],
            position=state["position"],
            seconds=state["seconds"],
            grid=state["grid"],
            # Earlier versions wrote none of these.
            arrivals=state.get("arrivals", {}),
            client_memory=state.get("client_memory", 0.0),
            chain=state.get("chain"),
            partition=state.get("partition", ""),
        )
    except (OSError, ValueError, KeyError, SafetensorError, StateError) as error:
        raise CheckpointError(
            f"{target}: the checkpoint cannot be read: {type(error).__name__}: {error}; {_PUT_BACK}"
        ) from error
