"""Who a peer is: what its certificate or its token proves."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

from fedknow.protocols.config import ConfigError
from fedknow.protocols.security.faults import CredentialError, CredentialFault
from fedknow.protocols.security.files import (
    SERVER_FOLDER,
    TOKEN_PATTERN,
    TOKENS,
    read_file,
)

__all__ = [
    "SERVER_URI",
    "Tokens",
    "authenticate",
    "client_of_peer",
    "client_uri",
    "is_server",
    "new_token",
]

SERVER_URI = "fedknow://server"
"""The name by which a certificate says that it is the server's."""

_NAMES = "x509_subject_alternative_name"
"""Where gRPC gives the names in a verified certificate."""
_URI = "fedknow://client/"
# No leading zeros: each client has one spelling, so that 7 and 007 cannot be two peers.
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")


def client_uri(client: int) -> str:
    """Give the name by which a certificate says which client it is for."""
    return f"{_URI}{client}"


def client_of_peer(peer: Mapping[str, Iterable[bytes]]) -> int | None:
    """Find the client that a verified certificate names.

    Parameters
    ----------
    peer : mapping
        ``context.auth_context()`` of a gRPC call; it holds names of a certificate only once
        that was verified.

    Returns
    -------
    int or None
        ``None`` without a certificate, or with one that names no client, or several.
    """
    names = {name.decode("utf-8", "replace") for name in peer.get(_NAMES, ())}
    numbers = {name.removeprefix(_URI) for name in names if name.startswith(_URI)}
    if len(numbers) != 1:
        return None
    number = numbers.pop()
    # int() alone also takes signs, spaces, underscores and other scripts' digits.
    return int(number) if _NUMBER.fullmatch(number) else None


def is_server(peer: Mapping[str, Iterable[bytes]]) -> bool:
    """Say if a verified certificate is the server's own.

    Whoever looks after the server may ask how it stands.
    """
    return SERVER_URI.encode() in peer.get(_NAMES, ())


class Tokens:
    """The tokens that let clients in.

    These are salted SHA-256 digests of 256 random bits each, never the tokens themselves.

    Parameters
    ----------
    digests : mapping
        By client: salt and digest, as hexadecimal text.
    """

    def __init__(self, digests: Mapping[int, tuple[str, str]]) -> None:
        self.digests = dict(digests)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read ``tokens.json`` of a server's folder.

        Raises
        ------
        ConfigError
            If it is missing or not what ``fedknow certs`` wrote.
        """
        text = read_file(folder, TOKENS, SERVER_FOLDER)
        try:
            entries = json.loads(text)["clients"]
            return cls(
                {
                    int(client): (entry["salt"], entry["sha256"])
                    for client, entry in entries.items()
                }
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{folder / TOKENS}: not a list of tokens ({error!r}); `fedknow certs` makes one"
            ) from None

    def to_json(self) -> bytes:
        """Give what :meth:`load` reads."""
        entries = {
            str(c): {"salt": salt, "sha256": digest}
            for c, (salt, digest) in sorted(self.digests.items())
        }
        return json.dumps({"clients": entries}, indent=1).encode() + b"\n"

    def add(self, token: str) -> None:
        """Let the bearer of a token in."""
        # A salt each: equal digests never show, and no table of digests serves two runs.
        salt = secrets.token_hex(16)
        self.digests[int(token.partition(".")[0])] = salt, _digest(salt, token)

    def mark(self, client: int) -> str:
        """Give what tells a client's token from others; empty without one."""
        return ":".join(self.digests.get(client, ()))

    def client(self, token: str) -> int | None:
        """Find the client that a token is for; None if it is nobody's."""
        match = TOKEN_PATTERN.fullmatch(token)
        if match is None:
            return None
        client = int(match[1])
        # A client that does not exist takes as long as one that does.
        salt, digest = self.digests.get(client, ("", ""))
        return (
            client if hmac.compare_digest(_digest(salt, token), digest) else None
        )


def new_token(client: int) -> str:
    """Make a token for a client: its number, a dot, 256 random bits."""
    return f"{client}.{secrets.token_urlsafe(32)}"


def authenticate(
    peer: Mapping[str, Iterable[bytes]],
    metadata: Iterable[tuple[str, str | bytes]] = (),
    tokens: Tokens | None = None,
    claimed: int | None = None,
) -> int:
    """Find the client that a call comes from.

    Parameters
    ----------
    peer : mapping
        ``context.auth_context()`` of the call.
    metadata : iterable of pairs
        ``context.invocation_metadata()`` of the call.
    tokens : Tokens, optional
        Let clients in by these; without, by the certificate that they showed.
    claimed : int, optional
        The client that the peer says it is, if it says so.

    Raises
    ------
    CredentialError
        If there is no credential, it is wrong, or it is another client's than the one claimed.
    """
    if tokens is None:
        client = _client_by_certificate(peer)
    else:
        client = _client_by_token(tokens, metadata)
    # Last, as only a proven identity can be compared with the claimed one.
    if claimed is not None and claimed != client:
        raise CredentialError(
            CredentialFault.IDENTITY,
            f"the credential is client {client}'s, but the peer says it is client {claimed}",
        )
    return client


def _client_by_certificate(peer: Mapping[str, Iterable[bytes]]) -> int:
    client = client_of_peer(peer)
    if client is not None:
        return client
    has_names = bool(list(peer.get(_NAMES, ())))
    raise CredentialError(
        CredentialFault.MALFORMED if has_names else CredentialFault.MISSING,
        f"this server lets in who shows a certificate for {_URI}N; "
        "`fedknow certs` makes them",
    )


def _client_by_token(
    tokens: Tokens, metadata: Iterable[tuple[str, str | bytes]]
) -> int:
    sent = [value for key, value in metadata if key.lower() == "authorization"]
    # Two tokens in one call are refused: which of them counts would be a guess.
    scheme, _, token = (str(sent[0]) if len(sent) == 1 else "").partition(" ")
    if scheme.lower() != "bearer":
        raise CredentialError(
            CredentialFault.MALFORMED if sent else CredentialFault.MISSING,
            "this server lets in who sends one token; `fedknow certs` makes them",
        )
    client = tokens.client(token)
    if client is None:
        raise CredentialError(
            CredentialFault.TOKEN, "this token is no client's of this run"
        )
    return client


def _digest(salt: str, token: str) -> str:
    # One fast hash is enough, as nobody can try all tokens of 256 random bits.
    return hashlib.sha256(f"{salt}:{token}".encode()).hexdigest()
