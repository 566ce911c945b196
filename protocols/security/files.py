"""The files of a folder of certificates."""

from __future__ import annotations

import re
from pathlib import Path

from fedknow.protocols.config import ConfigError

__all__ = [
    "CA",
    "CERTIFICATE",
    "CLIENT_FOLDER",
    "KEY",
    "SERVER_FOLDER",
    "TOKEN",
    "TOKENS",
    "TOKEN_PATTERN",
    "read_file",
    "read_token",
]

CA = "ca.pem"
CERTIFICATE = "cert.pem"
KEY = "key.pem"
TOKEN = "token"
TOKENS = "tokens.json"

# Folders that `fedknow certs` makes, as errors name them.
SERVER_FOLDER = "server"
CLIENT_FOLDER = "clients/NNN"

TOKEN_PATTERN = re.compile(r"(0|[1-9][0-9]{0,8})\.([A-Za-z0-9_-]{43})")
"""A client's number, a dot, and 256 random bits in 43 characters."""


def read_file(folder: Path, name: str, usual: str) -> bytes:
    """Read a file of a folder.

    Parameters
    ----------
    folder : Path
        The folder.
    name : str
        The file's name.
    usual : str
        Which folder it should be, for errors.

    Raises
    ------
    ConfigError
        If the file is missing or cannot be read.
    """
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError:
        hint = (
            f"; give {folder / 'server'}"
            if usual == SERVER_FOLDER and (folder / "server" / name).exists()
            else ""
        )
        raise ConfigError(
            f"{folder}: there is no {name}; give {usual} of a folder that `fedknow "
            f"certs` made{hint}"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{folder / name}: cannot be read: {error.strerror}"
        ) from None


def read_token(folder: Path) -> str | None:
    """Read a client's token; None without one.

    Raises
    ------
    ConfigError
        If the file is no token.
    """
    if not (folder / TOKEN).exists():
        return None
    token = (
        read_file(folder, TOKEN, CLIENT_FOLDER).decode("utf-8", "replace").strip()
    )
    if not TOKEN_PATTERN.fullmatch(token):
        raise ConfigError(
            f"{folder / TOKEN}: not a token (a number, a dot, 43 characters); copy it again"
        )
    return token
