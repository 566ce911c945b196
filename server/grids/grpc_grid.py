"""Real clients: a Flower grid whose messages travel over gRPC, one stream a client."""

from __future__ import annotations

import asyncio
import logging
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import grpc

from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.messages import CLIENT_FAILED, NO_ANSWER, Message, client_of
from fedknow.protocols.security import Tokens
from fedknow.protocols.transport import CHUNK_BYTES, HEARTBEAT_SECONDS, LONGEST_DELAY
from fedknow.protocols.wire import (
    Code,
    Encoding,
    Limits,
    Packed,
    WireError,
    pack,
    unpack,
)
from fedknow.server.checks.faults import RunError
from fedknow.server.grids.base import Answers, MessageGrid
from fedknow.server.grids.grpc_service import Answer, Service, Work
from fedknow.server.grids.wave import WaveOptions

__all__ = ["GrpcGrid"]

log = logging.getLogger(__name__)

PATIENCE = 3
"""Answers to one piece of work that cannot be read before it fails."""
REMIND_SECONDS = 30.0
"""How often the log says who is waited for."""


class GrpcGrid(MessageGrid):
    """Clients on other machines, each with a stream to the gRPC server that this grid runs in a
    thread of its own.

    What messages of a wave share is serialised once. A client that drops comes back as itself
    and is sent its work again; its answer counts once. It keeps its state by version, from the
    one in the last checkpoint on (:class:`fedknow.client.edge.journal.Journal`), so a run that
    is resumed asks it to go back, and the numbers are those of a run that nothing happened to.

    Work is given out when ``engine.min_clients`` are connected; see there. With
    ``engine.round_timeout`` a wave goes on without those that have not answered by then, and
    only connected clients are counted as the grid's nodes, late ones from the next wave on.
    Without, all clients are its nodes, and are waited for.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment, which clients are given.
    listen : str
        ``HOST:PORT``; port 0 is one of the system's choice.
    run : str
        The run's id; a resumed run has the same.
    credentials : grpc.ServerCredentials, optional
        Without, clients are believed who they are and all travels in the clear.
    tokens : Tokens, optional
        Clients prove who they are by these instead of certificates.
    limits : Limits, optional
        What a client may send.

    Attributes
    ----------
    port : int
        Where it listens.

    Raises
    ------
    ConfigError
        If the address cannot be had, or ``engine.min_clients`` is more than there are.
    """

    is_timed = True

    def __init__(
        self,
        config: ExperimentConfig,
        listen: str,
        run: str = "",
        *,
        credentials: grpc.ServerCredentials | None = None,
        tokens: Tokens | None = None,
        limits: Limits | None = None,
    ) -> None:
        super().__init__(config.data.clients)
        if config.engine.min_clients > self.clients:
            raise ConfigError(
                f"engine.min_clients = {config.engine.min_clients}: more than data.clients = {self.clients}"
            )
        self._engine = config.engine
        self._limits = limits or Limits()
        # Ids of this process's messages: an answer to what an earlier one asked for is none to
        # ours.
        self._session = secrets.token_hex(4)
        self._committed: dict[int, int] = {}
        self._begun = False
        self._open: _Wave | None = None
        self._early: dict[str, tuple[Message, int]] = {}
        self._service = Service(
            self.clients,
            config.to_toml(),
            run or self._session,
            secure=credentials is not None,
            tokens=tokens,
            limits=self._limits,
        )
        self._farewell = False, "the server stops", 0.0, False
        self._loop = asyncio.new_event_loop()
        started: Future[int] = Future()
        self._thread = threading.Thread(
            target=self._serve,
            args=(listen, credentials, started),
            name="fedknow-grpc",
            daemon=True,
        )
        self._thread.start()
        try:
            self.port = started.result()
        except RuntimeError as error:
            raise ConfigError(f"--listen {listen}: cannot be had: {error}") from None

    # --- the work
    # -------------------------------------------------------------------------------------------------

    def deliver(
        self, work: Sequence[Message], timeout: float | None, options: WaveOptions
    ) -> Answers:
        """Have clients do the work; see :meth:`Delivery.deliver`.

        An answer that cannot be read ends its sender's stream; the work is sent again when it
        is back, three times.

        Raises
        ------
        RunError
            If the work is more than a client takes in one message.
        RuntimeError
            If the gRPC server has broken down.
        """
        if not work:
            return
        if self._open is not None:
            raise RuntimeError(
                "work that was pushed is under way: pull its answers before other work is sent"
            )
        self._wait()
        limits = [
            seconds
            for seconds in (timeout, self._engine.round_timeout or None)
            if seconds is not None
        ]
        deadline = time.monotonic() + min(limits) if limits else None
        wave = _Wave(self, options)
        wave.add(work)
        try:
            while wave.pieces:
                answer = self._next(deadline, wave)
                if answer is None:
                    self._left_out(wave.pieces.values())
                    return
                if settled := wave.settle(answer):
                    yield settled
        finally:
            self._call(self._service.withdraw)

    @property
    def clock_time(self) -> float:
        """Seconds by this machine's clock."""
        return time.monotonic()

    @property
    def is_occupied(self) -> bool:
        """Whether pushed work is under way: a client does one thing at a time."""
        return self._open is not None

    def collect_answers(
        self, work: Sequence[Message], timeout: float | None, options: WaveOptions
    ) -> Sequence[tuple[Message, int]]:
        """What clients have sent by now; see :meth:`Delivery.collect_answers`.

        With ``engine.round_timeout`` a client that takes longer for its work is not waited for
        any more.
        """
        wave = self._open = self._open or _Wave(self, options)
        asked = {message.id for message in work}
        found = [self._early.pop(id) for id in sorted(asked & self._early.keys())]
        done = {reply.reply_to for reply, _ in found}
        if new := [
            message for message in work if message.id not in done | wave.pieces.keys()
        ]:
            self._wait()
            wave.add(new)
        until = None if timeout is None else self.clock_time + timeout
        while not found and asked & wave.pieces.keys():
            longest = self._engine.round_timeout or None
            over = (
                None
                if longest is None
                else min(piece.since for piece in wave.pieces.values()) + longest
            )
            answer = self._next(
                min((end for end in (until, over) if end is not None), default=None),
                wave,
            )
            if answer is None:
                late = [
                    piece
                    for piece in wave.pieces.values()
                    if longest and piece.since + longest <= self.clock_time
                ]
                if not late:
                    break
                self._left_out(late)
                found = [wave.give_up(piece) for piece in late]
            while answer is not None:  # and all that has come in meanwhile
                if settled := wave.settle(answer):
                    found.append(settled)
                answer = (
                    None
                    if self._service.answers.empty()
                    else self._next(self.clock_time, wave)
                )
            self._early |= {
                entry[0].reply_to: entry
                for entry in found
                if entry[0].reply_to not in asked
            }
            found = [entry for entry in found if entry[0].reply_to in asked]
        if not wave.pieces:
            self._open = None
            self._call(self._service.withdraw)
        return found

    def note_unusable(self, reply: Message) -> None:
        """Count an answer that could be read but not used: not finite, of another shape, absurdly far."""
        self._call(self._service.count, "refused")

    def _next(self, deadline: float | None, wave: _Wave) -> Answer | None:
        """The next answer, or ``None`` when the time is over."""
        while True:
            until = (
                REMIND_SECONDS
                if deadline is None
                else min(REMIND_SECONDS, deadline - time.monotonic())
            )
            try:
                answer = self._service.answers.get(timeout=max(0.0, until))
            except queue.Empty:
                if deadline is not None and time.monotonic() >= deadline:
                    return None
                log.info("waiting for clients %s", _clients(wave.pieces.values()))
                continue
            if isinstance(answer, Exception):
                raise RuntimeError("the gRPC server has broken down") from answer
            return answer

    def _left_out(self, pieces: Collection[_Piece]) -> None:
        self._call(self._service.count, "left_out", len(pieces))
        log.warning(
            "clients %s did not answer in time and are left out", _clients(pieces)
        )

    def _read(self, answer: Answer, message: Message) -> Message:
        reply = unpack(answer.parcel, self._limits)
        if reply.kind != message.kind:
            raise WireError(
                Code.MALFORMED, f"a {reply.kind!r} answer to {message.kind!r} work"
            )
        return replace(reply, id=f"{message.id}:reply", group=message.group)

    # --- who is there
    # ---------------------------------------------------------------------------------------------

    def get_node_ids(self) -> list[int]:
        """Ids of the clients, ascending: all, or with ``engine.round_timeout`` those connected."""
        if not self._engine.round_timeout:
            return super().get_node_ids()
        self._wait()
        return self._service.connected()

    def _wait(self) -> None:
        """Wait for the clients without whom no work is given out."""
        needed = self._engine.min_clients or (1 if self._begun else self.clients)
        while not self._service.wait_for(needed, REMIND_SECONDS):
            there = [client_of(node) for node in self._service.connected()]
            log.info(
                "%d clients are connected (%s); the run waits for %d",
                len(there),
                there,
                needed,
            )
        self._begun = True

    def status(self) -> dict[str, Any]:
        """How the run stands: see :meth:`fedknow.server.grids.grpc_service.Service.status`."""
        return self._service.status()

    # --- client states
    # --------------------------------------------------------------------------------------------

    def restore(
        self,
        versions: Mapping[int, int],
        traffic: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        """Go back to the client states, and the traffic, of a checkpoint."""
        super().restore(versions, traffic)
        self._committed = dict(versions)

    def prune(self) -> None:
        """Tell clients, with their next work, that the present states are in a checkpoint."""
        self._committed = dict(self.versions)

    # --- life
    # -----------------------------------------------------------------------------------------------------

    def finish(
        self, linger: float = LONGEST_DELAY + HEARTBEAT_SECONDS, everyone: bool = False
    ) -> None:
        """Close, telling clients that nothing follows.

        Parameters
        ----------
        linger : float
            Seconds that clients have to come and hear it, if they were here and are away: their
            longest wait and some.
        everyone : bool
            Also if they were never here.
        """
        self._farewell = True, "the run is over", linger, everyone
        self.close()

    def close(self) -> None:
        """Stop the server; clients that were not told by :meth:`finish` that the run is over try
        to come back."""
        if self._thread.is_alive():
            self._call(self._ended.set)
            self._thread.join()

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(function, *arguments)

    def next_id(self) -> str:
        """See :meth:`MessageGrid.next_id`."""
        return f"{self._session}.{super().next_id()}"

    def _serve(
        self,
        listen: str,
        credentials: grpc.ServerCredentials | None,
        started: Future[int],
    ) -> None:
        """The thread of the server."""

        async def main() -> None:
            self._ended = asyncio.Event()
            try:
                port = await self._service.start(listen, credentials)
            except RuntimeError as error:
                started.set_exception(error)
                return
            started.set_result(port)
            await self._ended.wait()
            await self._service.stop(*self._farewell)

        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(main())
        except Exception as error:  # whoever waits for answers must hear of it
            log.exception("the gRPC server has broken down")
            self._service.answers.put(error)
            if not started.done():
                started.set_exception(error)


@dataclass(frozen=True, eq=False)
class _Piece:
    """A piece of work for one client."""

    message: Message
    pack: Callable[[Message], Packed]
    since: float


class _Wave:
    """Work that is under way: each client has one piece of it at a time, and the next from the
    state that one left.

    Attributes
    ----------
    pieces : dict of str to _Piece
        What was not answered yet, by message id.
    """

    def __init__(self, grid: GrpcGrid, options: WaveOptions) -> None:
        self.pieces: dict[str, _Piece] = {}
        self._grid = grid
        self._options = options
        self._queues: dict[int, deque[_Piece]] = {}
        self._faults: dict[str, int] = {}

    def add(self, work: Sequence[Message]) -> None:
        """Give out work."""
        pack = _Packer(Encoding.SPARSE if self._options.is_sparse else Encoding.DENSE)
        idle = []
        for message in work:
            waiting = self._queues.setdefault(message.node, deque())
            if not waiting:
                idle.append(message.node)
            piece = self.pieces[message.id] = _Piece(message, pack, time.monotonic())
            waiting.append(piece)
        versions = self._grid.versions
        first = [self._work(node, versions.get(client_of(node), 0)) for node in idle]
        self._grid._call(self._grid._service.assign, first, _progress(work))

    def settle(self, answer: Answer) -> tuple[Message, int] | None:
        """What an answer comes to, and the version after it; None if it is late, or the work is to
        be done again."""
        grid, node, asked = (
            self._grid,
            answer.work.node,
            self._queues.get(answer.work.node),
        )
        if not asked or asked[0].message.id != answer.work.id:
            grid._call(grid._service.count, "late")
            return None
        message = asked[0].message
        try:
            reply, version = grid._read(answer, message), answer.parcel.version
        except WireError as error:
            self._faults[message.id] = self._faults.get(message.id, 0) + 1
            grid._call(grid._service.reject, answer.work, error)
            if self._faults[message.id] < PATIENCE:
                return None
            reason = f"its answer could not be read {PATIENCE} times: {error}"
            reply, version = message.fail(CLIENT_FAILED, reason), answer.work.version
        if grid.must_begin_anew(reply, answer.work.version, self._options):
            grid._call(grid._service.assign, [self._work(node, 0)])
            return None
        asked.popleft()
        del self.pieces[message.id]
        if asked:
            grid._call(grid._service.assign, [self._work(node, version)])
        return reply, version

    def give_up(self, piece: _Piece) -> tuple[Message, int]:
        """Wait no longer for a client; what it sends now is late."""
        grid, message = self._grid, piece.message
        del self.pieces[message.id]
        waiting, version = (
            self._queues[message.node],
            grid.versions.get(client_of(message.node), 0),
        )
        had = waiting[0] is piece
        waiting.remove(piece)
        if had:
            grid._call(grid._service.drop, message.node)
            if waiting:
                grid._call(grid._service.assign, [self._work(message.node, version)])
        return message.fail(NO_ANSWER, "no answer in time"), version

    def _work(self, node: int, version: int) -> Work:
        piece, committed = (
            self._queues[node][0],
            self._grid._committed.get(client_of(node), 0),
        )
        return Work(
            piece.message.id, node, piece.pack(piece.message), version, committed
        )


class _Packer:
    """Serialises the messages of a wave, those of the same content once."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._packed: dict[tuple[Any, ...], Packed] = {}

    def __call__(self, message: Message) -> Packed:
        # Records are kept alive by the wave's messages, so an identity stays its own.
        records = tuple((name, id(record)) for name, record in message.content.items())
        key = message.kind, message.group, records
        if key not in self._packed:
            try:
                self._packed[key] = pack(
                    message, self._encoding, chunk_bytes=CHUNK_BYTES
                )
            except WireError as error:
                raise RunError(
                    f"the {message.kind} work for client {client_of(message.node)}: {error}"
                ) from None
        return self._packed[key]


def _progress(work: Sequence[Message]) -> dict[str, Any]:
    """What the status tells of a wave."""
    if not work:
        return {}
    config = work[0].config()
    about = {
        key: config[key] for key in ("task", "round", "server-round") if key in config
    }
    return {
        "kind": work[0].kind,
        **about,
        "messages": len(work),
        "since": round(time.time(), 1),
    }


def _clients(pieces: Iterable[_Piece]) -> list[int]:
    return sorted({client_of(piece.message.node) for piece in pieces})
