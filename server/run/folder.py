"""The run folder: a run's files, written so that no crash spoils them.

::

    config.toml      the complete configuration
    partition.json   which client holds what (sizes, classes, digest)
    metrics.jsonl    one event a line
    activity.jsonl   which clients were at work, for the live page (fedknow.server.run.activity)
    fleet.json       what the clients' devices did, where they have any (fedknow.simulations.fleet)
    audit.jsonl      who came and who was turned away (fedknow.server.run.audit)
    members.json     clients that the operator took out (fedknow.server.run.members)
    fence-key        the secret by which real clients are known again
    run-id           by which real clients know the run again (fedknow.server.serve)
    accuracy.npz     raw accuracies, from which every metric can be computed again
    checkpoint/      what the run needs to go on (see fedknow.server.run.checkpoint)
    clients/         the clients' states (owned by the grid)
    tracking.json    by which trackers know the run again (fedknow.server.tracking)

Files are replaced as a whole or not at all; ``metrics.jsonl`` grows line by line and is cut
back to the last checkpoint's position when a run is resumed. Each file has a checksum
(:mod:`fedknow.server.run.integrity`).
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Self

import numpy as np

from fedknow.protocols.config import ConfigError, ExperimentConfig, differences
from fedknow.protocols.files import write_atomic
from fedknow.protocols.texts import counted
from fedknow.server.run.activity import ACTIVITY
from fedknow.server.run.disk import running_out_of_disk
from fedknow.server.run.integrity import (
    FolderDamaged,
    chain_start,
    open_text,
    read_lines,
    seal_arrays,
    seal_json,
    seal_line,
    seal_text,
)
from fedknow.server.run.plain import to_plain
from fedknow.server.run.run_reader import (
    ACCURACY,
    CONFIG,
    ERROR,
    FENCE_KEY,
    FLEET,
    LOCK,
    METRICS,
    PARTITION,
    PUT_BACK,
    RUN_ID,
    RunReader,
)
from fedknow.server.run.states import check_same_place, forget_states

__all__ = ["RunFolder"]


class RunFolder(RunReader):
    """One run's folder, from :meth:`create`, :meth:`resume` or :meth:`open`."""

    def __init__(
        self,
        path: Path,
        config: ExperimentConfig,
        lock: BinaryIO | None = None,
        fingerprint: str = "",
        is_new: bool = False,
    ) -> None:
        super().__init__(path, config, fingerprint)
        self._lock = lock
        self._is_new = is_new
        self._chain: int | None = None

    # --- opening

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], config: ExperimentConfig
    ) -> Self:
        """Start a new run in a folder that does not exist or is empty.

        Raises
        ------
        ConfigError
            If the folder holds a run already, is in use, or holds something else.
        RunError
            If the disk is full.
        """
        path = Path(path)
        if (path / CONFIG).is_file():
            _refuse_taken(path, cls(path, config).complete)
        if path.exists() and (
            not path.is_dir()
            or any(not _leftover(entry) for entry in path.iterdir())
        ):
            raise ConfigError(
                f"{path} is no empty folder; choose another with --out"
            )
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
                write_atomic(path / CONFIG, sealed.encode())
            except BaseException:
                lock.close()
                raise
        return cls(path, config, lock, open_text(sealed)[1], is_new=True)

    @classmethod
    def resume(
        cls, path: str | os.PathLike[str], config: ExperimentConfig
    ) -> Self:
        """Open an unfinished run to go on with it.

        Raises
        ------
        ConfigError
            If there is no run, it is finished or in use, or its configuration differs in what
            changes a result.
        """
        folder = cls.open(path)
        # Absolute paths, as the command may come from another folder this time.
        changed = differences(folder.config.absolute(), config.absolute())
        if changed:
            raise ConfigError(
                "\n  ".join(
                    [
                        f"{path} was started with other settings; "
                        "give them again or choose another --out:",
                        *changed,
                    ]
                )
            )
        check_same_place(folder.config, config)
        if folder.complete:
            raise ConfigError(
                f"{path} holds a finished run: there is nothing to resume "
                f"(its report: fedknow report {path})"
            )
        # Before anything is changed: another process may be at this run.
        lock = _locked(folder.path)
        for place in (folder.path, folder.checkpoints):
            for unfinished in place.glob("*.tmp"):
                # Left by a crash between writing and renaming; nobody else writes here, as the
                # lock is ours.
                unfinished.unlink()
        return cls(folder.path, config, lock, folder.fingerprint)

    def close(self) -> None:
        """Let others use the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if (
            # Only what refuses a run; after any other error its folder may help to find the
            # cause.
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
        for name in (CONFIG, PARTITION, RUN_ID, ERROR, LOCK, ACTIVITY, FENCE_KEY):
            (self.path / name).unlink(missing_ok=True)
        for place in (self.clients, self.path):
            with suppress(OSError):  # it is not there, or holds something
                place.rmdir()

    @property
    def run_id(self) -> str:
        """A unique name of the run, which it keeps when it is resumed.

        Clients keep their states under it.

        Raises
        ------
        FolderDamaged
            If a run that clients know has lost its name, or the name is not what the run wrote.
        """
        path = self.path / RUN_ID
        if not path.exists():
            if self.checkpoints.exists():
                raise FolderDamaged(
                    f"{path} is missing, so clients would not know the run again; {PUT_BACK}; "
                    "a client's --state folder has the name in its file `run`"
                )
            # Not from the run's seed: two runs of one configuration are two runs.
            name = secrets.token_hex(8)
            write_atomic(
                path, f"{name} {zlib.crc32(name.encode()):08x}\n".encode()
            )
        with self._reading(RUN_ID):
            return _read_name(path.read_text("ascii"))

    # --- writing

    def write_partition(self, partition: Mapping[str, Any]) -> None:
        """Write which client holds what."""
        write_atomic(
            self.path / PARTITION,
            seal_json(to_plain(partition), self.fingerprint),
        )

    def write_accuracy(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace the raw accuracies."""
        write_atomic(self.path / ACCURACY, seal_arrays(arrays, self.fingerprint))

    def write_fleet(self, fleet: Mapping[str, Any]) -> None:
        """Replace the account of the clients' devices, ``fleet.json``."""
        write_atomic(
            self.path / FLEET, seal_json(to_plain(fleet), self.fingerprint)
        )

    def append(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Add one event as one line of JSON.

        Returns
        -------
        dict
            The event as it was written: plain values, ``None`` where a number is not finite.
        """
        values: dict[str, Any] = to_plain(event)
        line, chain = seal_line(values, self.chain)
        with (self.path / METRICS).open("ab") as file:
            file.write(line)
        self._chain = chain
        return values

    def position(self) -> int:
        """How many bytes of events there are."""
        try:
            return (self.path / METRICS).stat().st_size
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
        with self._reading(METRICS):
            chains = [chain for _, chain in read_lines(data, start)]
        return chains[-1] if chains else start

    def forget_models(self) -> None:
        """Delete checkpoints and clients' states; the numbers stay.

        A run that ended does not need them.
        """
        forget_states(self)
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
        present = self._check(data)
        with self._reading(METRICS):
            if len(data) < position:
                raise ValueError(
                    f"it has {counted(len(data), 'byte')} and had {position}"
                )
            if chain is not None and chain != present:
                raise ValueError("it holds other events than the checkpoint says")
        with (self.path / METRICS).open("ab") as file:
            # Lines after the checkpoint describe rounds that are made again.
            file.truncate(position)
        self._chain = present


def _refuse_taken(path: Path, is_complete: bool) -> NoReturn:
    """Say why no new run can begin in a folder that holds one."""
    if is_complete:
        raise ConfigError(
            f"{path} holds a finished run; choose another folder with --out, "
            "or delete this one"
        )
    # A run that is going on has the lock, and is refused in other words.
    _locked(path).close()
    raise ConfigError(
        f"{path} holds an unfinished run; go on with it by --resume, "
        "or choose another --out"
    )


def _read_name(text: str) -> str:
    """Check the content of ``run-id``, and give the name of the run in it."""
    name, _, checksum = text.strip().partition(" ")
    # Folders of earlier versions have no checksum.
    if checksum and checksum != f"{zlib.crc32(name.encode()):08x}":
        raise ValueError("its checksum is wrong")
    if len(name) != 16 or set(name) - set("0123456789abcdef"):
        raise ValueError("it holds no name of a run")
    return name


def _locked(path: Path) -> BinaryIO:
    """Take the folder's lock.

    The system releases it when the process ends, however it ends.
    """
    lock = (path / LOCK).open("wb")
    try:
        # The system releases it when the process ends, even by SIGKILL.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError(
            f"{path} is in use by a run that is going on; choose another --out"
        ) from None
    return lock


def _leftover(path: Path) -> bool:
    """Whether a file is what a run leaves that was killed before it began."""
    return path.name == LOCK or (
        path.name.startswith(CONFIG) and path.suffix == ".tmp"
    )
