"""Who may speak to whom: TLS both ways from a folder of certificates, and the identity that a
credential proves.

``fedknow certs`` (:mod:`fedknow.server.certs`) makes one folder a machine, and each side is
given its own::

    server/        ca.pem  cert.pem  key.pem  tokens.json
    clients/000/   ca.pem  cert.pem  key.pem  token

A client's number is in its certificate (``fedknow://client/0``) or its token, so that it cannot
claim another's. Light: gRPC and the standard library, which is all that an edge box has.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
import ssl
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Self

import grpc

from fedknow.protocols.address import split_address
from fedknow.protocols.config import ConfigError
from fedknow.protocols.proxy import ProxyError, connect, find_proxy

__all__ = [
    "CredentialError",
    "CredentialFault",
    "TlsError",
    "TlsFault",
    "Tokens",
    "authenticate",
    "channel_credentials",
    "client_of_peer",
    "client_uri",
    "handshake",
    "is_server",
    "new_token",
    "server_credentials",
]

log = logging.getLogger(__name__)

CA, CERTIFICATE, KEY, TOKEN, TOKENS = (
    "ca.pem",
    "cert.pem",
    "key.pem",
    "token",
    "tokens.json",
)

SERVER_URI = "fedknow://server"
"""The name by which a certificate says that it is the server's."""

_URI = "fedknow://client/"
# No leading zeros: each client has one spelling, so that 7 and 007 cannot be two peers.
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_TOKEN = re.compile(r"(0|[1-9][0-9]{0,8})\.([A-Za-z0-9_-]{43})")


class CredentialFault(StrEnum):
    """Why a credential does not let its bearer in."""

    MISSING = "no credential"
    MALFORMED = "not a credential of this run's kind"
    TOKEN = "wrong token"
    IDENTITY = "another client's credential"


class CredentialError(Exception):
    """A peer that cannot prove who it is.

    Attributes
    ----------
    fault : CredentialFault
        What kind of fault.
    reason : str
        A sentence for both sides; it holds no secret.
    """

    def __init__(self, fault: CredentialFault, reason: str) -> None:
        super().__init__(f"{fault}: {reason}")
        self.fault = fault
        self.reason = reason


class TlsFault(StrEnum):
    """Why two sides cannot agree on a connection."""

    EXPIRED = "expired"
    EARLY = "not yet valid"
    OTHER_CA = "issued by another CA"
    NAME = "another host's certificate"
    NO_CERTIFICATE = "no client certificate"
    PURPOSE = "the other side's kind of certificate"
    NO_TLS = "no TLS"
    UNREACHABLE = "unreachable"
    PROXY = "stopped by a proxy"
    OTHER = "refused"


_REMEDIES = {
    TlsFault.EXPIRED: "make new certificates (docs/how-to/deploy.md, Renewal), or set this machine's clock",
    TlsFault.EARLY: "set this machine's clock (a Raspberry Pi has none that runs without power: enable NTP)",
    TlsFault.OTHER_CA: "use folders that one run of `fedknow certs` made for both sides",
    TlsFault.NAME: "connect by a name that the server's certificate has, or make one with `fedknow certs --host NAME`",
    TlsFault.NO_CERTIFICATE: "give a folder with a cert.pem and a key.pem: DIR/clients/NNN of `fedknow certs DIR`",
    TlsFault.PURPOSE: "give server/ of `fedknow certs` to the server and a folder of clients/ to each client",
    TlsFault.NO_TLS: "start the server with --tls",
    TlsFault.UNREACHABLE: "is the server running, is the address right, is the port open?",
    TlsFault.PROXY: "have the proxy let CONNECT through, or leave the server out with no_proxy",
    TlsFault.OTHER: "see the server's log",
}


class TlsError(Exception):
    """A handshake that failed; the text says why, and what would help.

    Attributes
    ----------
    fault : TlsFault
        What kind of fault.
    """

    def __init__(self, fault: TlsFault, detail: str) -> None:
        super().__init__(f"{fault} ({detail}): {_REMEDIES[fault]}")
        self.fault = fault


# --- credentials for gRPC
# ---------------------------------------------------------------------------------------------


def server_credentials(
    folder: Path, client_certificates: bool = True
) -> grpc.ServerCredentials:
    """Credentials of a server.

    Parameters
    ----------
    folder : Path
        ``server/`` of a folder that ``fedknow certs`` made: ``ca.pem``, ``cert.pem``, ``key.pem``.
    client_certificates : bool
        Whether clients must show a certificate of the run's CA (mTLS). Without, let clients in
        by :class:`Tokens`.

    Raises
    ------
    ConfigError
        If a file is missing or unreadable, the key is another certificate's, or the certificate
        has expired or is not of this CA.
    """
    ca, certificate, key = _read(folder, "server")
    # gRPC demands client certificates only where it has a CA to judge them by.
    return grpc.ssl_server_credentials(
        [(key, certificate)], ca if client_certificates else None, client_certificates
    )


def channel_credentials(folder: Path) -> grpc.ChannelCredentials:
    """Credentials of a client: its certificate where the folder has one, and its token where it
    has one.

    A token travels as ``authorization: Bearer ...`` in each call's metadata, and only over TLS.

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
    token = _token(folder)
    # A folder with both sends both: which one counts is for the server to say.
    if token is not None and not (folder / CERTIFICATE).exists():
        credentials = grpc.ssl_channel_credentials(_file(folder, CA, "clients/NNN"))
    else:
        ca, certificate, key = _read(folder, "clients/NNN")
        credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    if token is None:
        return credentials
    return grpc.composite_channel_credentials(
        credentials, grpc.access_token_call_credentials(token)
    )


# --- who a peer is
# ----------------------------------------------------------------------------------------------------


def client_uri(client: int) -> str:
    """The name by which a certificate says which client it is for."""
    return f"{_URI}{client}"


def client_of_peer(peer: Mapping[str, Iterable[bytes]]) -> int | None:
    """The client that a verified certificate names.

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
    names = {
        name.decode("utf-8", "replace")
        for name in peer.get("x509_subject_alternative_name", ())
    }
    numbers = {name.removeprefix(_URI) for name in names if name.startswith(_URI)}
    if len(numbers) != 1:
        return None
    number = numbers.pop()
    # int() alone also takes signs, spaces, underscores and other scripts' digits.
    return int(number) if _NUMBER.fullmatch(number) else None


def is_server(peer: Mapping[str, Iterable[bytes]]) -> bool:
    """Whether a verified certificate is the server's own: whoever looks after the server may ask
    how it stands."""
    return SERVER_URI.encode() in peer.get("x509_subject_alternative_name", ())


class Tokens:
    """The tokens that let clients in: salted SHA-256 digests of 256 random bits each, never the
    tokens themselves.

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
        text = _file(folder, TOKENS, "server")
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
        """What :meth:`load` reads."""
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

    def client(self, token: str) -> int | None:
        """The client that a token is for; ``None`` if it is nobody's."""
        match = _TOKEN.fullmatch(token)
        if match is None:
            return None
        client = int(match[1])
        # A client that does not exist takes as long as one that does.
        salt, digest = self.digests.get(client, ("", ""))
        return client if hmac.compare_digest(_digest(salt, token), digest) else None


def new_token(client: int) -> str:
    """A fresh token for a client: its number, a dot, 256 random bits."""
    return f"{client}.{secrets.token_urlsafe(32)}"


def authenticate(
    peer: Mapping[str, Iterable[bytes]],
    metadata: Iterable[tuple[str, str | bytes]] = (),
    tokens: Tokens | None = None,
    claimed: int | None = None,
) -> int:
    """The client that a call comes from.

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
        client = client_of_peer(peer)
        if client is None:
            named = bool(list(peer.get("x509_subject_alternative_name", ())))
            raise CredentialError(
                CredentialFault.MALFORMED if named else CredentialFault.MISSING,
                f"this server lets in who shows a certificate for {client_uri(0)[:-1]}N; `fedknow certs` makes them",
            )
    else:
        # Two tokens in one call are refused: which of them counts would be a guess.
        sent = [value for key, value in metadata if key.lower() == "authorization"]
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
    # Last, as only a proven identity can be compared with the claimed one.
    if claimed is not None and claimed != client:
        raise CredentialError(
            CredentialFault.IDENTITY,
            f"the credential is client {client}'s, but the peer says it is client {claimed}",
        )
    return client


# --- what is wrong with a handshake
# -----------------------------------------------------------------------------------


def handshake(address: str, folder: Path, timeout: float = 10.0) -> None:
    """Shake hands with a server and hang up, to learn why gRPC, which does not say, cannot connect.

    It goes the way that gRPC goes: through the proxy that the environment names
    (:func:`~fedknow.protocols.proxy.find_proxy`).

    Parameters
    ----------
    address : str
        ``HOST:PORT`` of the server.
    folder : Path
        The client's folder.
    timeout : float
        Seconds to wait for each step.

    Raises
    ------
    TlsError
        If the server cannot be reached, or either side refuses the other's certificate.
    ConfigError
        If the folder is at fault by itself.
    """
    # First the folder by itself, so that its faults are not blamed on the server.
    channel_credentials(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # gRPC servers refuse a client that does not offer HTTP/2 by ALPN.
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(cadata=_file(folder, CA, "clients/NNN").decode())
    if (folder / CERTIFICATE).exists():
        context.load_cert_chain(folder / CERTIFICATE, folder / KEY)
    host, _ = split_address(address)
    try:
        with (
            connect(address, find_proxy(address), timeout) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            # A server judges the client's certificate after the client is done; it greets
            # (SETTINGS) whom it takes.
            if not secure.recv(1):
                raise TlsError(
                    TlsFault.OTHER
                    if (folder / CERTIFICATE).exists()
                    else TlsFault.NO_CERTIFICATE,
                    "the server hung up on this side's certificate",
                )
    except ssl.SSLError as error:
        raise _tls_error(error) from None
    except ProxyError as error:
        raise TlsError(TlsFault.PROXY, str(error)) from None
    except OSError as error:
        raise TlsError(
            TlsFault.UNREACHABLE, f"{address}: {error.strerror or error}"
        ) from None


def _tls_error(error: ssl.SSLError) -> TlsError:
    if isinstance(error, ssl.SSLCertVerificationError):
        faults = {
            10: TlsFault.EXPIRED,
            9: TlsFault.EARLY,
            26: TlsFault.PURPOSE,
            62: TlsFault.NAME,
            64: TlsFault.NAME,
        }
        others = dict.fromkeys(
            (2, 7, 18, 19, 20, 21, 30), TlsFault.OTHER_CA
        )  # X509_V_ERR_* of OpenSSL
        return TlsError(
            (faults | others).get(error.verify_code, TlsFault.OTHER),
            error.verify_message,
        )
    reason = error.reason or str(error)
    # Parts of OpenSSL's reasons: the prefix before them names the version of TLS.
    by_alert = {
        "CERTIFICATE_EXPIRED": TlsFault.EXPIRED,
        "UNKNOWN_CA": TlsFault.OTHER_CA,
        "DECRYPT_ERROR": TlsFault.OTHER_CA,
        "BAD_CERTIFICATE": TlsFault.OTHER_CA,
        "UNSUPPORTED_CERTIFICATE": TlsFault.PURPOSE,
        "CERTIFICATE_REQUIRED": TlsFault.NO_CERTIFICATE,
        "WRONG_VERSION_NUMBER": TlsFault.NO_TLS,
        "RECORD_LAYER_FAILURE": TlsFault.NO_TLS,
    }
    fault = next(
        (fault for alert, fault in by_alert.items() if alert in reason), TlsFault.OTHER
    )
    return TlsError(fault, reason.lower().replace("_", " "))


# --- files
# ------------------------------------------------------------------------------------------------------------


def _read(folder: Path, usual: str) -> tuple[bytes, bytes, bytes]:
    """The CA's certificate, one's own and its key, proved to belong together and to be valid now."""
    ca, certificate, key = (
        _file(folder, name, usual) for name in (CA, CERTIFICATE, KEY)
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
    """Shake hands with oneself in memory: OpenSSL then says what is wrong, without a parser of
    certificates here."""
    server, client = (
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
    )
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
    try:
        for context in (server, client):
            context.load_cert_chain(folder / CERTIFICATE, folder / KEY)
    except ssl.SSLError as error:
        # The usual mistake has a remedy of its own: files of two folders were mixed.
        if error.reason == "KEY_VALUES_MISMATCH":
            text = f"{folder / KEY}: not the key of {CERTIFICATE}; copy both from one folder of `fedknow certs`"
        else:
            text = f"{folder}: {CERTIFICATE} or {KEY} is damaged ({error.reason}); copy both again"
        raise ConfigError(text) from None
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    pair = [client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)]
    try:
        while pair:
            # A copy, as an end that is done leaves the list in the loop.
            for end in list(pair):
                try:
                    end.do_handshake()
                    pair.remove(end)
                # This end waits for bytes that the other one writes on its turn.
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLError as error:
        raise ConfigError(f"{folder / CERTIFICATE}: {_tls_error(error)}") from None


def _file(folder: Path, name: str, usual: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError:
        hint = (
            f"; give {folder / 'server'}"
            if usual == "server" and (folder / "server" / name).exists()
            else ""
        )
        raise ConfigError(
            f"{folder}: there is no {name}; give {usual} of a folder that `fedknow certs` made{hint}"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{folder / name}: cannot be read: {error.strerror}"
        ) from None


def _token(folder: Path) -> str | None:
    if not (folder / TOKEN).exists():
        return None
    token = _file(folder, TOKEN, "clients/NNN").decode("utf-8", "replace").strip()
    if not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"{folder / TOKEN}: not a token (a number, a dot, 43 characters); copy it again"
        )
    return token


def _digest(salt: str, token: str) -> str:
    return hashlib.sha256(f"{salt}:{token}".encode()).hexdigest()
