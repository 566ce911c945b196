"""The run folder: a run's files, written so that no crash spoils them.

::

    config.toml      the complete configuration
    partition.json   which client holds what (sizes, classes, digest)
    metrics.jsonl    one event a line
    fleet.json       what the clients' devices did, where they have any (fedknow.simulations.fleet)
    run-id           by which real clients know the run again (fedknow.server.serve)
    accuracy.npz     raw accuracies, from which every metric can be computed again
    checkpoint/      what the run needs to go on (see fedknow.server.run.checkpoint)
    clients/         the clients' states (owned by the grid)

Files are replaced as a whole or not at all; ``metrics.jsonl`` grows line by line and is cut
back to the last checkpoint's position when a run is resumed. Each file has a checksum
(:mod:`fedknow.server.run.integrity`).
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from fedknow.protocols.config import (
    ConfigError,
    ExperimentConfig,
    differences,
    read_config,
)
from fedknow.protocols.files import write_atomic
from fedknow.protocols.texts import counted
from fedknow.server.checks.faults import RunError
from fedknow.server.run.evaluation import Scores
from fedknow.server.run.integrity import (
    FolderDamaged,
    chain_start,
    is_last_event,
    open_arrays,
    open_json,
    open_text,
    read_lines,
    seal_arrays,
    seal_json,
    seal_line,
    seal_text,
)

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
_ERROR = "error.log"

_PUT_BACK = "put it back from a copy, or run the experiment again with another --out"


class RunFolder:
    """One run's folder, from :meth:`create`, :meth:`resume` or :meth:`open`.

    Attributes
    ----------
    path : Path
    config : ExperimentConfig
    fingerprint : str
        Checksum of ``config.toml``; empty in folders of earlier versions.
    """

    def __init__(
        self,
        path: Path,
        config: ExperimentConfig,
        lock: BinaryIO | None = None,
        fingerprint: str = "",
        is_new: bool = False,
    ) -> None:
        self.path = path
        self.config = config
        self.fingerprint = fingerprint
        self._lock = lock
        self._is_new = is_new
        self._chain: int | None = None

    # --- opening
    # --------------------------------------------------------------------------------------------------

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
                raise ConfigError(
                    f"{path} holds a finished run; choose another folder with --out, or delete this one"
                )
            _locked(path).close()  # refused in other words while that run is going on
            raise ConfigError(
                f"{path} holds an unfinished run; go on with it by --resume, or choose another --out"
            )
        if path.exists() and (
            not path.is_dir() or any(not _leftover(entry) for entry in path.iterdir())
        ):
            raise ConfigError(f"{path} is no empty folder; choose another with --out")
        with running_out_of_disk(path):
            try:
                path.mkdir(parents=True, exist_ok=True)
            except PermissionError as error:
                raise ConfigError(
                    f"{path} cannot be made: {error.strerror}; choose another --out"
                ) from None
            lock = _locked(path)
            try:
                sealed = seal_text(config.to_toml())
                write_atomic(path / _CONFIG, sealed.encode())
            except BaseException:
                lock.close()
                raise
        return cls(path, config, lock, open_text(sealed)[1], is_new=True)

    @classmethod
    def resume(cls, path: str | os.PathLike[str], config: ExperimentConfig) -> Self:
        """Open an unfinished run to go on with it.

        Raises
        ------
        ConfigError
            If there is no run, it is finished or in use, or its configuration differs in what
            changes a result.
        """
        folder = cls.open(path)
        changed = differences(folder.config.absolute(), config.absolute())
        if changed:
            raise ConfigError(
                "\n  ".join(
                    [
                        f"{path} was started with other settings; give them again or choose another --out:",
                        *changed,
                    ]
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
        return cls(folder.path, config, lock, folder.fingerprint)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a run to read it, whether it is finished, unfinished or going on.

        Raises
        ------
        ConfigError
            If the folder holds no run, or its configuration is not what the run wrote.
        """
        path = Path(path)
        if not (path / _CONFIG).is_file():
            raise ConfigError(f"{path} holds no run (there is no {_CONFIG} in it)")
        config = read_config(path / _CONFIG)
        try:
            _, fingerprint = open_text((path / _CONFIG).read_text("utf-8"))
        except ValueError as error:
            raise ConfigError(
                f"{path / _CONFIG} was changed since the run was made: {error}"
            ) from None
        return cls(path, config, fingerprint=fingerprint)

    def close(self) -> None:
        """Let others use the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if (
            isinstance(error, ConfigError | OSError)
            and self._is_new
            and not self.position()
        ):
            self.discard()
        self.close()

    def discard(self) -> None:
        """Delete a run that was refused before it began.

        The next run then finds no unfinished one here.

        What else is in the folder stays, and so does the folder then.
        """
        for name in (_CONFIG, _PARTITION, _RUN_ID, _ERROR, _LOCK):
            (self.path / name).unlink(missing_ok=True)
        for place in (self.clients, self.path):
            with suppress(OSError):  # it is not there, or holds something
                place.rmdir()

    # --- reading
    # --------------------------------------------------------------------------------------------------

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
        return is_last_event(self._events(), "end")

    @property
    def partition(self) -> dict[str, Any] | None:
        """Which client holds what; ``None`` where a run has not got that far.

        Raises
        ------
        FolderDamaged
            If the file is not what the run wrote.
        """
        return self._json(_PARTITION)

    @property
    def fleet(self) -> dict[str, Any]:
        """Devices' times, bytes and energy up to the last task that ended.

        Empty where clients have no devices.

        Raises
        ------
        FolderDamaged
            If the file is missing, or not what the run wrote.
        """
        fleet = self._json(_FLEET)
        if fleet is None and self.config.fleet.devices and self.complete:
            raise FolderDamaged(f"{self.path / _FLEET} is missing; {_PUT_BACK}")
        return fleet or {}

    def events(self) -> list[dict[str, Any]]:
        """Read all events so far, oldest first.

        A last line that is only half written is left out.

        Raises
        ------
        FolderDamaged
            If a line is not what the run wrote.
        """
        with self._reading(_METRICS):
            return [
                event
                for event, _ in read_lines(
                    self._events(), chain_start(self.fingerprint)
                )
            ]

    def _events(self) -> bytes:
        try:
            return (self.path / _METRICS).read_bytes()
        except FileNotFoundError:
            return b""

    def _json(self, name: str) -> dict[str, Any] | None:
        with self._reading(name):
            try:
                data = (self.path / name).read_bytes()
            except FileNotFoundError:
                return None
            return open_json(data, self.fingerprint)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Turn what is wrong with a file's bytes into a sentence."""
        try:
            yield
        except (ValueError, RecursionError) as error:
            raise FolderDamaged(
                f"{self.path / name} is not what the run wrote: {error}; {_PUT_BACK}"
            ) from None

    def accuracy(self) -> dict[str, np.ndarray]:
        """Raw accuracies; all NaN where nothing has been scored yet.

        Returns
        -------
        dict
            float64 arrays, NaN where nothing was measured. ``personal`` and ``global`` [client,
            seen, trained]: the two scorings; ``correct_personal`` and ``correct_global``: the
            same as counts; ``weights`` [client, seen]: sizes of the test sets; ``untrained``
            [client, seen]: accuracy before any training (with ``evaluation.forward``);
            ``round_personal`` and ``round_global`` [evaluation, client, seen]: evaluations
            within tasks (with ``evaluation.every``), each described by a line of
            ``round_steps`` [evaluation, 3]: server round, task, round.

        Raises
        ------
        FolderDamaged
            If the file is missing although clients were scored, or is not what the run wrote.
        """
        with self._reading(_ACCURACY):
            try:
                data = (self.path / _ACCURACY).read_bytes()
            except FileNotFoundError:
                if any(event["event"] == "evaluation" for event in self.events()):
                    raise ValueError("it is missing") from None
                return Scores(self.config.data.clients, self.config.data.tasks).arrays()
            return open_arrays(data, self.fingerprint)

    @property
    def run_id(self) -> str:
        """A unique name of the run, which it keeps when it is resumed.

        Clients keep their states under it.

        Raises
        ------
        FolderDamaged
            If a run that clients know has lost its name, or the name is not what the run wrote.
        """
        path = self.path / _RUN_ID
        if not path.exists():
            if self.checkpoints.exists():
                raise FolderDamaged(
                    f"{path} is missing, so clients would not know the run again; {_PUT_BACK}; a client's --state "
                    "folder has the name in its file `run`"
                )
            name = secrets.token_hex(8)
            write_atomic(path, f"{name} {zlib.crc32(name.encode()):08x}\n".encode())
        with self._reading(_RUN_ID):
            name, _, checksum = path.read_text("ascii").strip().partition(" ")
            if checksum and checksum != f"{zlib.crc32(name.encode()):08x}":
                raise ValueError("its checksum is wrong")
            if len(name) != 16 or set(name) - set("0123456789abcdef"):
                raise ValueError("it holds no name of a run")
        return name

    # --- writing
    # --------------------------------------------------------------------------------------------------

    def write_partition(self, partition: Mapping[str, Any]) -> None:
        """Write which client holds what."""
        write_atomic(
            self.path / _PARTITION, seal_json(_plain(partition), self.fingerprint)
        )

    def write_accuracy(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace the raw accuracies."""
        write_atomic(self.path / _ACCURACY, seal_arrays(arrays, self.fingerprint))

    def write_fleet(self, fleet: Mapping[str, Any]) -> None:
        """Replace the account of the clients' devices, ``fleet.json``."""
        write_atomic(self.path / _FLEET, seal_json(_plain(fleet), self.fingerprint))

    def append(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Add one event as one line of JSON.

        Returns
        -------
        dict
            The event as it was written: plain values, ``None`` where a number is not finite.
        """
        plain: dict[str, Any] = _plain(event)
        line, chain = seal_line(plain, self.chain)
        with (self.path / _METRICS).open("ab") as file:
            file.write(line)
        self._chain = chain
        return plain

    def position(self) -> int:
        """How many bytes of events there are."""
        try:
            return (self.path / _METRICS).stat().st_size
        except FileNotFoundError:
            return 0

    @property
    def chain(self) -> int:
        """Checksum of all events up to :meth:`position`."""
        if self._chain is None:
            self._chain = self._check(self._events())
        return self._chain

    def _check(self, data: bytes) -> int:
        """Checksum of events, after a look at each."""
        start = chain_start(self.fingerprint)
        with self._reading(_METRICS):
            chains = [chain for _, chain in read_lines(data, start)]
        return chains[-1] if chains else start

    def forget_models(self) -> None:
        """Delete checkpoints and clients' states; the numbers stay.

        A run that ended does not need them.
        """
        for place in (self.checkpoints, self.clients):
            shutil.rmtree(place, ignore_errors=True)

    def cut_back(self, position: int, chain: int | None = None) -> None:
        """Forget the events after a position, before the run is resumed.

        Parameters
        ----------
        position : int
            What :meth:`position` was.
        chain : int, optional
            What :attr:`chain` was then; unknown in checkpoints of earlier versions.

        Raises
        ------
        FolderDamaged
            If the events up to the position are not those that the run wrote.
        """
        data = self._events()[:position]
        found = self._check(data)
        with self._reading(_METRICS):
            if len(data) < position:
                raise ValueError(
                    f"it has {counted(len(data), 'byte')} and had {position}"
                )
            if chain is not None and chain != found:
                raise ValueError("it holds other events than the checkpoint says")
        with (self.path / _METRICS).open("ab") as file:
            file.truncate(position)
        self._chain = found


def is_disk_full(error: BaseException) -> bool:
    """Say whether a full disk or quota is the cause of an error."""
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
    """Take the folder's lock.

    The system releases it when the process ends, however it ends.
    """
    lock = (path / _LOCK).open("wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError(
            f"{path} is in use by a run that is going on; choose another --out"
        ) from None
    return lock


def _leftover(path: Path) -> bool:
    """Whether a file is what a run leaves that was killed before it began."""
    return path.name == _LOCK or (
        path.name.startswith(_CONFIG) and path.suffix == ".tmp"
    )


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
