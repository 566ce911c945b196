"""The edge client: a resident process that keeps a stream to the server and does the work that
comes over it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import queue
import random
import signal
import threading
import time
import tomllib
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, cast

import grpc
import grpc.aio

from fedknow.client.compute.device import find_device
from fedknow.client.data.local import LOCAL, LocalStream
from fedknow.client.edge.journal import Journal, key_of
from fedknow.client.host import Answerer, Host, one_thread
from fedknow.client.learners import learner_class
from fedknow.client.state import StateError
from fedknow.protocols.bounds import check_between
from fedknow.protocols.config import (
    MOST_CLIENTS,
    MOST_SECONDS,
    ConfigError,
    ExperimentConfig,
    read_config,
)
from fedknow.protocols.errors import FedknowError
from fedknow.protocols.messages import CLIENT_FAILED, Message, client_of, node_of
from fedknow.protocols.proxy import find_proxy, proxy_options
from fedknow.protocols.security import TlsError, channel_credentials, handshake
from fedknow.protocols.texts import counted
from fedknow.protocols.transport import (
    CHANNEL_OPTIONS,
    CHUNK_BYTES,
    HEARTBEAT_SECONDS,
    HELLO_SECONDS,
    LONGEST_DELAY,
    SILENCE_SECONDS,
)
from fedknow.protocols.wire import (
    HEARTBEAT,
    JOIN,
    STATUS,
    Assembler,
    Code,
    Encoding,
    Frame,
    Goodbye,
    Packed,
    Parcel,
    StatusReply,
    StatusRequest,
    Welcome,
    WireError,
    check_version,
    hello,
    pack,
    parse,
    refusal,
    refused,
    unpack,
)

__all__ = ["EdgeClient", "EdgeError", "NodeFactory", "fetch_status", "run_client"]

log = logging.getLogger(__name__)

NodeFactory = Callable[[ExperimentConfig], Answerer]
"""Makes what answers messages, once the server has said what the experiment is."""

FIRST_DELAY = 0.5
"""Seconds that an attempt to connect waits at most; doubled after each failure, up to
:data:`LONGEST_DELAY`."""
KEEP_AFTER = 1.0
"""Seconds of work from which on an answer is kept on disk: the rest is as well done again."""

_FINAL = (Code.VERSION, Code.CREDENTIAL, Code.NO_ROOM)
"""Faults that trying again does not change, on whichever side they are seen."""


class EdgeError(FedknowError, RuntimeError):
    """A client that gave up; the text says why."""


class _Refused(Exception):
    """The server ended the stream with a reason."""

    def __init__(self, error: WireError) -> None:
        super().__init__(str(error))
        self.error = error


class _Gone(Exception):
    """The connection is of no use any more; the text says why."""


@dataclass(frozen=True, eq=False)
class _Job:
    """Work that the server wants an answer to."""

    key: str
    parcel: Parcel


@dataclass(frozen=True, eq=False)
class _Done:
    """The answer to the work of a key."""

    key: str
    asked_by: str
    """Id of the message that asked for it."""
    answer: Packed
    version: int
    work: Message
    """What was asked for, without its content."""
    before: int
    has_failed: bool

    def answers(self, job: _Job) -> bool:
        """Whether this is the answer to a job.

        Work that was done is known by its key, whoever asks for it again. A failure is not work
        done: it answers the one message that it was made for, and work asked for by another
        message is tried anew.
        """
        is_same = self.key == job.key
        return is_same and (not self.has_failed or self.asked_by == job.parcel.id)

    def failed(self, reason: str) -> _Done:
        """A failure in the answer's stead."""
        answer = pack(self.work.fail(CLIENT_FAILED, reason))
        return replace(self, answer=answer, version=self.before, has_failed=True)


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

    Raises
    ------
    ConfigError
        If a number is out of range, the folder is in use, the certificates are at fault, there
        is no such device, or the environment names a proxy that cannot be used.
    """

    def __init__(
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
    ) -> None:
        if client is not None:
            check_between("--client", client, 0, MOST_CLIENTS - 1)
        if give_up is not None:
            check_between("--give-up", give_up, 0, MOST_SECONDS)
        if device is not None:
            find_device(device, "--device")
        self.server = server
        self._tls = tls
        self._proxy = find_proxy(server)
        self._credentials = None if tls is None else channel_credentials(tls)
        self._data = data
        self._client = client
        self._device = device
        self._give_up = give_up
        self._make_node = node or self._real_node
        self._keep_after = keep_after
        self._journal = Journal(state)
        self._hand = _Hand()
        self._host: Host | None = None
        self._encoding = Encoding.DENSE
        self._settled: tuple[str, str] | None = None
        self._node = 0
        self._job: _Job | None = None
        self._done: _Done | None = None
        self._problem: WireError | ConfigError | None = None
        self._connected_at = time.monotonic()
        self._delay = FIRST_DELAY
        # Back-off must not disturb the generators that learners may draw from.
        self._random = random.Random()

    @property
    def busy(self) -> bool:
        """Whether work is going on in the thread, which nothing can interrupt."""
        return self._hand.busy

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
        self._job_came, self._changed = asyncio.Event(), asyncio.Event()
        try:
            await _first(self._labour(), self._stay_connected())
        finally:
            self._hand.stop()
            self._journal.close()

    # --- work
    # -----------------------------------------------------------------------------------------------------

    async def _labour(self) -> None:
        """Have the newest work done, one after the other, whatever becomes of connections meanwhile."""
        while True:
            await self._job_came.wait()
            self._job_came.clear()
            job = self._job
            if job is None or (self._done is not None and self._done.answers(job)):
                continue
            try:
                self._done = await self._hand.do(self._answer, job)
            except WireError as error:
                self._job = None
                self._complain(error)
            self._job_came.set()  # another one may have come meanwhile
            self._changed.set()

    def _answer(self, job: _Job) -> _Done:
        """The answer to work, from the journal if it was done before; in the thread."""
        assert self._host is not None  # what comes before the first work
        began = time.perf_counter()
        parcel = job.parcel
        message = replace(unpack(parcel), id=job.key)
        kept = self._journal.find(job.key, parcel.committed)
        reply, version = kept or self._work(message, parcel)
        try:
            answer = pack(reply, self._encoding, chunk_bytes=CHUNK_BYTES)
        except WireError as error:
            reply, version = (
                message.fail(CLIENT_FAILED, f"the answer cannot be sent: {error}"),
                parcel.version,
            )
            answer = pack(reply)
        seconds = time.perf_counter() - began
        if kept is None and reply.failure is None and seconds >= self._keep_after:
            try:
                self._journal.keep(job.key, parcel.committed, answer, version)
            except StateError as error:  # it is in memory still, and can be made again
                log.warning("%s", error)
        size = len(parcel.header) + len(parcel.payload)
        log.info(
            "%s: %s in %.1f s, %s in, %s out%s",
            _place(message),
            message.kind,
            seconds,
            _size(size),
            _size(answer.size),
            "" if reply.failure is None else f"; failed: {reply.failure.reason}",
        )
        asked = replace(message, content={})
        has_failed = reply.failure is not None
        return _Done(
            job.key, parcel.id, answer, version, asked, parcel.version, has_failed
        )

    def _work(self, message: Message, parcel: Parcel) -> tuple[Message, int]:
        assert self._host is not None
        try:
            self._journal.commit(
                client_of(parcel.node), parcel.version, parcel.committed
            )
            with one_thread():
                return self._host.handle(message, parcel.version)
        except (
            StateError
        ) as error:  # the server decides what becomes of a client whose disk fails
            return message.fail(CLIENT_FAILED, str(error)), parcel.version

    def _settle(self, config: str, run: str, node: int) -> None:
        """Make ready for a run; in the thread, before its first work."""
        if self._settled == (config, run):
            return
        self._journal.begin(run, node)
        self._done = None
        experiment = read_config(_toml(config))
        if self._device is not None:
            experiment = experiment.on_device(self._device)
        self._host = Host(
            experiment, None, self._journal.store, self._make_node(experiment)
        )
        self._encoding = (
            Encoding.SPARSE
            if learner_class(experiment.learner.name).sparse
            else Encoding.DENSE
        )
        self._settled = config, run

    def _real_node(self, config: ExperimentConfig) -> Answerer:
        from fedknow.client.data import make_benchmark
        from fedknow.client.node import Node

        if config.data.name == LOCAL:
            if self._data is None:
                raise ConfigError(
                    "this experiment is on the clients' own data: say where they are with --data DIR"
                )
            return Node(config, LocalStream(self._data, config.data))
        # The server's folder means nothing here.
        folder = "" if self._data is None else str(self._data)
        here = config.model_copy(
            update={"data": config.data.model_copy(update={"dir": folder})}
        )
        return Node(here, make_benchmark(here))

    # --- connection
    # -----------------------------------------------------------------------------------------------

    async def _stay_connected(self) -> None:
        while True:
            try:
                goodbye = await self._session()
                if goodbye.finished:
                    log.info("done: %s", goodbye.reason)
                    return
                reason = f"the server says goodbye: {goodbye.reason}"
            except _Refused as refusal_:
                if refusal_.error.code in _FINAL:
                    raise ConfigError(
                        f"{self.server} refuses this client: {refusal_.error.reason}"
                    ) from None
                if refusal_.error.code is Code.REPLACED:
                    raise EdgeError(f"{self.server}: {refusal_.error.reason}") from None
                if (
                    refusal_.error.code is Code.TOO_LARGE and self._done is not None
                ):  # and would be each time
                    self._done = self._done.failed(
                        f"the server does not take the answer: {refusal_.error.reason}"
                    )
                reason = f"refused: {refusal_.error}"
            except (WireError, _Gone) as error:
                if isinstance(error, WireError) and error.code in _FINAL:
                    raise ConfigError(f"{self.server}: {error.reason}") from None
                reason = str(error)
            except grpc.aio.AioRpcError as error:
                why = await asyncio.to_thread(_why, self.server, self._tls, error)
                reason = f"connection to {self.server}: {why}"
            if self._proxy is not None:
                reason = f"{reason}; {self._proxy.hint()}"
            away = time.monotonic() - self._connected_at
            if self._give_up is not None and away >= self._give_up:
                raise EdgeError(
                    f"{self.server}: no connection for {away:.0f} s, which is when to give up: {reason}"
                )
            delay = self._random.uniform(0, self._delay)
            if self._give_up is not None:
                delay = min(delay, self._give_up - away)
            self._delay = min(2 * self._delay, LONGEST_DELAY)
            log.info("%s; reconnecting in %.1f s", reason, delay)
            await asyncio.sleep(delay)

    async def _session(self) -> Goodbye:
        """One connection, from greeting to goodbye."""
        async with self._channel() as channel:
            stream = channel.stream_stream(JOIN)()
            self._job = None
            try:
                return await self._converse(stream)
            finally:
                stream.cancel()

    def _channel(self) -> grpc.aio.Channel:
        options = [*CHANNEL_OPTIONS, *proxy_options(self._proxy)]
        if self._credentials is None:
            return grpc.aio.insecure_channel(self.server, options)
        return grpc.aio.secure_channel(self.server, self._credentials, options)

    async def _converse(self, stream: Any) -> Goodbye:
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                await stream.write(hello(self._claim()))
                frame = parse(_bytes(await stream.read()))
        except TimeoutError:
            raise _Gone(f"{self.server} does not answer") from None
        if frame.WhichOneof("kind") == "refusal":
            raise _Refused(refused(frame.refusal))
        if frame.WhichOneof("kind") != "welcome":
            raise _Gone(f"{self.server} speaks another protocol: no welcome")
        welcome = frame.welcome
        check_version(welcome)
        log.info("connected to %s as client %d", self.server, client_of(welcome.node))
        self._node, self._delay = welcome.node, FIRST_DELAY
        self._problem = None
        try:
            return cast(
                Goodbye,
                await _first(
                    self._read(stream), self._write(stream), self._prepare(welcome)
                ),
            )
        except (_Gone, grpc.aio.AioRpcError):
            if self._problem is None:
                raise
            raise self._problem from None
        finally:
            self._connected_at = time.monotonic()

    def _complain(self, problem: WireError | ConfigError) -> None:
        """Have the server told why this side ends the stream; it then ends, and the problem is raised."""
        self._problem = problem
        self._changed.set()

    def _claim(self) -> int:
        if self._client is not None:
            return node_of(self._client)
        return self._journal.node if self._credentials is None else 0

    async def _prepare(self, welcome: Welcome) -> NoReturn:
        try:
            await self._hand.do(self._settle, welcome.config, welcome.run, welcome.node)
        except ConfigError as error:
            self._complain(error)
        await _forever()

    async def _read(self, stream: Any) -> Goodbye:
        assembler = Assembler()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(SILENCE_SECONDS) as patience:
                while True:
                    data = _bytes(await stream.read())
                    patience.reschedule(loop.time() + SILENCE_SECONDS)
                    if self._problem is not None:
                        continue  # nothing counts any more but the end
                    try:
                        goodbye = self._hear(parse(data), assembler)
                    except WireError as error:
                        self._complain(error)
                    else:
                        if goodbye is not None:
                            with suppress(grpc.aio.AioRpcError):
                                while (
                                    await stream.read() is not grpc.aio.EOF
                                ):  # the server ends the stream, not we
                                    pass
                            return goodbye
        except TimeoutError:
            raise _Gone(
                f"{self.server} was not heard for {SILENCE_SECONDS:.0f} s"
            ) from None

    def _hear(self, frame: Frame, assembler: Assembler) -> Goodbye | None:
        match frame.WhichOneof("kind"):
            case "chunk":
                parcel = assembler.add(frame)
                if parcel is not None:
                    self._take(parcel)
            case "goodbye":
                return frame.goodbye
            case "refusal":
                raise _Refused(refused(frame.refusal))
            case "heartbeat":
                pass
            case kind:
                raise WireError(
                    Code.OUT_OF_ORDER, f"a {kind} frame in the midst of a stream"
                )
        return None

    def _take(self, parcel: Parcel) -> None:
        if parcel.node != self._node:
            raise WireError(
                Code.FOREIGN, f"work for node {parcel.node} came to node {self._node}"
            )
        self._job = _Job(key_of(parcel), parcel)
        self._job_came.set()
        self._changed.set()

    async def _write(self, stream: Any) -> NoReturn:
        try:
            while not self._problem:
                job, done = self._job, self._done
                if job is not None and done is not None and done.answers(job):
                    self._job = None
                    id = job.parcel.id
                    for frame in done.answer.frames(
                        self._node, f"{id}:reply", id, done.version
                    ):
                        await stream.write(frame)
                    continue
                try:
                    async with asyncio.timeout(HEARTBEAT_SECONDS):
                        await self._changed.wait()
                    self._changed.clear()
                except TimeoutError:
                    await stream.write(HEARTBEAT)
            code = (
                self._problem.code
                if isinstance(self._problem, WireError)
                else Code.BAD_VALUE
            )
            await stream.write(refusal(WireError(code, str(self._problem))))
            await stream.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # The stream is over. What the server said at last is still to be read, and says why.
            await _forever()
        await asyncio.sleep(HEARTBEAT_SECONDS)  # the server ends the stream before
        raise _Gone("the server did not end the stream")


class _Hand:
    """One thread that does one thing after the other, and does not keep the process from ending."""

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[
            tuple[concurrent.futures.Future[Any], Callable[[], Any]] | None
        ]
        self._orders = queue.SimpleQueue()
        self.busy = False
        threading.Thread(target=self._run, name="fedknow-work", daemon=True).start()

    async def do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Have a function called in the thread, after those before it; give or raise what it does."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._orders.put((future, lambda: function(*arguments)))
        return await asyncio.wrap_future(future)

    def stop(self) -> None:
        """Let the thread end after what it is doing."""
        self._orders.put(None)

    def _run(self) -> None:
        while (order := self._orders.get()) is not None:
            future, call = order
            if not future.set_running_or_notify_cancel():
                continue
            self.busy = True
            try:
                result = call()
            except BaseException as error:  # whoever waits gets it
                self.busy = False
                future.set_exception(error)
            else:
                self.busy = False
                future.set_result(result)


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
            if (
                signal.getsignal(number) is not signal.SIG_IGN
            ):  # as a shell asks of its background
                asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        await client.run()

    try:
        asyncio.run(main())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def fetch_status(server: str, tls: Path | None = None, timeout: float = 10.0) -> str:
    """Ask a server how its run stands.

    Parameters
    ----------
    server : str
        ``HOST:PORT``.
    tls : Path, optional
        As of :class:`EdgeClient`; any client's will do.
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
            reason = f"{server} does not answer: {_why(server, tls, error)}{hint}"
            raise EdgeError(reason) from None
    return text


def _why(server: str, tls: Path | None, error: grpc.RpcError) -> str:
    """Say why a call failed: with TLS, gRPC only says that there is no connection."""
    if error.code() is grpc.StatusCode.UNAVAILABLE and tls is not None:
        try:
            handshake(server, tls, 5.0)
        except (TlsError, ConfigError) as reason:
            return str(reason)
    return f"{error.code().name}: {error.details()}"


async def _first(*parts: Coroutine[Any, Any, Any]) -> Any:
    """What the first of several coroutines that ends gives or raises; the others are cancelled,
    and waited for."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        # Where several ended at once, the one given first has the say.
        return next(task for task in tasks if task in done).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forever() -> NoReturn:
    await asyncio.get_running_loop().create_future()
    raise AssertionError("nobody sets it")


def _bytes(data: Any) -> bytes:
    if data is grpc.aio.EOF:
        raise _Gone("the server hung up")
    raw: bytes = data
    return raw


def _toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"the server's configuration is not valid TOML: {error}"
        ) from None


def _place(message: Message) -> str:
    config = message.config()
    parts = [f"{key} {config[key]!r}" for key in ("task", "round") if key in config]
    return ", ".join(parts) or "work"


def _size(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e4 else counted(size, "byte")
