"""Serves the live page and its stream of messages to this machine alone."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Self

from fedknow.protocols.config import ConfigError
from fedknow.server.watch.background import BackgroundServer
from fedknow.server.watch.hub import Follower, Hub

__all__ = ["LivePage"]

HOST = "127.0.0.1"
NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})
"""Names by which a browser may call this server.

Another name in the ``Host`` header is a web site's that was made to resolve to this machine.
The port is not looked at: a tunnel may have another one at its other end.
"""
PAGES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/charts.js": ("charts.js", "text/javascript"),
    "/clients.js": ("clients.js", "text/javascript"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    # A page of yesterday's version would not understand today's messages.
    "Cache-Control": "no-store",
}
HEARTBEAT_SECONDS = 5.0
"""How often a stream without news says that it is there.

A browser that has gone is noticed by it, and its thread ends.
"""
MOST_STREAMS = 64
SETTLE_SECONDS = 1.0
SEND_SECONDS = 20.0
"""A browser that takes nothing for so long has gone."""


class LivePage:
    """A server of the live page of one run or several, while it is entered.

    All its threads are daemons: they end with the process.

    Parameters
    ----------
    folder : Path
        The folder; it need not exist yet.
    port : int
        The port on 127.0.0.1; 0 is any free one.

    Attributes
    ----------
    port : int
        The port it has.
    url : str
        Where the page is.

    Raises
    ------
    ConfigError
        If the port cannot be had.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        hub = Hub()
        hub.add(
            [
                {
                    "type": "hello",
                    "session": hub.session,
                    "folder": str(folder.absolute()),
                }
            ]
        )
        self._hub = hub
        self._follower = Follower(folder, hub)
        try:
            self._server = _Server((HOST, port), hub)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"port {port} of {HOST} cannot be had: {error}; give another one, or 0 for any"
            ) from None
        self.port: int = self._server.server_port
        self.url = f"http://{HOST}:{self.port}/"

    def __enter__(self) -> Self:
        # Once before the thread starts, so that the page is not empty at first.
        self._follower.look()
        self._follower.start()
        self._server.start("fedknow-page")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The follower first: its last look still passes through the hub and the streams.
        self._follower.end()
        self._hub.end({"type": "bye"})
        self._server.stop()


class _Server(BackgroundServer):
    def __init__(self, address: tuple[str, int], hub: Hub) -> None:
        super().__init__(address, _Handler)
        self.hub = hub
        self.streams = 0
        self.changed = threading.Condition()

    def settle(self) -> None:
        """Wait a moment until the last messages are written."""
        # And no longer: a browser may be stuck.
        with self.changed:
            self.changed.wait_for(lambda: self.streams == 0, SETTLE_SECONDS)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "fedknow"
    sys_version = ""
    timeout = SEND_SECONDS

    def do_GET(self) -> None:
        """Answer with a file of the page, or with the stream."""
        if not self._is_called_rightly():
            self._send(
                HTTPStatus.MISDIRECTED_REQUEST,
                "text/plain",
                b"This page answers to 127.0.0.1 and localhost only.\n",
            )
        elif self.path == "/events":
            self._stream()
        elif self.path in PAGES:
            name, kind = PAGES[self.path]
            data = (files(__package__) / "pages" / name).read_bytes()
            self._send(HTTPStatus.OK, kind, data)
        else:
            self._send(
                HTTPStatus.NOT_FOUND, "text/plain", b"There is no such page.\n"
            )

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: the terminal is the run's."""

    def _is_called_rightly(self) -> bool:
        hosts = self.headers.get_all("Host", [])
        # Two headers may be read as one by this side and as the other by a proxy.
        if len(hosts) != 1:
            return False
        name, colon, port = hosts[0].rpartition(":")
        if colon and port.isdecimal():
            return name.lower() in NAMES
        return hosts[0].lower() in NAMES

    def _send(self, status: HTTPStatus, kind: str, data: bytes) -> None:
        length = {"Content-Length": str(len(data))}
        self._begin(status, f"{kind}; charset=utf-8", length)
        self.wfile.write(data)

    def _begin(
        self,
        status: HTTPStatus,
        kind: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in {**HEADERS, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def _stream(self) -> None:
        """Send all messages, then each new one, until the browser goes."""
        server = self.server
        with server.changed:
            is_full = server.streams >= MOST_STREAMS
            # Counted within the lock, as each stream has a thread of its own.
            server.streams += not is_full
        if is_full:
            self._send(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "text/plain",
                b"Too many listeners.\n",
            )
            return
        try:
            self._begin(HTTPStatus.OK, "text/event-stream")
            # A browser then looks for a restarted server after a second.
            self.wfile.write(b"retry: 1000\n\n")
            self._pass_messages_on()
        except (OSError, TimeoutError):
            # The browser has gone.
            self.close_connection = True
        finally:
            with server.changed:
                server.streams -= 1
                server.changed.notify_all()

    def _pass_messages_on(self) -> None:
        hub = self.server.hub
        place = hub.start_of(self.headers.get("Last-Event-ID", ""))
        while True:
            lines, is_over = hub.wait(place, HEARTBEAT_SECONDS)
            blocks = [
                f"id: {hub.session}-{number}\ndata: {line}\n\n"
                for number, line in enumerate(lines, start=place)
            ]
            # A comment where there is no news: writing is the only way to notice that the
            # browser has gone.
            self.wfile.write("".join(blocks).encode() or b":\n\n")
            place += len(lines)
            if is_over:
                return
