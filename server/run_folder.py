"""The run folder: all that a run leaves behind, written so that no crash can spoil it.

::

    config.toml      the complete configuration
    partition.json   which client holds what (sizes, classes, digest)
    metrics.jsonl    one event a line
    fleet.json       what the clients' devices did, where they have any (fedknow.simulations.fleet)
    run-id           by which real clients know the run again (fedknow.server.serve)
    accuracy.npz     raw accuracies, from which every metric can be computed again
    checkpoint/      what the run needs to go on (see fedknow.server.checkpoint)
    clients/         the clients' states (owned by the grid)

Files are replaced as a whole or not at all; ``metrics.jsonl`` grows line by line and is cut back to the last
checkpoint's position when a run is resumed.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from fedknow.client.state import write_atomic
from fedknow.protocols.config import ConfigError, ExperimentConfig, differences, read_config
from fedknow.server.checks import RunError
from fedknow.server.evaluation import Scores

__all__ = ["RunFolder", "is_disk_full", "running_out_of_disk"]

_CONFIG, _PARTITION, _METRICS, _ACCURACY, _FLEET, _RUN_ID, _LOCK = (
    "config.toml",
    "partition.json",
    "metrics.jsonl",
    "accuracy.npz",
    "fleet.json",
    "run-id",
    ".lock",
)


class RunFolder:
    """One run's folder; make one with :meth:`create`, :meth:`resume` or :meth:`open`.

    Attributes
    ----------
    path : Path
    config : ExperimentConfig
    """

    def __init__(self, path: Path, config: ExperimentConfig, lock: BinaryIO | None = None) -> None:
        self.path = path
        self.config = config
        self._lock = lock

    # --- opening --------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: ExperimentConfig) -> Self:
        """Start a new run in a folder that does not exist or is empty.

        Raises
        ------
        ConfigError
            If the folder holds a run already, is in use, or holds something else.
        RunError
            If the disk is full.
        """
        path = Path(path)
        if (path / _CONFIG).is_file():
            if cls(path, config).complete:
                raise ConfigError(f"{path} holds a finished run; choose another folder with --out, or delete this one")
            _locked(path).close()  # refused in other words while that run is going on
            raise ConfigError(f"{path} holds an unfinished run; go on with it by --resume, or choose another --out")
        if path.exists() and (not path.is_dir() or any(not _leftover(entry) for entry in path.iterdir())):
            raise ConfigError(f"{path} is no empty folder; choose another with --out")
        with running_out_of_disk(path):
            try:
                path.mkdir(parents=True, exist_ok=True)
            except PermissionError as error:
                raise ConfigError(f"{path} cannot be made: {error.strerror}; choose another --out") from None
            folder = cls(path, config, _locked(path))
            try:
                write_atomic(path / _CONFIG, config.to_toml().encode())
            except BaseException:
                folder.close()
                raise
        return folder

    @classmethod
    def resume(cls, path: str | os.PathLike[str], config: ExperimentConfig) -> Self:
        """Open an unfinished run to go on with it.

        Raises
        ------
        ConfigError
            If there is no run, it is finished or in use, or its configuration differs in what changes a result.
        """
        folder = cls.open(path)
        changed = differences(folder.config, config)
        if changed:
            raise ConfigError(
                "\n  ".join(
                    [f"{path} was started with other settings; give them again or choose another --out:", *changed]
                )
            )
        if folder.complete:
            raise ConfigError(
                f"{path} holds a finished run: there is nothing to resume (its report: fedknow report {path})"
            )
        lock = _locked(folder.path)
        for place in (folder.path, folder.checkpoints):
            for unfinished in place.glob("*.tmp"):
                unfinished.unlink()
        return cls(folder.path, config, lock)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a run to read it, whether it is finished, unfinished or going on.

        Raises
        ------
        ConfigError
            If the folder holds no run.
        """
        path = Path(path)
        if not (path / _CONFIG).is_file():
            raise ConfigError(f"{path} holds no run (there is no {_CONFIG} in it)")
        return cls(path, read_config(path / _CONFIG))

    def close(self) -> None:
        """Let others use the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- reading --------------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoint"

    @property
    def clients(self) -> Path:
        """Folder of the clients' states; the grid's."""
        return self.path / "clients"

    @property
    def complete(self) -> bool:
        """Whether the run came to its end."""
        return any(event["event"] == "end" for event in self.events())

    @property
    def partition(self) -> dict[str, Any] | None:
        """Which client holds what; ``None`` where a run has not got that far."""
        try:
            text = (self.path / _PARTITION).read_text("utf-8")
        except FileNotFoundError:
            return None
        partition: dict[str, Any] = json.loads(text)
        return partition

    @property
    def fleet(self) -> dict[str, Any]:
        """What the clients' devices did up to the last task that ended; empty where they had none."""
        try:
            text = (self.path / _FLEET).read_text("utf-8")
        except FileNotFoundError:
            return {}
        fleet: dict[str, Any] = json.loads(text)
        return fleet

    def events(self) -> list[dict[str, Any]]:
        """All events so far, oldest first; a last line that is only half written is left out."""
        try:
            data = (self.path / _METRICS).read_bytes()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]

    def accuracy(self) -> dict[str, np.ndarray]:
        """Raw accuracies; all NaN where nothing has been scored yet.

        Returns
        -------
        dict
            float64 arrays, NaN where nothing was measured. ``personal`` and ``global`` [client, seen, trained]: the
            two scorings; ``correct_personal`` and ``correct_global``: the same as counts; ``weights`` [client, seen]:
            sizes of the test sets; ``untrained`` [client, seen]: accuracy before any training (with
            ``evaluation.forward``); ``round_personal`` and ``round_global`` [evaluation, client, seen]: evaluations
            within tasks (with ``evaluation.every``), each described by a line of ``round_steps``
            [evaluation, 3]: server round, task, round.
        """
        try:
            with np.load(self.path / _ACCURACY, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except FileNotFoundError:
            return Scores(self.config.data.clients, self.config.data.tasks).arrays()

    @property
    def run_id(self) -> str:
        """A name that no other run has, and that a resumed run keeps: clients keep their states under it."""
        path = self.path / _RUN_ID
        if not path.exists():
            write_atomic(path, secrets.token_hex(8).encode())
        return path.read_text("ascii")

    # --- writing --------------------------------------------------------------------------------------------------

    def write_partition(self, partition: Mapping[str, Any]) -> None:
        """Write which client holds what."""
        write_atomic(self.path / _PARTITION, json.dumps(partition, indent=1).encode() + b"\n")

    def write_accuracy(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace the raw accuracies."""
        data = io.BytesIO()
        np.savez_compressed(data, allow_pickle=False, **dict(arrays))
        write_atomic(self.path / _ACCURACY, data.getvalue())

    def write_fleet(self, fleet: Mapping[str, Any]) -> None:
        """Replace what the clients' devices did (:meth:`fedknow.server.grid.MessageGrid.fleet`)."""
        write_atomic(self.path / _FLEET, json.dumps(_plain(fleet), indent=1).encode() + b"\n")

    def append(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Add one event as one line of JSON.

        Returns
        -------
        dict
            The event as it was written: plain values, ``None`` where a number is not finite.
        """
        line: dict[str, Any] = _plain(event)
        with (self.path / _METRICS).open("ab") as file:
            file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        return line

    def position(self) -> int:
        """How many bytes of events there are."""
        return (self.path / _METRICS).stat().st_size

    def forget_models(self) -> None:
        """Delete checkpoints and clients' states, which nobody needs of a run that ended; the numbers stay."""
        for place in (self.checkpoints, self.clients):
            shutil.rmtree(place, ignore_errors=True)

    def cut_back(self, position: int) -> None:
        """Forget the events after a position, which a resumed run will produce again."""
        with (self.path / _METRICS).open("ab") as file:
            file.truncate(position)


def is_disk_full(error: BaseException) -> bool:
    """Whether "no space left" or "quota exceeded" is at the bottom of an error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        cause = cause.__cause__
    return False


@contextmanager
def running_out_of_disk(path: Path) -> Iterator[None]:
    """Turn a full disk into a :class:`RunError` that says what to do."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise RunError(
            f"the disk that holds {path} is full; all up to the last checkpoint is safe: make room, then go on "
            "with --resume"
        ) from error


def _locked(path: Path) -> BinaryIO:
    """Take the folder's lock, which the system lets go of when the process ends, however it ends."""
    lock = (path / _LOCK).open("wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError(f"{path} is in use by a run that is going on; choose another --out") from None
    return lock


def _leftover(path: Path) -> bool:
    """Whether a file is what a run leaves that was killed before it began."""
    return path.name == _LOCK or (path.name.startswith(_CONFIG) and path.suffix == ".tmp")


def _plain(value: Any) -> Any:
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    return value
