"""Serves metrics to Prometheus, behind the status's credentials."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socket import AF_INET, AF_INET6, socket
from types import TracebackType
from typing import Any, Self

from fedknow.protocols.address import split_address
from fedknow.protocols.config import ConfigError
from fedknow.protocols.security import (
    CredentialError,
    Tokens,
    authenticate,
    is_server,
)
from fedknow.server.watch.background import BackgroundServer

__all__ = ["MetricsServer"]

SCRAPE_SECONDS = 10.0
"""How long a scraper may take for its handshake and its request."""
TEXT_KIND = "text/plain; version=0.0.4; charset=utf-8"


class MetricsServer:
    """Answers ``GET /metrics`` while it is entered; its threads are daemons.

    Parameters
    ----------
    address : str
        ``HOST:PORT``, checked by :func:`fedknow.protocols.transport.check_address`.
    text : callable
        Gives the text of a scrape.
    tls : Path, optional
        The server's folder of certificates; without, all travels in the clear.
    tokens : Tokens, optional
        Scrapers show one of these as a bearer token; without, a certificate of the run's CA.

    Attributes
    ----------
    port : int
        Where it listens.

    Raises
    ------
    ConfigError
        If the address cannot be had.
    """

    def __init__(
        self,
        address: str,
        text: Callable[[], bytes],
        tls: Path | None = None,
        tokens: Tokens | None = None,
    ) -> None:
        host, port = split_address(address)
        try:
            self._server = _Server(
                (host, port), text, _context(tls, tokens), tokens
            )
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"--metrics-listen {address}: cannot be had: {error}"
            ) from None
        self.port: int = self._server.server_port

    def __enter__(self) -> Self:
        self._server.start("fedknow-metrics")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.stop()


def _context(tls: Path | None, tokens: Tokens | None) -> ssl.SSLContext | None:
    """Make the TLS settings: certificates both ways, or tokens one way."""
    if tls is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(tls / "cert.pem", tls / "key.pem")
    # With tokens a scraper has no certificate.
    if tokens is None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(tls / "ca.pem")
    return context


class _Server(BackgroundServer):
    def __init__(
        self,
        address: tuple[str, int],
        text: Callable[[], bytes],
        context: ssl.SSLContext | None,
        tokens: Tokens | None,
    ) -> None:
        # The base class listens on IPv4 alone, if it is not told.
        self.address_family = AF_INET6 if ":" in address[0] else AF_INET
        super().__init__(address, _Handler)
        self.text = text
        self.context = context
        self.tokens = tokens

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Shake hands in the request's own thread."""  # a slow peer holds up nobody else
        connection: socket = request
        connection.settimeout(SCRAPE_SECONDS)
        if self.context is not None:
            connection = self.context.wrap_socket(connection, server_side=True)
        try:
            super().finish_request(connection, client_address)
        finally:
            # Wrapping detached the plain socket, so the caller can close only that.
            if connection is not request:
                connection.close()


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "fedknow"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer a scrape."""
        try:
            self._check()
        except CredentialError as error:
            self._send(
                HTTPStatus.UNAUTHORIZED, "text/plain", f"{error}\n".encode()
            )
            return
        if self.path != "/metrics":
            self._send(HTTPStatus.NOT_FOUND, "text/plain", b"Metrics: /metrics\n")
            return
        self._send(HTTPStatus.OK, TEXT_KIND, self.server.text())

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: scrapes come every few seconds."""

    def _check(self) -> None:
        """Refuse a scraper that shows no credential of the run's."""
        if self.server.context is None:
            return
        names: list[bytes] = []
        # With tokens no certificate was asked for, so that there is none to read.
        if (
            isinstance(self.connection, ssl.SSLSocket)
            and self.server.tokens is None
        ):
            certificate: Any = self.connection.getpeercert() or {}
            names = [
                name.encode() for _, name in certificate.get("subjectAltName", ())
            ]
        peer = {"x509_subject_alternative_name": names}
        # The server's own certificate will do: who holds it may see the run anyway.
        if not is_server(peer):
            authenticate(peer, list(self.headers.items()), self.server.tokens)

    def _send(self, status: HTTPStatus, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        # HTTP asks for this header with that status.
        if status is HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        self.wfile.write(data)
