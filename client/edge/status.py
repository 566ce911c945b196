"""Questions to a server beside the stream, such as its status."""

from __future__ import annotations

from pathlib import Path

import grpc

from fedknow.client.edge.errors import EdgeError
from fedknow.protocols.config import ConfigError
from fedknow.protocols.proxy import find_proxy, proxy_options
from fedknow.protocols.security import TlsError, channel_credentials, handshake
from fedknow.protocols.texts import printable
from fedknow.protocols.transport import CHANNEL_OPTIONS
from fedknow.protocols.wire import STATUS, StatusReply, StatusRequest

__all__ = ["explain_failure", "fetch_status"]


def fetch_status(
    server: str, tls: Path | None = None, timeout: float = 10.0
) -> str:
    """Ask a server how its run stands.

    Parameters
    ----------
    server : str
        ``HOST:PORT``.
    tls : Path, optional
        As of :class:`~fedknow.client.edge.client.EdgeClient`; any client's will do.
    timeout : float
        Seconds.

    Returns
    -------
    str
        JSON; see :meth:`fedknow.server.grids.grpc_service.Service.status`.

    Raises
    ------
    EdgeError
        If it does not answer.
    ConfigError
        If the certificates are at fault, or the environment names a proxy that cannot be used.
    """
    proxy = find_proxy(server)
    options = [*CHANNEL_OPTIONS, *proxy_options(proxy)]
    channel = (
        grpc.insecure_channel(server, options)
        if tls is None
        else grpc.secure_channel(server, channel_credentials(tls), options)
    )
    with channel:
        ask = channel.unary_unary(
            STATUS, StatusRequest.SerializeToString, StatusReply.FromString
        )
        try:
            text: str = ask(StatusRequest(), timeout=timeout).json
        except grpc.RpcError as error:
            hint = "" if proxy is None else f"; {proxy.hint()}"
            reason = explain_failure(server, tls, error)
            raise EdgeError(f"{server} does not answer: {reason}{hint}") from None
    return text


def explain_failure(server: str, tls: Path | None, error: grpc.RpcError) -> str:
    """Say why a call failed.

    With TLS, gRPC only says that there is no connection, so that a handshake is tried.
    """
    # gRPC gives this code for every failed handshake; a handshake of our own says why.
    if error.code() is grpc.StatusCode.UNAVAILABLE and tls is not None:
        try:
            handshake(server, tls, 5.0)
        except (TlsError, ConfigError) as reason:
            return str(reason)
    return f"{error.code().name}: {printable(error.details() or '')}"
