"""A wave of work over gRPC: each client's piece of it, and the answers."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fedknow.protocols.messages import (
    CLIENT_FAILED,
    NO_ANSWER,
    Message,
    client_of,
)
from fedknow.protocols.texts import printable
from fedknow.protocols.transport import CHUNK_BYTES
from fedknow.protocols.wire import (
    Code,
    Encoding,
    Limits,
    Packed,
    Parcel,
    WireError,
    pack,
    unpack,
)
from fedknow.server.checks.faults import RunError
from fedknow.server.grids.grpc_assignments import Answer
from fedknow.server.grids.grpc_link import Work
from fedknow.server.grids.grpc_thread import ServiceThread
from fedknow.server.grids.wave import WaveOptions

__all__ = ["REMIND_SECONDS", "GrpcWave", "Piece"]

log = logging.getLogger(__name__)

REMIND_SECONDS = 30.0
"""How often the log names the clients that the run waits for."""

UNREADABLE_ANSWERS = 3
"""Answers to one piece of work that cannot be read before it fails."""


class WaveGrid(Protocol):
    """The grid that a wave belongs to.

    See :class:`fedknow.server.grids.grpc_grid.GrpcGrid`.
    """

    versions: dict[int, int]
    """Versions of the clients' states."""
    committed: dict[int, int]
    """Versions that are in the last checkpoint."""
    server: ServiceThread
    limits: Limits
    """How much a client may send."""

    def must_begin_anew(
        self,
        reply: Message,
        version: int,
        options: WaveOptions,
    ) -> bool:
        """Return whether a client lost its state and may begin anew."""
        ...


@dataclass(frozen=True, eq=False)
class Piece:
    """A piece of work for one client.

    Attributes
    ----------
    message : Message
    pack : callable
        Serialises the message.
    since : float
        When it was given out, on :func:`time.monotonic`.
    """

    message: Message
    pack: Callable[[Message], Packed]
    since: float


class GrpcWave:
    """Work that is under way: each client has one piece of it at a time.

    The next piece starts from the state after the one before.

    Parameters
    ----------
    grid : WaveGrid
    options : WaveOptions

    Attributes
    ----------
    pieces : dict of str to Piece
        Work that was not answered yet, by message id.
    """

    def __init__(self, grid: WaveGrid, options: WaveOptions) -> None:
        self.pieces: dict[str, Piece] = {}
        self._grid = grid
        self._options = options
        self._queues: dict[int, deque[Piece]] = {}
        self._unreadable: dict[str, int] = {}

    def add(self, work: Sequence[Message]) -> None:
        """Give out work."""
        pack = _Packer(
            Encoding.SPARSE if self._options.is_sparse else Encoding.DENSE
        )
        idle = []
        for message in work:
            waiting = self._queues.setdefault(message.node, deque())
            if not waiting:
                # Its first piece is given out now, the others when it has answered.
                idle.append(message.node)
            piece = Piece(message, pack, time.monotonic())
            self.pieces[message.id] = piece
            # A client does one thing at a time, so further work of its waits here.
            waiting.append(piece)
        versions = self._grid.versions
        next_works = [
            self._work(node, versions.get(client_of(node), 0)) for node in idle
        ]
        self._grid.server.assign(next_works, _progress(work))

    def settle(self, answer: Answer) -> tuple[Message, int] | None:
        """Take an answer in, and give its client the next piece of work.

        Returns
        -------
        tuple of Message and int, or None
            The reply, and the version of the client's state after it. None: the answer is late,
            or the work is to be done again.
        """
        node = answer.work.node
        waiting = self._queues.get(node)
        # It was given up meanwhile, or answers an earlier piece.
        if not waiting or waiting[0].message.id != answer.work.id:
            self._grid.server.count("late")
            return None
        message = waiting[0].message
        read = self._read_or_fail(answer, message)
        if read is None:
            return None
        reply, version = read
        # The state that it was to start from is gone: the same work again, from none.
        if self._grid.must_begin_anew(reply, answer.work.version, self._options):
            self._grid.server.assign([self._work(node, 0)])
            return None
        waiting.popleft()
        del self.pieces[message.id]
        if waiting:
            self._grid.server.assign([self._work(node, version)])
        return reply, version

    def leave_out(self, node: int) -> list[tuple[Message, int]]:
        """Give up all work of a client that is out of the run."""
        pieces = list(self._queues.get(node, ()))
        if pieces:
            self.note_left_out(pieces)
        # From the last one: what is under way goes last, and none takes its place.
        return [self.give_up(piece) for piece in reversed(pieces)]

    # --- waiting

    def next_answer(self, deadline: float | None) -> Answer | None:
        """Wait for the next answer; None when the time is over."""
        while True:
            answer = self._grid.server.next_answer(deadline, REMIND_SECONDS)
            if answer is not None:
                return answer
            if deadline is not None and time.monotonic() >= deadline:
                return None
            log.info("waiting for clients %s", _clients(self.pieces.values()))

    def await_answers(
        self, until: float | None, longest: float
    ) -> list[tuple[Message, int]] | None:
        """Wait for the next answer, and take all that have come in meanwhile.

        Parameters
        ----------
        until : float or None
            When to stop waiting, on :func:`time.monotonic`.
        longest : float
            Seconds that a client has for a piece of work.

        Returns
        -------
        list of tuple of Message and int, or None
            Answers, or failures of work that is given up. It is empty if what came was late or
            could not be read. None: ``until`` is over.
        """
        # Work that waits longest is the next to be given up.
        given_up_at = min(piece.since for piece in self.pieces.values()) + longest
        deadline = min(given_up_at, math.inf if until is None else until)
        answer = self.next_answer(None if deadline == math.inf else deadline)
        if answer is None:
            return self._give_up_overdue(longest)
        replies = []
        while answer is not None:
            if answer.parcel is None:
                replies += self.leave_out(answer.work.node)
            elif reply := self.settle(answer):
                replies.append(reply)
            # More than one answer may lie ready; none is waited for.
            is_ready = self._grid.server.has_answers
            answer = self.next_answer(time.monotonic()) if is_ready else None
        return replies

    def note_left_out(self, pieces: Collection[Piece]) -> None:
        """Count and log work that is not waited for any more."""
        self._grid.server.count("left_out", len(pieces))
        log.warning(
            "clients %s did not answer in time and are left out", _clients(pieces)
        )

    def _give_up_overdue(
        self, longest: float
    ) -> list[tuple[Message, int]] | None:
        """Give up the work that takes too long; None if none does."""
        # The same sum as for the deadline: a difference could round to another moment.
        time_now = time.monotonic()
        overdue = [
            piece
            for piece in self.pieces.values()
            if piece.since + longest <= time_now
        ]
        if not overdue:
            return None
        self.note_left_out(overdue)
        return [self.give_up(piece) for piece in overdue]

    def give_up(self, piece: Piece) -> tuple[Message, int]:
        """Wait no longer for a client; an answer that it sends now is late."""
        message = piece.message
        del self.pieces[message.id]
        waiting = self._queues[message.node]
        version = self._grid.versions.get(client_of(message.node), 0)
        is_under_way = waiting[0] is piece
        waiting.remove(piece)
        if is_under_way:
            # Else the client would be sent it again when it comes back.
            self._grid.server.drop(message.node)
            if waiting:
                self._grid.server.assign([self._work(message.node, version)])
        return message.fail(NO_ANSWER, "no answer in time"), version

    def _read_or_fail(
        self, answer: Answer, message: Message
    ) -> tuple[Message, int] | None:
        """Read an answer.

        Returns
        -------
        tuple of Message and int, or None
            The reply, or a failure in its place, with the state's version. None: it cannot be
            read, and the work is to be done again.
        """
        assert answer.parcel is not None  # else there is nothing to settle
        try:
            reply = self._read(answer.parcel, message)
            return reply, answer.parcel.version
        except WireError as error:
            # Bytes may have been damaged on the way: the same work is worth another try.
            times = self._unreadable.get(message.id, 0) + 1
            self._unreadable[message.id] = times
            self._grid.server.reject(answer.work, error)
            if times < UNREADABLE_ANSWERS:
                return None
            reason = f"its answer could not be read {UNREADABLE_ANSWERS} times: {error}"
            return message.fail(CLIENT_FAILED, reason), answer.work.version

    def _read(self, parcel: Parcel, message: Message) -> Message:
        reply = unpack(parcel, self._grid.limits)
        # Its records would be read as those of other work.
        if reply.kind != message.kind:
            raise WireError(
                Code.MALFORMED,
                f"a {reply.kind!r} answer to {message.kind!r} work",
            )
        failure = reply.failure
        if failure is not None:
            # The text goes into logs, events and reports of this side.
            failure = replace(failure, reason=printable(failure.reason))
        return replace(
            reply, id=f"{message.id}:reply", group=message.group, failure=failure
        )

    def _work(self, node: int, version: int) -> Work:
        piece = self._queues[node][0]
        committed = self._grid.committed.get(client_of(node), 0)
        packed = piece.pack(piece.message)
        return Work(piece.message.id, node, packed, version, committed)


class _Packer:
    """Serialises the messages of a wave, those of the same content once."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._packed: dict[tuple[Any, ...], Packed] = {}

    def __call__(self, message: Message) -> Packed:
        # Records are kept alive by the wave's messages, so an identity stays its own.
        records = tuple(
            (name, id(record)) for name, record in message.content.items()
        )
        # All that is serialised but receiver and id, which stand in the first frame alone.
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


def _clients(pieces: Iterable[Piece]) -> list[int]:
    return sorted({client_of(piece.message.node) for piece in pieces})


def _progress(work: Sequence[Message]) -> Mapping[str, Any]:
    """Describe a wave for the server's status."""
    if not work:
        return {}
    config = work[0].config()
    keys = ("task", "round", "server-round")
    position = {key: config[key] for key in keys if key in config}
    return {
        "kind": work[0].kind,
        **position,
        "messages": len(work),
        "since": round(time.time(), 1),
    }
