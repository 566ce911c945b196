"""A handshake with a server, to learn why there is no connection."""

from __future__ import annotations

import ssl
from pathlib import Path

from fedknow.protocols.address import split_address
from fedknow.protocols.proxy import ProxyError, connect, find_proxy
from fedknow.protocols.security.credentials import channel_credentials
from fedknow.protocols.security.faults import TlsError, TlsFault, explain_ssl
from fedknow.protocols.security.files import (
    CA,
    CERTIFICATE,
    CLIENT_FOLDER,
    KEY,
    read_file,
)

__all__ = ["handshake"]


def handshake(address: str, folder: Path, timeout: float = 10.0) -> None:
    """Shake hands with a server and hang up.

    gRPC does not say why it cannot connect, and this does. It goes the way that gRPC goes:
    through the proxy that the environment names (:func:`~fedknow.protocols.proxy.find_proxy`).

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
    context.load_verify_locations(
        cadata=read_file(folder, CA, CLIENT_FOLDER).decode()
    )
    if (folder / CERTIFICATE).exists():
        context.load_cert_chain(folder / CERTIFICATE, folder / KEY)
    host, _ = split_address(address)
    try:
        with (
            connect(address, find_proxy(address), timeout) as connection,
            context.wrap_socket(connection, server_hostname=host) as secure,
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
        raise explain_ssl(error) from None
    except ProxyError as error:
        raise TlsError(TlsFault.PROXY, str(error)) from None
    except OSError as error:
        raise TlsError(
            TlsFault.UNREACHABLE, f"{address}: {error.strerror or error}"
        ) from None
