"""Real clients: a Flower grid whose messages travel over gRPC, one stream a client."""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import grpc

from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.messages import Message, client_of
from fedknow.protocols.security import Tokens
from fedknow.protocols.transport import HEARTBEAT_SECONDS, LONGEST_DELAY
from fedknow.protocols.wire import Limits
from fedknow.server.grids.base import Answers, MessageGrid
from fedknow.server.grids.grpc_service import Answer, Service
from fedknow.server.grids.grpc_thread import Farewell, ServiceThread
from fedknow.server.grids.grpc_wave import GrpcWave, Piece
from fedknow.server.grids.wave import WaveOptions

__all__ = ["GrpcGrid"]

log = logging.getLogger(__name__)

REMIND_SECONDS = 30.0
"""How often the log names the clients that the run waits for."""


class GrpcGrid(MessageGrid):
    """Clients on other machines, each with a stream to a gRPC server.

    The server runs in a thread of its own.

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
        self.limits = limits or Limits()
        # Ids of this process's messages: an answer to what an earlier one asked for is none to
        # ours.
        self._session = secrets.token_hex(4)
        self.committed: dict[int, int] = {}
        self._has_begun = False
        self._open: GrpcWave | None = None
        self._early: dict[str, tuple[Message, int]] = {}
        self._service = Service(
            self.clients,
            config.to_toml(),
            run or self._session,
            secure=credentials is not None,
            tokens=tokens,
            limits=self.limits,
        )
        try:
            self.server = ServiceThread(self._service, listen, credentials)
        except RuntimeError as error:
            raise ConfigError(f"--listen {listen}: cannot be had: {error}") from None
        self.port = self.server.port

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
        deadline = self._deadline(timeout)
        wave = GrpcWave(self, options)
        wave.add(work)
        try:
            while wave.pieces:
                answer = self._next(deadline, wave)
                if answer is None:
                    self._note_left_out(wave.pieces.values())
                    return
                if settled := wave.settle(answer):
                    yield settled
        finally:
            self.server.withdraw()

    def _deadline(self, timeout: float | None) -> float | None:
        """Return until when a wave waits for answers."""
        limits = [self._engine.round_timeout] if self._engine.round_timeout else []
        if timeout is not None:
            limits.append(timeout)
        return self.clock_time + min(limits) if limits else None

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
        """Collect what clients have sent; see :meth:`Delivery.collect_answers`.

        With ``engine.round_timeout`` a client that takes longer for its work is not waited for
        any more.
        """
        wave = self._open = self._open or GrpcWave(self, options)
        wanted = {message.id for message in work}
        answers = [self._early.pop(id) for id in sorted(wanted & self._early.keys())]
        self._begin_new(work, answers, wave)
        until = None if timeout is None else self.clock_time + timeout
        while not answers and wanted & wave.pieces.keys():
            arrived = self._await_answers(until, wave)
            if arrived is None:
                break
            for reply, version in arrived:
                if reply.reply_to in wanted:
                    answers.append((reply, version))
                else:
                    self._early[reply.reply_to] = (reply, version)
        if not wave.pieces:
            self._open = None
            self.server.withdraw()
        return answers

    def _begin_new(
        self,
        work: Sequence[Message],
        answers: Sequence[tuple[Message, int]],
        wave: GrpcWave,
    ) -> None:
        """Give out the work that is neither answered nor under way."""
        begun = {reply.reply_to for reply, _ in answers} | wave.pieces.keys()
        new = [message for message in work if message.id not in begun]
        if new:
            self._wait()
            wave.add(new)

    def _await_answers(
        self, until: float | None, wave: GrpcWave
    ) -> list[tuple[Message, int]] | None:
        """Wait for the next answer, and take all that have come in meanwhile.

        Returns
        -------
        list of tuple of Message and int, or None
            Answers, or failures of work that is given up. It is empty if what came was late or
            could not be read. None: ``until`` is over.
        """
        longest = self._engine.round_timeout or math.inf
        given_up_at = min(piece.since for piece in wave.pieces.values()) + longest
        deadline = min(given_up_at, math.inf if until is None else until)
        answer = self._next(None if deadline == math.inf else deadline, wave)
        if answer is None:
            overdue = [
                piece
                for piece in wave.pieces.values()
                if piece.since + longest <= self.clock_time
            ]
            if not overdue:
                return None
            self._note_left_out(overdue)
            return [wave.give_up(piece) for piece in overdue]
        settled = []
        while answer is not None:
            if reply := wave.settle(answer):
                settled.append(reply)
            answer = (
                self._next(self.clock_time, wave) if self.server.has_answers else None
            )
        return settled

    def note_unusable(self, reply: Message) -> None:
        """Count an unusable answer: not finite, of another shape, too far."""
        self.server.count("refused")

    def _next(self, deadline: float | None, wave: GrpcWave) -> Answer | None:
        """Wait for the next answer; None when the time is over."""
        while True:
            answer = self.server.next_answer(deadline, REMIND_SECONDS)
            if answer is not None:
                return answer
            if deadline is not None and self.clock_time >= deadline:
                return None
            log.info("waiting for clients %s", _clients(wave.pieces.values()))

    def _note_left_out(self, pieces: Collection[Piece]) -> None:
        self.server.count("left_out", len(pieces))
        log.warning(
            "clients %s did not answer in time and are left out", _clients(pieces)
        )

    # --- who is present

    def get_node_ids(self) -> list[int]:
        """Return the ids of the clients, ascending.

        These are all clients, or with ``engine.round_timeout`` those connected.
        """
        if not self._engine.round_timeout:
            return super().get_node_ids()
        self._wait()
        return self.server.connected()

    def _wait(self) -> None:
        """Wait for the clients without whom no work is given out."""
        needed = self._engine.min_clients or (1 if self._has_begun else self.clients)
        while not self.server.wait_for(needed, REMIND_SECONDS):
            present = [client_of(node) for node in self.server.connected()]
            log.info(
                "%d clients are connected (%s); the run waits for %d",
                len(present),
                present,
                needed,
            )
        self._has_begun = True

    def status(self) -> dict[str, Any]:
        """Describe the run's state; see :meth:`Service.status`."""
        return self._service.status()

    # --- client states

    def restore(
        self,
        versions: Mapping[int, int],
        traffic: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        """Go back to the client states, and the traffic, of a checkpoint."""
        super().restore(versions, traffic)
        self.committed = dict(versions)

    def prune(self) -> None:
        """Tell clients, with their next work, what is in a checkpoint."""
        self.committed = dict(self.versions)

    # --- life

    def next_id(self) -> str:
        """See :meth:`MessageGrid.next_id`."""
        return f"{self._session}.{super().next_id()}"

    def finish(
        self, linger: float = LONGEST_DELAY + HEARTBEAT_SECONDS, everyone: bool = False
    ) -> None:
        """Close, telling clients that nothing follows.

        Parameters
        ----------
        linger : float
            Seconds that clients have to come and hear it, if they were connected before: their
            longest wait and some.
        everyone : bool
            Also if they were never connected.
        """
        self.server.stop(Farewell(True, "the run is over", linger, everyone))

    def close(self) -> None:
        """Stop the server.

        Clients that :meth:`finish` did not tell that the run is over try to come back.
        """
        self.server.stop()


def _clients(pieces: Iterable[Piece]) -> list[int]:
    return sorted({client_of(piece.message.node) for piece in pieces})
