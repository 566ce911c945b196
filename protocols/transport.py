"""What both ends of a gRPC connection must agree on.

That is how often to speak, how long to listen, and how to cut messages.
"""

from __future__ import annotations

from pathlib import Path

from fedknow.protocols.address import check_host, is_loopback, split_address
from fedknow.protocols.config import ConfigError

__all__ = [
    "CHANNEL_OPTIONS",
    "CHUNK_BYTES",
    "HEARTBEAT_SECONDS",
    "HELLO_SECONDS",
    "LONGEST_DELAY",
    "SERVER_OPTIONS",
    "SILENCE_SECONDS",
    "check_address",
]

HEARTBEAT_SECONDS = 3.0
"""A side that has nothing to say sends a heartbeat that often: proxies do not cut the stream, and
the peer knows."""
SILENCE_SECONDS = 10.0
"""A side that has heard nothing for so long takes the peer for dead."""
HELLO_SECONDS = 10.0
"""How long the greeting may take, on either side."""
LONGEST_DELAY = 30.0
"""Seconds between a client's attempts to connect, at most."""
CHUNK_BYTES = 1 << 16
"""Chunks of messages: five clients behind one 50 kB/s link still get one each in 7 s, so that slow
is not taken for dead. Larger ones cost less between fast machines: a round of ten clients with
1 M parameters takes 82 ms with 256 KiB and 131 ms with 64 KiB (``benchmarks/grpc_round.py``)."""

_KEEPALIVE = [
    # Beneath the heartbeats, which find a dead peer sooner: pings by gRPC itself, which find a
    # dead connection even where this process is too busy to look.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # 0 is no limit: gRPC's default stops pinging a stream that waits for a long task.
    ("grpc.http2.max_pings_without_data", 0),
]
CHANNEL_OPTIONS = [
    *_KEEPALIVE,
    # Each attempt to connect is a channel of its own, so that waiting between attempts is ours
    # to decide.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
]
"""Of a client's channel."""
SERVER_OPTIONS = [
    *_KEEPALIVE,
    # Below the clients' interval, or the server would end their connections for pinging.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # A connection that has not shaken hands, or has no stream, is closed: it costs a descriptor.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 30_000),
    # Two servers on one port would each get some of the clients.
    ("grpc.so_reuseport", 0),
]
"""Of the server."""


def check_address(address: str, tls: Path | None, insecure: bool) -> None:
    """Check that an address may be used as it is asked for.

    Off this machine, a connection is in the clear by ``--insecure`` alone.

    Raises
    ------
    ConfigError
        If not, or if the address is no ``HOST:PORT``.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(
            f"address {address!r}: write HOST:PORT, for example 127.0.0.1:8700 or [::1]:8700"
        )
    try:
        check_host(split_address(address)[0])
    except ValueError as error:
        raise ConfigError(
            f"address {address!r}: before the port, {error}"
        ) from None
    if tls is not None and insecure:
        raise ConfigError("--tls and --insecure: one or the other")
    # A forgotten option must not open the run to everybody in the network.
    if tls is None and not insecure and not is_loopback(address):
        raise ConfigError(
            f"{address} is not on this machine alone: give --tls DIR (`fedknow certs` "
            f"makes one), or --insecure to let "
            "everything travel in the clear and believe everyone"
        )
