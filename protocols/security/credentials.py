"""Credentials of a server and of a client, for gRPC."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

import grpc

from fedknow.protocols.config import ConfigError
from fedknow.protocols.security.faults import explain_ssl
from fedknow.protocols.security.files import (
    CA,
    CERTIFICATE,
    CLIENT_FOLDER,
    KEY,
    SERVER_FOLDER,
    read_file,
    read_token,
)

__all__ = ["channel_credentials", "server_credentials"]

log = logging.getLogger(__name__)


def server_credentials(
    folder: Path, client_certificates: bool = True
) -> grpc.ServerCredentials:
    """Make the credentials of a server.

    Parameters
    ----------
    folder : Path
        ``server/`` of a folder that ``fedknow certs`` made: ``ca.pem``, ``cert.pem``, ``key.pem``.
    client_certificates : bool
        Clients must show a certificate of the run's CA (mTLS). Without, let clients in by
        :class:`~fedknow.protocols.security.identity.Tokens`.

    Raises
    ------
    ConfigError
        If a file is missing or unreadable, the key is another certificate's, or the certificate
        has expired or is not of this CA.
    """
    ca, certificate, key = _read(folder, SERVER_FOLDER)
    # gRPC demands client certificates only where it has a CA to judge them by.
    return grpc.ssl_server_credentials(
        [(key, certificate)],
        ca if client_certificates else None,
        client_certificates,
    )


def channel_credentials(folder: Path) -> grpc.ChannelCredentials:
    """Make the credentials of a client.

    They are its certificate where the folder has one, and its token where it has one. A token
    travels as ``authorization: Bearer ...`` in each call's metadata, and only over TLS.

    Parameters
    ----------
    folder : Path
        ``clients/NNN/`` of a folder that ``fedknow certs`` made: ``ca.pem``, and ``cert.pem``
        with ``key.pem``, or ``token``, or both.

    Raises
    ------
    ConfigError
        As for :func:`server_credentials`; also if there is neither a certificate nor a token.
    """
    token = read_token(folder)
    # A folder with both sends both: which one counts is for the server to say.
    if token is not None and not (folder / CERTIFICATE).exists():
        credentials = grpc.ssl_channel_credentials(
            read_file(folder, CA, CLIENT_FOLDER)
        )
    else:
        ca, certificate, key = _read(folder, CLIENT_FOLDER)
        credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    if token is None:
        return credentials
    return grpc.composite_channel_credentials(
        credentials, grpc.access_token_call_credentials(token)
    )


def _read(folder: Path, usual: str) -> tuple[bytes, bytes, bytes]:
    """Read the CA's certificate, one's own and its key.

    They are proved to belong together and to be valid now.
    """
    ca, certificate, key = (
        read_file(folder, name, usual) for name in (CA, CERTIFICATE, KEY)
    )
    # A warning and no error: in containers a mounted secret often has a mode of its own.
    if (folder / KEY).stat().st_mode & 0o077:
        log.warning(
            "%s can be read by others on this machine; chmod 600 it", folder / KEY
        )
    # A wrong file would otherwise show only when the first peer connects.
    _prove(folder, "server" if usual == "server" else "client")
    return ca, certificate, key


def _prove(folder: Path, side: str) -> None:
    """Shake hands with oneself in memory.

    OpenSSL then says what is wrong, without a parser of certificates here.
    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Only the certificate is on trial; the name depends on the address that is used later.
    client.check_hostname = False
    # The other side's rules apply, so that a certificate for the wrong purpose is found too.
    judge = client if side == "server" else server
    client.verify_mode = ssl.CERT_NONE
    judge.verify_mode = ssl.CERT_REQUIRED
    try:
        judge.load_verify_locations(folder / CA)
    except ssl.SSLError as error:
        raise ConfigError(
            f"{folder / CA}: not a certificate ({error.reason}); `fedknow certs` makes one"
        ) from None
    for context in (server, client):
        _load_pair(context, folder)
    try:
        _shake_hands(server, client)
    except ssl.SSLError as error:
        raise ConfigError(
            f"{folder / CERTIFICATE}: {explain_ssl(error)}"
        ) from None


def _load_pair(context: ssl.SSLContext, folder: Path) -> None:
    """Load a folder's certificate and key."""
    try:
        context.load_cert_chain(folder / CERTIFICATE, folder / KEY)
    except ssl.SSLError as error:
        # The usual mistake has a remedy of its own: files of two folders were mixed.
        if error.reason == "KEY_VALUES_MISMATCH":
            text = (
                f"{folder / KEY}: not the key of {CERTIFICATE}; "
                "copy both from one folder of `fedknow certs`"
            )
        else:
            text = (
                f"{folder}: {CERTIFICATE} or {KEY} is damaged ({error.reason}); "
                "copy both again"
            )
        raise ConfigError(text) from None


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """Let two sides in this process shake hands."""
    up = ssl.MemoryBIO()
    down = ssl.MemoryBIO()
    waiting = [
        client.wrap_bio(down, up),
        server.wrap_bio(up, down, server_side=True),
    ]
    while waiting:
        # A copy, as an end that is done leaves the list in the loop.
        for end in list(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                # It waits for what the other side has not sent yet.
                continue
