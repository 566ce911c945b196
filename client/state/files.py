"""Files of a state folder: in the clear, or sealed with a key."""

from __future__ import annotations

import hmac
import math
import os
import secrets
import struct
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from fedknow.client.state.layout import list_files
from fedknow.protocols.config import ConfigError
from fedknow.protocols.extras import how_to_install
from fedknow.protocols.files import write_atomic

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

__all__ = ["KEY_BYTES", "Files", "SealedFiles", "read_key"]

KEY_BYTES = 32

_MAGIC = b"FKS1"
_SALT_BYTES = 32
_TAG_BYTES = 16
_CHUNK_BYTES = 2**26
"""ChaCha20-Poly1305 of `cryptography` takes less than 2 GiB at once, and states may be larger."""


class Files:
    """Files in the clear, in folders of this machine.

    ``can_map`` says whether the system can map them into memory.

    Parameters
    ----------
    mode : int
        Permissions of new files, before the process's umask.

    Examples
    --------
    >>> Files(0o600).is_sealed
    False
    """

    is_sealed = False
    can_map = True

    def __init__(self, mode: int = 0o666) -> None:
        self._mode = mode

    def write(self, path: Path, data: bytes, durable: bool = True) -> None:
        """Write a file whole or not at all.

        See :func:`~fedknow.protocols.files.write_atomic`.
        """
        write_atomic(path, data, durable, self._mode)

    def read(self, path: Path) -> bytes:
        """Read a file.

        Raises
        ------
        OSError
            If it cannot be read.
        ValueError
            If it is sealed and damaged, or another key or name sealed it.
        """
        return path.read_bytes()

    def make_folder(self, folder: Path) -> None:
        """Make a folder, if there is none."""
        folder.mkdir(parents=True, exist_ok=True)

    def delete(self, path: Path) -> None:
        """Delete a file."""
        path.unlink()

    def list(
        self, root: Path, clients: Collection[int] | None = None
    ) -> list[Path]:
        """List the files of states, of some clients or of all."""
        return list_files(root, clients)

    def size(self, path: Path) -> float:
        """Measure a file; infinity if it is missing."""
        try:
            return path.stat().st_size
        except OSError:
            return math.inf

    def stamp(self, path: Path) -> int:
        """Say when a file was written, in nanoseconds.

        Raises
        ------
        OSError
            If it is missing.
        """
        return path.stat().st_mtime_ns


class SealedFiles(Files):
    """Files that only the owner of a key can read or make.

    Each file has a key of its own, derived by HKDF (RFC 5869) from the owner's key and a random
    salt. Its content is cut into chunks that ChaCha20-Poly1305 (RFC 8439) seals. A chunk's nonce
    is its number and whether it is the last (STREAM: Hoang et al., CRYPTO 2015). The file's name
    is sealed with it, so that no file can take another one's place.

    Parameters
    ----------
    key : bytes
        :data:`KEY_BYTES` random bytes.

    Raises
    ------
    ConfigError
        If the package ``cryptography`` is missing.
    """

    is_sealed = True
    can_map = False

    def __init__(self, key: bytes) -> None:
        super().__init__(0o600)
        self._key = key
        # Derived, so that it tells nothing of the key that it is a mark of.
        self.mark = self._derive(b"", "mark").hex()

    def is_marked(self, mark: str) -> bool:
        """Say whether a mark was made with this key."""
        # In constant time, so that timing tells nothing about a mark.
        return hmac.compare_digest(mark, self.mark)

    def write(self, path: Path, data: bytes, durable: bool = True) -> None:
        """Seal a file and write it whole or not at all."""
        # A key for each file, so that its nonces may count from 0.
        salt = secrets.token_bytes(_SALT_BYTES)
        cipher = self._cipher(salt)
        name = path.name.encode()
        # An empty file has one chunk too, so that it is sealed like any other.
        starts = range(0, max(len(data), 1), _CHUNK_BYTES)
        chunks = [
            cipher.encrypt(
                _nonce(number, start == starts[-1]),
                data[start : start + _CHUNK_BYTES],
                name,
            )
            for number, start in enumerate(starts)
        ]
        super().write(path, b"".join([_MAGIC, salt, *chunks]), durable)

    def read(self, path: Path) -> bytes:
        """Read a file and open it."""
        from cryptography.exceptions import InvalidTag

        sealed = super().read(path)
        head = len(_MAGIC) + _SALT_BYTES
        if not sealed.startswith(_MAGIC) or len(sealed) < head + _TAG_BYTES:
            raise ValueError("it is damaged, or not sealed with a key")
        cipher = self._cipher(sealed[len(_MAGIC) : head])
        name = path.name.encode()
        size = _CHUNK_BYTES + _TAG_BYTES
        starts = range(head, len(sealed), size)
        try:
            return b"".join(
                cipher.decrypt(
                    _nonce(number, start == starts[-1]),
                    sealed[start : start + size],
                    name,
                )
                for number, start in enumerate(starts)
            )
        except InvalidTag:
            raise ValueError("it is damaged: its seal is broken") from None

    def _cipher(self, salt: bytes) -> ChaCha20Poly1305:
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        return ChaCha20Poly1305(self._derive(salt, "file"))

    def _derive(self, salt: bytes, purpose: str) -> bytes:
        """Derive a key for one purpose."""
        try:
            from cryptography.hazmat.primitives.hashes import SHA256
            from cryptography.hazmat.primitives.kdf.hkdf import HKDF
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"--state-key: the package {error.name} is missing; {how_to_install('secure')}"
            ) from None
        info = f"fedknow state {purpose}".encode()
        return HKDF(SHA256(), KEY_BYTES, salt, info).derive(self._key)


def read_key(path: Path | None) -> bytes | None:
    """Read the key of a state folder; None without one.

    Raises
    ------
    ConfigError
        If the file cannot be read, or does not hold :data:`KEY_BYTES` bytes.
    """
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            key = file.read(KEY_BYTES + 1)
            open_to = os.fstat(file.fileno()).st_mode & 0o007
    except OSError as error:
        raise ConfigError(
            f"--state-key {path}: cannot be read: {error.strerror or error}"
        ) from None
    if len(key) != KEY_BYTES:
        raise ConfigError(
            f"--state-key {path}: a key has {KEY_BYTES} bytes, and this file has "
            f"{'more' if len(key) > KEY_BYTES else len(key)}; make one: "
            f"(umask 077; head -c {KEY_BYTES} /dev/urandom > FILE)"
        )
    if open_to:
        raise ConfigError(
            f"--state-key {path}: everybody on this machine can use this file; run: "
            f"chmod 600 {path}"
        )
    return key


def _nonce(number: int, is_last: bool) -> bytes:
    return struct.pack(">3xQ?", number, is_last)
