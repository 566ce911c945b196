"""The edge client: a resident process that does a server's work.

It keeps a stream to the server and does the work that comes over it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import cast

import grpc
import grpc.aio

from fedknow.client.compute.device import find_device
from fedknow.client.data.local import LOCAL, LocalStream
from fedknow.client.edge.desk import Desk
from fedknow.client.edge.errors import EdgeError, Gone, Refused
from fedknow.client.edge.journal import Journal
from fedknow.client.edge.renewal import keep_valid
from fedknow.client.edge.session import Session
from fedknow.client.edge.status import explain_failure
from fedknow.client.edge.threads import WorkThread, first_to_end
from fedknow.client.edge.worker import NodeFactory, Worker
from fedknow.client.host import Answerer, secured
from fedknow.client.permissions import Permissions
from fedknow.client.state.files import read_key
from fedknow.protocols.bounds import check_between
from fedknow.protocols.config import (
    MOST_CLIENTS,
    MOST_SECONDS,
    ConfigError,
    ExperimentConfig,
)
from fedknow.protocols.messages import node_of
from fedknow.protocols.proxy import find_proxy, proxy_options
from fedknow.protocols.security import channel_credentials
from fedknow.protocols.texts import printable
from fedknow.protocols.transport import CHANNEL_OPTIONS, LONGEST_DELAY
from fedknow.protocols.wire import JOIN, Code, Goodbye, WireError

__all__ = ["EdgeClient", "run_client"]

log = logging.getLogger(__name__)

FIRST_DELAY = 0.5
"""Seconds that an attempt to connect waits at most.

Doubled after each failure, up to :data:`LONGEST_DELAY`.
"""
KEEP_AFTER = 1.0
"""Seconds of work from which on an answer is kept on disk: the rest is as well done again."""
JOIN_SECONDS = 10.0
"""Seconds that an idle thread of work gets to end; it needs far less."""

_FINAL = (Code.VERSION, Code.CREDENTIAL, Code.NO_ROOM)
"""Faults that trying again does not change, on whichever side they are seen."""


class EdgeClient:
    """One client of one server.

    The stream and its heartbeats live in the event loop, the work in one thread: a connection
    outlives training that takes longer than any proxy's idle limit, and training outlives the
    connection. The server gives out one piece of work at a time; a newer one takes the place of
    an older one that has not begun.

    Parameters
    ----------
    server : str
        ``HOST:PORT``.
    state : Path
        The client's own folder (:class:`~fedknow.client.edge.journal.Journal`).
    tls : Path, optional
        Its certificates (:func:`~fedknow.protocols.security.channel_credentials`); without, the
        connection is in the clear.
    data : Path, optional
        Its data: ``task-000.npz``, ... (:class:`~fedknow.client.data.local.LocalStream`) where
        the experiment says ``data.name = "local"``, else the folder that holds the experiment's
        data set.
    client : int, optional
        Which client this is. A credential says it by itself; without one the server gives a
        free place, and the client comes back to it.
    device : str, optional
        What it computes on, whatever the experiment says
        (:func:`~fedknow.client.compute.device.find_device`).
    give_up : float, optional
        Seconds without a connection after which to give up; by default never.
    node : callable, optional
        Makes what answers; by default :class:`fedknow.client.node.Node` over the data.
    keep_after : float
        See :data:`KEEP_AFTER`.
    permissions : Permissions, optional
        What the server may have this client do; by default, run what fedknow ships.
    state_key : Path, optional
        A file of 32 random bytes that the state is encrypted with.

    Raises
    ------
    ConfigError
        If a number is out of range, the folder is in use, the certificates are at fault, there
        is no such device, or the environment names a proxy that cannot be used.
    """

    def __init__(  # noqa: PLR0913  # the options of a command
        self,
        server: str,
        state: Path,
        *,
        tls: Path | None = None,
        data: Path | None = None,
        client: int | None = None,
        device: str | None = None,
        give_up: float | None = None,
        node: NodeFactory | None = None,
        keep_after: float = KEEP_AFTER,
        permissions: Permissions | None = None,
        state_key: Path | None = None,
    ) -> None:
        _check_options(client, give_up, device, tls)
        self.server = server
        self._tls = tls
        self._proxy = find_proxy(server)
        self._client = client
        self._give_up = give_up
        self.desk = Desk()
        self._journal = Journal(state, key=read_key(state_key))
        self._thread = WorkThread()
        # Made only with the experiment, which the server sends.
        bounds = permissions or Permissions()
        self._worker = Worker(
            self.desk,
            self._journal,
            node or partial(_make_node, data, bounds),
            device,
            keep_after,
            bounds,
            data,
        )
        self._fence = self._journal.fence
        self._connected_at = time.monotonic()
        self._delay = FIRST_DELAY
        # Back-off must not disturb the generators that learners may draw from.
        self._random = random.Random()

    @property
    def is_busy(self) -> bool:
        """Work is going on in the thread, which nothing can interrupt."""
        return self._thread.is_busy

    def join(self, seconds: float = JOIN_SECONDS) -> bool:
        """Wait for the thread that did the work to end, once the client has ended.

        A process that ends before it may be aborted by PyTorch. A thread that trains is not
        waited for.

        Parameters
        ----------
        seconds : float
            How long to wait at most.

        Returns
        -------
        bool
            The thread has ended.
        """
        return self._thread.join(seconds)

    async def run(self) -> None:
        """Take part until the run is over.

        Raises
        ------
        ConfigError
            If this side is at fault: other version, wrong credential, no such client, data that
            cannot be used.
        EdgeError
            If there was no connection for ``give_up`` seconds, or another process took this
            client's place.
        """
        try:
            await first_to_end(self._do_work(), self._stay_connected())
        finally:
            self._thread.stop()
            self._journal.close()

    async def _do_work(self) -> None:
        """Have the newest work done, one after the other.

        Connections may come and go meanwhile.
        """
        desk = self.desk
        while True:
            await desk.has_job.wait()
            desk.has_job.clear()
            job = desk.job
            if job is None or (
                desk.result is not None and desk.result.is_for(job)
            ):
                continue
            try:
                desk.result = await self._thread.do(self._worker.answer, job)
            except WireError as error:
                desk.job = None
                desk.complain(error)
            # Other work may have come meanwhile.
            desk.has_job.set()
            desk.has_changed.set()

    async def _stay_connected(self) -> None:
        while True:
            try:
                goodbye = await self._connect()
            except (Refused, Gone, WireError, grpc.aio.AioRpcError) as error:
                reason = await self._explain(error)
            else:
                # Only then: a server that restarts says goodbye as well.
                if goodbye.finished:
                    log.info("done: %s", printable(goodbye.reason))
                    return
                reason = f"the server says goodbye: {printable(goodbye.reason)}"
            if self._proxy is not None:
                reason = f"{reason}; {self._proxy.hint()}"
            await self._wait(reason)

    async def _connect(self) -> Goodbye:
        """Connect once, and stay until the end of the connection."""
        session = Session(self.server, self.desk, self._thread, self._worker)
        async with self._channel() as channel:
            stream = channel.stream_stream(JOIN)()
            # The server asks again for what it still wants an answer to.
            self.desk.job = None
            try:
                talk = session.run(stream, self._claimed_node(), self._fence)
                renewal = keep_valid(channel, self._tls, self.server)
                return cast(Goodbye, await first_to_end(talk, renewal))
            finally:
                if session.was_welcomed:
                    self._fence = session.fence
                    self._delay = FIRST_DELAY
                    self._connected_at = time.monotonic()
                stream.cancel()

    async def _explain(self, error: Exception) -> str:
        """Say why a connection ended.

        Raises
        ------
        ConfigError, EdgeError
            If trying again would change nothing.
        """
        if isinstance(error, grpc.aio.AioRpcError):
            # It may take seconds, and the loop has other things to do.
            reason = await asyncio.to_thread(
                explain_failure, self.server, self._tls, error
            )
            return f"connection to {self.server}: {reason}"
        if isinstance(error, Refused):
            return self._explain_refusal(error.error)
        if isinstance(error, WireError) and error.code in _FINAL:
            raise ConfigError(f"{self.server}: {error.reason}") from None
        return str(error)

    def _explain_refusal(self, error: WireError) -> str:
        """Say why the server ended a connection."""
        if error.code in _FINAL:
            raise ConfigError(
                f"{self.server} refuses this client: {error.reason}"
            ) from None
        if error.code is Code.REPLACED:
            raise EdgeError(f"{self.server}: {error.reason}") from None
        # The same answer would be too large each time, so a failure takes its place.
        if error.code is Code.TOO_LARGE and self.desk.result is not None:
            self.desk.result = self.desk.result.failed(
                f"the server does not take the answer: {error.reason}"
            )
        return f"refused: {error}"

    async def _wait(self, reason: str) -> None:
        """Wait before the next attempt, or give up."""
        # Monotonic: a box without a battery sets its clock once it is online.
        seconds_away = time.monotonic() - self._connected_at
        # Chance spreads the clients of a server that comes back.
        delay = self._random.uniform(0, self._delay)
        if self._give_up is not None:
            if seconds_away >= self._give_up:
                raise EdgeError(
                    f"{self.server}: no connection for {seconds_away:.0f} s, "
                    f"which is when to give up: {reason}"
                )
            delay = min(delay, self._give_up - seconds_away)
        self._delay = min(2 * self._delay, LONGEST_DELAY)
        log.info("%s; reconnecting in %.1f s", reason, delay)
        await asyncio.sleep(delay)

    def _channel(self) -> grpc.aio.Channel:
        options = [*CHANNEL_OPTIONS, *proxy_options(self._proxy)]
        if self._tls is None:
            return grpc.aio.insecure_channel(self.server, options)
        # Read anew: the certificate may have been renewed, here or by hand.
        credentials = channel_credentials(self._tls)
        return grpc.aio.secure_channel(self.server, credentials, options)

    def _claimed_node(self) -> int:
        """Give the node id to ask for; 0: any, or that of the credential."""
        if self._client is not None:
            return node_of(self._client)
        # With a credential the server knows the client, and a claim could only contradict it.
        return self._journal.node if self._tls is None else 0


def _check_options(
    client: int | None,
    give_up: float | None,
    device: str | None,
    tls: Path | None,
) -> None:
    """Refuse options that cannot be met, before anything begins."""
    if client is not None:
        check_between("--client", client, 0, MOST_CLIENTS - 1)
    if give_up is not None:
        check_between("--give-up", give_up, 0, MOST_SECONDS)
    if device is not None:
        find_device(device, "--device")
    if tls is not None:
        channel_credentials(tls)


def run_client(client: EdgeClient) -> None:
    """Run a client in this process until the run is over.

    Raises
    ------
    ConfigError, EdgeError
        See :meth:`EdgeClient.run`.
    KeyboardInterrupt
        On SIGINT or SIGTERM. What was being done is lost, and done again next time.
    """

    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            # A shell has what it runs in the background ignore Ctrl-C.
            if signal.getsignal(number) is not signal.SIG_IGN:
                asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        await client.run()

    try:
        asyncio.run(main())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        client.join()


def _make_node(
    data: Path | None, permissions: Permissions, config: ExperimentConfig
) -> Answerer:
    """Make the node of an experiment over the data that are here."""
    # Imported late: PyTorch takes seconds, and the command line must answer before.
    from fedknow.client.data import make_benchmark
    from fedknow.client.node import Node

    if config.data.name == LOCAL:
        if data is None:
            raise ConfigError(
                "this experiment is on the clients' own data: say where they are with --data DIR"
            )
        brought = LocalStream(data, config.data)
        permissions.check_model(config.model, brought.spec, brought.classes)
        return secured(Node(config, brought), config, is_real=True)
    # The server's folder means nothing on this machine.
    folder = "" if data is None else str(data)
    data_config = config.data.model_copy(update={"dir": folder})
    local_config = config.model_copy(update={"data": data_config})
    permissions.check_download(data_config)
    stream = make_benchmark(local_config)
    permissions.check_model(config.model, stream.spec, stream.classes)
    node = Node(local_config, stream)
    return secured(node, local_config, is_real=True)
