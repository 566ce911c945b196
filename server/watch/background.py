"""A web server of this process, in threads that end with it."""

from __future__ import annotations

import threading
from http.server import ThreadingHTTPServer

__all__ = ["BackgroundServer"]


class BackgroundServer(ThreadingHTTPServer):
    """Answers in daemon threads between :meth:`start` and :meth:`stop`."""

    daemon_threads = True
    # A browser may be stuck: nobody waits for the threads that serve it.
    block_on_close = False

    def start(self, name: str) -> None:
        """Begin to answer, in a thread of this name."""
        threading.Thread(
            target=self.serve_forever,
            # How long stop() waits at most for this thread.
            kwargs={"poll_interval": 0.1},
            name=name,
            daemon=True,
        ).start()

    def stop(self) -> None:
        """Take no more requests, and close the port."""
        self.shutdown()
        self.settle()
        self.server_close()

    def settle(self) -> None:
        """Let answers under way end, which none has to by default."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a peer that went away or shook hands badly is no fault."""
