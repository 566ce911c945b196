"""The thread of the gRPC server, and how other threads talk to it."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import grpc

from fedknow.protocols.messages import client_of
from fedknow.protocols.wire import WireError
from fedknow.server.grids.grpc_assignments import Answer
from fedknow.server.grids.grpc_link import Work
from fedknow.server.grids.grpc_service import Service
from fedknow.server.grids.grpc_words import Farewell

__all__ = ["ServiceThread"]

log = logging.getLogger(__name__)


class ServiceThread:
    """A service in an event loop of its own.

    Parameters
    ----------
    service : Service
        It belongs to the event loop; so do its parts, but for what they say themselves.
    listen : str
        ``HOST:PORT``; port 0 is one of the system's choice.
    credentials : grpc.ServerCredentials or None
        None: all travels in the clear.

    Attributes
    ----------
    port : int
        Where it listens.

    Raises
    ------
    RuntimeError
        If the address cannot be had.
    """

    def __init__(
        self,
        service: Service,
        listen: str,
        credentials: grpc.ServerCredentials | None,
    ) -> None:
        self._service = service
        self._assignments = service.assignments
        self._roster = service.roster
        self._farewell = Farewell()
        self._loop = asyncio.new_event_loop()
        started: Future[int] = Future()
        self._thread = threading.Thread(
            target=self._serve,
            args=(listen, credentials, started),
            name="fedknow-grpc",
            # A daemon: an error in the main thread must not leave a process that listens for
            # ever.
            daemon=True,
        )
        self._thread.start()
        # Waits for the thread, and raises here what went wrong when it began to listen.
        self.port = started.result()

    # --- the service, from any thread

    def assign(
        self, works: Sequence[Work], progress: Mapping[str, Any] | None = None
    ) -> None:
        """Give out work; see :meth:`Assignments.assign`."""
        self._call(self._assignments.assign, works, progress)

    def withdraw(self) -> None:
        """Want no answers any more; see :meth:`Assignments.withdraw`."""
        self._call(self._assignments.withdraw)

    def drop(self, node: int) -> None:
        """Take a client's work back; see :meth:`Assignments.drop`."""
        self._call(self._assignments.drop, node)

    def reject(self, work: Work, error: WireError) -> None:
        """End the stream of an unreadable answer; see :meth:`Service.reject`."""
        self._call(self._service.reject, work, error)

    def count(self, kind: str, number: int = 1) -> None:
        """Count what the grid saw; see :meth:`Assignments.count`."""
        self._call(self._assignments.count, kind, number)

    def next_answer(
        self, deadline: float | None, longest: float
    ) -> Answer | None:
        """Wait for the next answer.

        Parameters
        ----------
        deadline : float or None
            When to stop, on :func:`time.monotonic`.
        longest : float
            Seconds to wait at most.

        Returns
        -------
        Answer or None
            None: none came until then.

        Raises
        ------
        RuntimeError
            If the gRPC server has broken down.
        """
        seconds = longest
        if deadline is not None:
            seconds = min(longest, deadline - time.monotonic())
        try:
            answer = self._assignments.answers.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return None
        if isinstance(answer, Exception):
            raise RuntimeError("the gRPC server has broken down") from answer
        return answer

    @property
    def has_answers(self) -> bool:
        """Whether an answer can be had without waiting."""
        return not self._assignments.answers.empty()

    def gather(self, clients: int, remind_seconds: float) -> None:
        """Wait until so many clients are connected; log those that are."""
        while not self._roster.wait_for(clients, remind_seconds):
            present = [client_of(node) for node in self.connected()]
            text = "%d clients are connected (%s); the run waits for %d"
            log.info(text, len(present), present, clients)

    def connected(self) -> list[int]:
        """Return the connected nodes, ascending."""
        return self._roster.connected()

    # --- the thread

    def stop(self, farewell: Farewell | None = None) -> None:
        """Say goodbye to clients, and stop."""
        if farewell is not None:
            self._farewell = farewell
        if self._thread.is_alive():
            self._call(self._ended.set)
            self._thread.join()

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        if self._thread.is_alive():
            # asyncio's objects are not safe to touch from another thread.
            self._loop.call_soon_threadsafe(function, *arguments)

    def _serve(
        self,
        listen: str,
        credentials: grpc.ServerCredentials | None,
        started: Future[int],
    ) -> None:
        """Run the event loop to its end."""
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._main(listen, credentials, started))
        except Exception as error:
            log.exception("the gRPC server has broken down")
            # Whoever waits for answers must hear of it.
            self._assignments.answers.put(error)
            if not started.done():
                started.set_exception(error)

    async def _main(
        self,
        listen: str,
        credentials: grpc.ServerCredentials | None,
        started: Future[int],
    ) -> None:
        self._ended = asyncio.Event()
        try:
            port = await self._service.start(listen, credentials)
        except RuntimeError as error:
            started.set_exception(error)
            return
        started.set_result(port)
        await self._ended.wait()
        await self._service.stop(self._farewell)
