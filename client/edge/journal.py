"""What a real client has done since the server's last checkpoint.

It lies on disk, so that nothing is lost and nothing is done twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fedknow.client.state import StateError, StateStore
from fedknow.client.state.files import Files, SealedFiles
from fedknow.protocols.config import ConfigError
from fedknow.protocols.messages import Message
from fedknow.protocols.wire import (
    Assembler,
    Packed,
    Parcel,
    WireError,
    parse,
    unpack,
)

__all__ = ["Journal", "key_of"]

log = logging.getLogger(__name__)

_MODE = 0o600
_ANSWERS = 8
"""Answers kept on disk at most. A round of training, a task's end and its scoring make four."""


def key_of(work: Parcel) -> str:
    """Give what tells work from other work.

    The same work from the same state has the same key, whoever sends it, and when.

    A server that was killed and resumed asks again for what its last run asked for, under other
    message ids. The header says all about the work but its tensors' bytes, and these it gives
    the checksums of.
    """
    return hashlib.blake2b(
        bytes(work.header) + work.version.to_bytes(8, "big"), digest_size=12
    ).hexdigest()


class Journal:
    """The states and the answers of one client, in a folder of its own.

    The server says with each piece of work from which version of the client's state it starts,
    and which version is in the last checkpoint: the *committed* one. Whatever happens to either
    side, no other work will be asked for than from the committed version on; so that version,
    and what was made of it, is kept, and the rest is deleted.

    ::

        run                   the node and the id of the run, with a checksum
        fence                 the secret of the last stream in this run
        states/               a StateStore
        sealed                the mark of the key that all the rest is sealed with, if any
        answers/COMMITTED/    KEY-VERSION: the answer to the work KEY, and its state's version
        .lock

    Nobody but the owner can enter the folder and use the files in it: states hold what a client
    keeps to itself.

    A state is on disk before its answer is given out. An answer need not be: one that is lost
    is made again.

    Parameters
    ----------
    folder : Path
        Made if missing.
    memory_bytes : int
        See :class:`~fedknow.client.state.StateStore`.
    key : bytes, optional
        With it all files are sealed
        (:class:`~fedknow.client.state.files.SealedFiles`).

    Raises
    ------
    ConfigError
        If another process uses the folder, it cannot be made, or the key is not the one that
        its files were sealed with.
    """

    def __init__(
        self,
        folder: Path,
        memory_bytes: int = 256 * 2**20,
        key: bytes | None = None,
    ) -> None:
        self.folder = folder
        self._writer = Files(_MODE) if key is None else SealedFiles(key)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _make_private(folder)
            self._lock = _locked(folder)
            _check_mark(folder, self._writer)
            self.store = StateStore(
                folder / "states", memory_bytes, files=self._writer
            )
        except OSError as error:
            raise ConfigError(
                f"--state {folder}: cannot be used: {error.strerror or error}"
            ) from None

    @property
    def node(self) -> int:
        """The node id that the client had last; 0: none yet."""
        return self._mark()[1]

    def begin(self, run: str, node: int) -> None:
        """Make ready for a run's work for a node.

        What belongs to another run or node is deleted.
        """
        mark = self._mark()
        if mark == (run, node):
            return
        if mark[0]:
            log.info(
                "another run, or another client: what was kept of the one before is deleted"
            )
        shutil.rmtree(self._answers, ignore_errors=True)
        (self.folder / "fence").unlink(missing_ok=True)
        self.store.retain(None, ())
        text = f"{node} {run}"
        # Last: a crash before it leaves the old mark, and the folder is emptied again.
        self._writer.write(
            self.folder / "run",
            f"x{zlib.crc32(text.encode()):08x} {text}".encode(),
        )

    def _mark(self) -> tuple[str, int]:
        """Run and node that the folder's content belongs to.

        Raises
        ------
        ConfigError
            If the file is not what was written. To begin anew then would delete states that a
            run still needs.
        """
        path = self.folder / "run"
        try:
            mark = self._writer.read(path)
        except FileNotFoundError:
            return "", 0
        except ValueError:
            # No mark matches it, so that it is refused like any other damage.
            mark = b""
        # Earlier versions wrote no checksum, so their files began with a digit.
        match = re.fullmatch(rb"(?:x([0-9a-f]{8}) )?(([0-9]+) ([^ ]*))", mark)
        if match is None or (
            match[1] and zlib.crc32(match[2]) != int(match[1], 16)
        ):
            raise ConfigError(
                f"--state {self.folder}: the file `run` in it is damaged; remove the "
                f"folder and have the server begin "
                "this client anew: fedknow forget RUN --client N, there"
            )
        return match[4].decode(), int(match[3])

    @property
    def fence(self) -> bytes:
        """The secret of the last stream; empty without one."""
        try:
            return self._writer.read(self.folder / "fence")
        except (OSError, ValueError):
            # Without it the client is let in, unless another one holds its place.
            return b""

    def keep_fence(self, fence: bytes) -> None:
        """Keep the secret of a stream, to be known by it after a restart."""
        try:
            # Lost power costs a wait at most, which is no reason to wait for the disk.
            self._writer.write(self.folder / "fence", fence, durable=False)
        except OSError as error:
            log.warning("%s: not kept: %s", self.folder / "fence", error)

    def commit(self, client: int, version: int, committed: int) -> None:
        """Delete what no server will ask for, as work from a version comes.

        Raises
        ------
        StateError
            If a file cannot be deleted.
        """
        current = self._answers / f"{committed:x}"
        for folder in self._answers.glob("*"):
            if folder != current:
                shutil.rmtree(folder, ignore_errors=True)
        # States that kept answers lead to stay too: the next work starts from one of them.
        answered = {
            int(path.name.partition("-")[2], 16)
            for path in self._files(committed)
        }
        self.store.retain(client, {version, committed} | answered)

    def find(self, key: str, committed: int) -> tuple[Message, int] | None:
        """Find the answer to work that was done already.

        Returns
        -------
        tuple, optional
            The answer, and the version of the state after it.
        """
        for path in (self._answers / f"{committed:x}").glob(f"{key}-*"):
            try:
                parcel = _read(self._writer.read(path))
                answer = unpack(parcel)
                # A file that was copied or renamed by hand reads well all the same.
                if path.name != f"{answer.reply_to}-{parcel.version:x}":
                    raise OSError("it is the answer to other work")
                return answer, parcel.version
            except (WireError, OSError, ValueError) as error:
                # It was not synced. It is made again from the state, which was.
                log.info("%s: %s; the work is done again", path.name, error)
                path.unlink(missing_ok=True)
        return None

    def keep_answer(
        self,
        key: str,
        committed: int,
        answer: Packed,
        version: int,
    ) -> None:
        """Keep an answer for a while.

        It goes with the next checkpoint, or when there are many newer ones.

        Raises
        ------
        StateError
            If the disk is full.
        """
        folder = self._answers / f"{committed:x}"
        target = folder / f"{key}-{version:x}"
        frames = b"".join(
            # Protobuf messages do not say where they end, so each has its length before it.
            len(frame).to_bytes(4, "big") + frame
            for frame in answer.frames(reply_to=key, version=version)
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Without a sync, as an answer that is lost is made again from the state.
            self._writer.write(target, frames, durable=False)
        except OSError as error:
            raise StateError(
                f"{target}: the answer cannot be written: {error.strerror or error}"
            ) from error
        for old in sorted(
            self._files(committed), key=lambda path: path.stat().st_mtime_ns
        )[:-_ANSWERS]:
            old.unlink()

    def size(self) -> int:
        """Add up the bytes of all files in the folder."""
        total = 0
        for path in self.folder.rglob("*"):
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                # Old files are deleted beside this.
                continue
        return total

    def close(self) -> None:
        """Let others use the folder."""
        self._lock.close()

    @property
    def _answers(self) -> Path:
        return self.folder / "answers"

    def _files(self, committed: int) -> Iterator[Path]:
        folder = self._answers / f"{committed:x}"
        return (path for path in folder.glob("*-*") if path.suffix != ".tmp")


def _read(data: bytes) -> Parcel:
    assembler = Assembler()
    position = 0
    while position < len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        parcel = assembler.add(parse(data[position + 4 : position + 4 + size]))
        position += 4 + size
        if parcel is not None:
            return parcel
    raise OSError("it ends too early")


def _make_private(folder: Path) -> None:
    """Take the rights of others away, where the folder is ours."""
    # A container's volume may belong to another user, who decides about it.
    if folder.stat().st_uid != os.geteuid():
        return
    folder.chmod(0o700)
    # Earlier versions left it to the umask who else might read a file.
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(_MODE)


def _check_mark(folder: Path, files: Files) -> None:
    """See that a folder is used with the key that it was begun with.

    Raises
    ------
    ConfigError
        If it is not, saying which key is needed.
    """
    path = folder / "sealed"
    mark = path.read_text(errors="replace") if path.exists() else ""
    if not isinstance(files, SealedFiles):
        if mark:
            raise ConfigError(
                f"--state {folder}: its files are encrypted; give the key that they were "
                "written with: --state-key FILE"
            )
    elif mark:
        if not files.is_marked(mark):
            raise ConfigError(
                f"--state {folder}: its files were encrypted with another key than that of "
                "--state-key, or the file `sealed` in it is damaged; give the former key"
            )
    elif (folder / "run").exists():
        raise ConfigError(
            f"--state {folder}: its files are not encrypted, so --state-key would leave them "
            "in the clear; finish the run without it, or give a folder of its own"
        )
    else:
        Files(_MODE).write(path, files.mark.encode())


def _locked(folder: Path) -> BinaryIO:
    flags = os.O_WRONLY | os.O_CREAT
    lock = os.fdopen(os.open(folder / ".lock", flags, _MODE), "wb")
    try:
        # The system releases it when the process ends, however it ends.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError(
            f"--state {folder} is in use by another client on this machine; give each "
            f"client a folder of its own"
        ) from None
    return lock
