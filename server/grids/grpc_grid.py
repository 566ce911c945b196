"""Real clients: a grid whose messages travel over gRPC."""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import grpc

from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.messages import Message
from fedknow.protocols.transport import HEARTBEAT_SECONDS, LONGEST_DELAY
from fedknow.protocols.wire import Limits
from fedknow.server.grids.activity import Change, Listener
from fedknow.server.grids.base import Answers, MessageGrid
from fedknow.server.grids.grpc_assignments import Assignments
from fedknow.server.grids.grpc_gate import Gate, Roster
from fedknow.server.grids.grpc_membership import Membership
from fedknow.server.grids.grpc_service import Service
from fedknow.server.grids.grpc_thread import ServiceThread
from fedknow.server.grids.grpc_wave import REMIND_SECONDS, GrpcWave
from fedknow.server.grids.grpc_words import Farewell, Invitation
from fedknow.server.grids.wave import WaveOptions

__all__ = ["GrpcGrid"]

log = logging.getLogger(__name__)


class GrpcGrid(MessageGrid):
    """Clients on other machines, each with a stream to a gRPC server.

    The server runs in a thread of its own. Records that messages of a wave share are serialised
    once.

    A client that drops comes back as itself and is sent its work again; its answer counts once.
    It keeps its state by version, from the one in the last checkpoint on
    (:class:`fedknow.client.edge.journal.Journal`). A resumed run asks it to go back, so the
    numbers are those of an undisturbed run.

    Work is given out when ``engine.min_clients`` are connected; see there. Without
    ``engine.round_timeout`` all clients are the grid's nodes, and are waited for. With it a wave
    goes on without those that have not answered by then. Only connected clients are then the
    grid's nodes, late ones from the next wave on.

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
    membership : Membership, optional
        Who may take part; by default whoever has a certificate of the run's CA.
    signature : bytes
        Of the experiment, by its owner.
    limits : Limits, optional
        How much a client may send.
    listener : Listener, optional
        Hears of work, and of clients that come and go.

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

    def __init__(  # noqa: PLR0913 - settings of a public class
        self,
        config: ExperimentConfig,
        listen: str,
        run: str = "",
        *,
        credentials: grpc.ServerCredentials | None = None,
        membership: Membership | None = None,
        signature: bytes = b"",
        limits: Limits | None = None,
        listener: Listener | None = None,
    ) -> None:
        super().__init__(config.data.clients, listener=listener)
        if config.engine.min_clients > self.clients:
            raise ConfigError(
                f"engine.min_clients = {config.engine.min_clients}: more than "
                f"data.clients = {self.clients}"
            )
        self._engine = config.engine
        self.limits = limits or Limits()
        # A part of each message's id: an answer to an earlier process is none to this one.
        self._session = secrets.token_hex(4)
        self.committed: dict[int, int] = {}
        self._has_begun = False
        self._open: GrpcWave | None = None
        self._early: dict[str, tuple[Message, int]] = {}

        self._roster = roster = Roster(self.clients, self._listener.presence)
        # Before the server begins, whose thread tells of those that come.
        self._listener.presence(roster.absent())
        self._membership = membership = membership or Membership()
        gate = Gate(roster, credentials is not None, membership)
        text = config.for_clients().to_toml()
        guide = Invitation(text, run or self._session, signature)
        assignments = Assignments(roster, membership)
        self._service = Service(assignments, gate, guide, self.limits)
        try:
            self.server = ServiceThread(self._service, listen, credentials)
        except RuntimeError as error:
            reason = f"--listen {listen}: cannot be had: {error}"
            raise ConfigError(reason) from None
        self.port = self.server.port

    # --- the work

    def deliver(
        self, work: Sequence[Message], timeout: float | None, options: WaveOptions
    ) -> Answers:
        """Have clients do the work; see :meth:`Delivery.deliver`.

        An answer that cannot be read ends its sender's stream. The work is sent again when the
        client is back, three times.

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
        deadline = _deadline(self._engine.round_timeout, timeout)
        wave = GrpcWave(self, options)
        wave.add(work)
        try:
            while wave.pieces:
                answer = wave.next_answer(deadline)
                if answer is None:
                    wave.note_left_out(wave.pieces.values())
                    return
                if answer.parcel is None:
                    wave.leave_out(answer.work.node)
                elif reply := wave.settle(answer):
                    yield reply
        finally:
            self.server.withdraw()

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
        """Collect the answers so far; see :meth:`Delivery.collect_answers`.

        With ``engine.round_timeout`` a client that takes longer for its work is not waited for
        any more.
        """
        wave = self._open = self._open or GrpcWave(self, options)
        wanted_ids = {message.id for message in work}
        early_ids = sorted(wanted_ids & self._early.keys())
        answers = [self._early.pop(id) for id in early_ids]
        if new := _new_work(work, answers, wave):
            self._wait()
            wave.add(new)
        until = None if timeout is None else self.clock_time + timeout
        longest = self._engine.round_timeout or math.inf
        while not answers and wanted_ids & wave.pieces.keys():
            arrived = wave.await_answers(until, longest)
            if arrived is None:
                break
            # Others were pushed too, and are pulled later.
            answers, later = _split(arrived, wanted_ids)
            self._early |= {answer[0].reply_to: answer for answer in later}
        if not wave.pieces:
            self._open = None
            self.server.withdraw()
        return answers

    def note_unusable(self, reply: Message) -> None:
        """Count an unusable answer: not finite, of another shape, too far."""
        self.server.count("refused")

    # --- presence

    def get_node_ids(self) -> list[int]:
        """Return the ids of the clients, ascending.

        These are all that are in the run, or with ``engine.round_timeout`` those connected.
        """
        if self._engine.round_timeout:
            self._wait()
            return self.server.connected()
        return self._membership.pick_members(super().get_node_ids())

    def absent(self) -> list[int]:
        """Return the clients that are not connected, ascending."""
        return self._roster.absent()

    def _wait(self) -> None:
        """Wait for the clients without whom no work is given out."""
        quorum = self._engine.min_clients
        if not quorum:
            # All begin together; later the run goes on with those that are left.
            everyone = self.clients - len(self._membership.ejected)
            quorum = 1 if self._has_begun else everyone
        self.server.gather(quorum, REMIND_SECONDS)
        self._has_begun = True

    def news(self) -> list[Change]:
        """Take the changes of membership since the last call."""
        return self._membership.take_news()

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
        # A copy: the versions go on with the next round, the checkpoint does not.
        self.committed = dict(self.versions)

    # --- life

    def next_id(self) -> str:
        """See :meth:`MessageGrid.next_id`."""
        return f"{self._session}.{super().next_id()}"

    def finish(
        self,
        linger: float = LONGEST_DELAY + HEARTBEAT_SECONDS,
        everyone: bool = False,
    ) -> None:
        """Close, and tell clients that nothing follows.

        Parameters
        ----------
        linger : float
            Seconds that absent clients have to come and hear it: their longest wait and some.
        everyone : bool
            Also if they were never connected.
        """
        self.server.stop(Farewell(True, "the run is over", linger, everyone))

    def close(self) -> None:
        """Stop the server; clients not told that the run is over come back."""
        self.server.stop()


def _new_work(
    work: Sequence[Message],
    answers: Sequence[tuple[Message, int]],
    wave: GrpcWave,
) -> list[Message]:
    """Pick the work that is neither answered nor under way."""
    known_ids = {reply.reply_to for reply, _ in answers} | wave.pieces.keys()
    return [message for message in work if message.id not in known_ids]


def _split(
    answers: Sequence[tuple[Message, int]], wanted_ids: Collection[str]
) -> tuple[list[tuple[Message, int]], list[tuple[Message, int]]]:
    """Part answers into those to some work and those to other work."""
    wanted_answers: list[tuple[Message, int]] = []
    later: list[tuple[Message, int]] = []
    for answer in answers:
        is_wanted = answer[0].reply_to in wanted_ids
        (wanted_answers if is_wanted else later).append(answer)
    return wanted_answers, later


def _deadline(round_timeout: float, timeout: float | None) -> float | None:
    """Return until when a wave waits for answers, on ``time.monotonic``."""
    limits = [round_timeout] if round_timeout else []
    if timeout is not None:
        limits.append(timeout)
    return time.monotonic() + min(limits) if limits else None
