"""Reading of what a server asks for in a round of secure aggregation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedknow.protocols.messages import Config
from fedknow.protocols.secure import rounds
from fedknow.protocols.secure.masks import KEY_BYTES

__all__ = [
    "check_session",
    "read_nodes",
    "read_text",
    "read_texts",
    "secret_of",
]


def check_session(request: Config, session: Mapping[str, Any]) -> None:
    """Refuse messages of another round, or after a restart in between."""
    if read_text(request, rounds.SESSION).hex() != session.get(rounds.SESSION):
        raise ValueError(
            "this client has no secrets of this round; it can take part in the next one"
        )


def secret_of(session: Mapping[str, Any], name: str) -> bytes:
    """Give one of a session's secrets."""
    return bytes.fromhex(session[name])


def read_text(request: Config, name: str) -> bytes:
    """Read a text of the length of a key.

    Raises
    ------
    ValueError
        If there is none.
    """
    value = request.get(name)
    if not isinstance(value, bytes) or len(value) != KEY_BYTES:
        raise ValueError(f"{name} must be {KEY_BYTES} bytes, got {value!r}")
    return value


def read_texts(request: Config, name: str, count: int) -> list[bytes]:
    """Read a list of so many texts of bytes.

    Raises
    ------
    ValueError
        If there is none.
    """
    values = request.get(name)
    if (
        not isinstance(values, list)
        or len(values) != count
        or not all(isinstance(value, bytes) for value in values)
    ):
        raise ValueError(f"{name} must be a list of {count} texts of bytes")
    return [value for value in values if isinstance(value, bytes)]


def read_nodes(request: Config, name: str) -> list[int]:
    """Read a list of node ids, each once.

    Raises
    ------
    ValueError
        If there is none.
    """
    values = request.get(name)
    if not isinstance(values, list) or not all(
        isinstance(value, int) and 0 < value < 2**48 for value in values
    ):
        raise ValueError(f"{name} must be a list of node ids, got {values!r}")
    nodes = [value for value in values if isinstance(value, int)]
    if len(set(nodes)) < len(nodes):
        raise ValueError(f"{name} names a node twice: {nodes}")
    return nodes
