"""The way to a server: direct, or through an HTTP proxy.

gRPC reads the same variables, but sends a connection to this machine itself to the proxy, and does
not know ``*`` or ``*.example.org`` in ``no_proxy``. So the way is chosen here, and gRPC is told.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import os
import socket
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedknow.protocols.address import is_loopback, split_address
from fedknow.protocols.config import ConfigError
from fedknow.protocols.errors import FedknowError

__all__ = ["Proxy", "ProxyError", "connect", "find_proxy", "proxy_options"]

_PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
"""The first that is set counts, as for gRPC; set to nothing, it means no proxy."""
_EXCEPTION_VARIABLES = ("no_grpc_proxy", "no_proxy", "NO_PROXY")
_USUAL_PORT = 80


class ProxyError(FedknowError, OSError):
    """A proxy that cannot be reached, or does not let this connection through."""


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy that tunnels connections (CONNECT).

    Its text names it without its password, so that it can stand in logs.

    Attributes
    ----------
    variable : str
        The environment variable that names it.
    host : str
        Without brackets.
    port : int
    login : str
        ``USER:PASSWORD`` as quoted in the URL, or empty.
    """

    variable: str
    host: str
    port: int
    login: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"the proxy http://{self._place()} ({self.variable})"

    def url(self) -> str:
        """Return the whole URL, password included: for gRPC alone."""
        login = f"{self.login}@" if self.login else ""
        # The login stays quoted as in the variable: a colon or an @ in it would end it early.
        return f"http://{login}{self._place()}"

    def request(self, address: str) -> bytes:
        """Return the bytes that ask for a tunnel to ``HOST:PORT``."""
        lines = [f"CONNECT {address} HTTP/1.1", f"Host: {address}"]
        if self.login:
            # As bytes: a password need not be UTF-8 once it is unquoted.
            login = base64.b64encode(
                urllib.parse.unquote_to_bytes(self.login)
            ).decode()
            lines.append(f"Proxy-Authorization: Basic {login}")
        return "\r\n".join([*lines, "", ""]).encode()

    def hint(self) -> str:
        """Say that a connection went through here, for error messages."""
        return f"the connection goes through {self}; no_proxy leaves a server out"

    def _place(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def find_proxy(
    address: str, environ: Mapping[str, str] | None = None
) -> Proxy | None:
    """Find the proxy through which the way to a server goes.

    Parameters
    ----------
    address : str
        ``HOST:PORT`` of the server.
    environ : mapping, optional
        The environment variables; by default those of this process.

    Returns
    -------
    Proxy or None
        ``None`` if the way is direct: no variable names a proxy, ``no_proxy`` names the server, or
        the address is on this machine.

    Raises
    ------
    ConfigError
        If the variable names something that gRPC cannot go through.

    Examples
    --------
    >>> environ = {"https_proxy": "http://me:secret@proxy:3128", "no_proxy": ".example.org"}
    >>> print(find_proxy("fl.example.com:8700", environ))
    the proxy http://proxy:3128 (https_proxy)
    >>> find_proxy("fl.example.org:8700", environ), find_proxy("localhost:8700", environ)
    (None, None)
    """
    environ = os.environ if environ is None else environ
    variable = next((name for name in _PROXY_VARIABLES if name in environ), None)
    if variable is None or not environ[variable].strip() or is_loopback(address):
        return None
    exceptions = next(
        (environ[name] for name in _EXCEPTION_VARIABLES if name in environ), ""
    )
    return (
        None
        if _is_exception(address, exceptions)
        else _parse(variable, environ[variable])
    )


def proxy_options(proxy: Proxy | None) -> list[tuple[str, str | int]]:
    """Give the options of a gRPC channel that goes this way.

    The environment then says nothing to gRPC.
    """
    return (
        [("grpc.enable_http_proxy", 0)]
        if proxy is None
        else [("grpc.http_proxy", proxy.url())]
    )


def connect(address: str, proxy: Proxy | None, timeout: float) -> socket.socket:
    """Open a TCP connection to a server, through the proxy if there is one.

    Parameters
    ----------
    address : str
        ``HOST:PORT``.
    proxy : Proxy, optional
        Of :func:`find_proxy`.
    timeout : float
        Seconds to wait for each step.

    Raises
    ------
    ProxyError
        If the proxy is not there or does not open the tunnel.
    OSError
        If the server cannot be reached.
    """
    if proxy is None:
        return socket.create_connection(split_address(address), timeout)
    try:
        tunnel = socket.create_connection((proxy.host, proxy.port), timeout)
    except OSError as error:
        text = f"{proxy} cannot be reached: {error.strerror or error}"
        raise ProxyError(text) from None
    try:
        _open_tunnel(tunnel, address, proxy)
    except BaseException:
        # The caller gets no socket in this case, so nobody else would close it.
        tunnel.close()
        raise
    return tunnel


def _open_tunnel(tunnel: socket.socket, address: str, proxy: Proxy) -> None:
    try:
        tunnel.sendall(proxy.request(address))
        # Its buffered reading is safe: in TLS the client speaks first, so nothing follows the
        # answer.
        answer = http.client.HTTPResponse(tunnel, method="CONNECT")
        answer.begin()
    except (OSError, http.client.HTTPException) as error:
        raise ProxyError(
            f"{proxy} does not answer as a proxy: {error!r}"
        ) from None
    if answer.status != http.HTTPStatus.OK:
        raise ProxyError(
            f"{proxy} refuses {address}: {answer.status} {answer.reason}"
        )


def _is_exception(address: str, exceptions: str) -> bool:
    """Say if an address is among those of ``no_proxy``.

    Names with all below them (``example.org``, ``.example.org``, ``*.example.org``), addresses,
    networks (``192.0.2.0/24``), each also with a port, and ``*`` for all.
    """
    host, port = split_address(address)
    # Separated by commas; some write spaces.
    entries = exceptions.replace(",", " ").split()
    if "*" in entries:
        return True
    if any(_is_in_network(host, entry) for entry in entries):
        return True
    # A dot at the end marks a full name and is not written in no_proxy.
    name = host.lower().rstrip(".")
    with_port = f"{name}:{port}"
    return any(
        _is_below(name, entry) or _is_below(with_port, entry) for entry in entries
    )


def _is_below(name: str, entry: str) -> bool:
    domain = entry.lower().removeprefix("*").strip(".")
    # With the dot, so that example.org does not also let out notexample.org.
    return bool(domain) and (name == domain or name.endswith(f".{domain}"))


def _is_in_network(host: str, entry: str) -> bool:
    try:
        network = ipaddress.ip_network(entry.strip("[]"), strict=False)
        return ipaddress.ip_address(host) in network
    except ValueError:  # one of the two is a name
        return False


def _parse(variable: str, value: str) -> Proxy:
    text = value.strip()
    try:
        # Other tools take HOST:PORT for an HTTP proxy too.
        parts = urllib.parse.urlsplit(text if "://" in text else f"http://{text}")
        usable = parts.scheme.lower() == "http" and bool(parts.hostname)
        port = _USUAL_PORT if parts.port is None else parts.port
    except ValueError:  # brackets or a port that are none
        usable = False
    if not usable:
        scheme = text.partition("://")[0] + "://" if "://" in text else ""
        # Without the login, as the message goes to a terminal and to logs.
        shown = scheme + text.removeprefix(scheme).rpartition("@")[2]
        raise ConfigError(
            f"{variable} = {shown!r}: not a proxy that a connection can go "
            "through; write http://HOST:PORT, or leave the server out with no_proxy"
        )
    login = parts.netloc.rpartition("@")[0]
    return Proxy(variable, parts.hostname or "", port, login)
