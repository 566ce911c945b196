"""A grid whose clients have devices and links.

The work is done for real, and its answers arrive in virtual time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flwr.app import Message as FlowerMessage
from flwr.app import MessageType

from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.messages import Message, client_of, node_of
from fedknow.protocols.seeds import integer
from fedknow.protocols.texts import counted
from fedknow.server.checks.faults import RunError
from fedknow.server.grids.activity import Listener
from fedknow.server.grids.base import Answers, MessageGrid
from fedknow.server.grids.wave import WaveOptions
from fedknow.simulations.fleet.accounts import Accounts
from fedknow.simulations.fleet.availability import Always
from fedknow.simulations.fleet.build import Fleet
from fedknow.simulations.fleet.clock import Clock, Timing
from fedknow.simulations.fleet.pieces import (
    Chance,
    FleetWave,
    Piece,
    can_fail,
    draw_chances,
    make_piece,
)

__all__ = ["FleetGrid"]

CHANGES_OF_PRESENCE = 100_000
"""How often clients may come and go while the server waits for enough of them at once."""


class FleetGrid(MessageGrid):
    """Clients on imagined devices, in front of a grid that does their work.

    What an answer says it cost, and the bytes of request and answer, say when it arrives;
    whether it does is up to the device's memory, the deadline and chance. Nothing of this
    depends on real time or on the order in which the work is done for real, so neither on
    workers. Our own scoring is measurement: it takes no virtual time, and everybody is scored.

    A wave of work begins at one moment. It ends when all have answered, when the deadline is
    over, or with ``over_commit`` when as many have answered as were wanted; who has not
    answered then is told to stop. Telling clients that a task is over has no deadline, and no
    answer to it is lost.

    Parameters
    ----------
    inner : MessageGrid
        Has the work done.
    config : ExperimentConfig
    fleet : Fleet
    quorum : int
        Clients that must be there at once before any is given out; the clock goes on until they
        are.
    """

    is_timed = True

    def __init__(
        self,
        inner: MessageGrid,
        config: ExperimentConfig,
        fleet: Fleet,
        quorum: int = 1,
    ) -> None:
        # The same store and the same dictionary of versions as the inner grid's.
        super().__init__(inner.clients, inner.store, inner.versions)
        self.inner = inner
        self.settings = config.fleet
        self.devices = fleet
        self._seed = config.seed
        self._quorum = quorum
        self._clock = Clock(fleet.links, fleet.presence)
        self._accounts = Accounts(fleet)
        self._waves = 0
        self._spare: set[str] = set()
        self._at_work: dict[str, Piece] = {}
        self._known: set[str] = set()
        self._early: list[tuple[Message, int]] = []

    # --- waves
    # ----------------------------------------------------------------------------------------------------

    def deliver(
        self, work: Sequence[Message], timeout: float | None, options: WaveOptions
    ) -> Answers:
        """Have the work done and give the answers that arrive in time.

        See :meth:`Delivery.deliver`.

        Parameters
        ----------
        work, options
            See there.
        timeout : float or None
            Virtual seconds; ``fleet.deadline`` counts too.
        """
        if options.is_measurement:
            yield from self._perform(work, options)
            return
        self._begin(list(self._pushed.values()), options)
        wave = FleetWave(self._due(work, timeout), self._chances(), options.is_sparse)
        # Else all answers that are not lost will arrive, and need not be kept until then.
        is_held_back = bool(options.enough) or wave.due < math.inf
        requests = {message.id: message for message in work}
        pieces: dict[str, Piece] = {}
        for reply, version in self._perform(work, options):
            request = requests[reply.reply_to]
            piece = pieces[reply.reply_to] = self._piece(
                request, (reply, version), wave
            )
            if not is_held_back and not piece.job.lost:
                yield piece.reply, version
                pieces[reply.reply_to] = replace(
                    piece, reply=replace(piece.reply, content={})
                )
        # In the order given, however workers came to it: the clock depends on it.
        arrived = self._wave([pieces[message.id] for message in work], options.enough)
        if is_held_back:
            for piece in arrived:
                yield piece.reply, piece.version

    def _perform(self, work: Sequence[Message], options: WaveOptions) -> Answers:
        """Have the work done for real; who begins anew takes no virtual time for that."""
        return self.inner.perform(work, None, options)

    def _wave(self, pieces: Sequence[Piece], enough: int) -> list[Piece]:
        """Have the clock go on until a wave is over; return the pieces that arrived."""
        for piece in pieces:
            self._give(piece)
        remaining = {piece.job.id for piece in pieces}
        arrived: list[Piece] = []
        good = 0
        self._spare = set()
        while remaining and (timing := self._clock.step()):
            piece, has_arrived = self._close(timing)
            if timing.job.id not in remaining:
                # It was pushed before, and is to be pulled.
                self._early.append(_answer(piece, has_arrived))
                continue
            remaining.discard(timing.job.id)
            if has_arrived:
                arrived.append(piece)
                good += piece.reply.failure is None
            if enough and good == enough:
                self._spare = remaining
                remaining = set()
                # Sorted: the clock depends on the order in which work is given up.
                for late in self._clock.drop(sorted(self._spare)):
                    self._close(late)
            if not remaining:
                self._charge(timing)
        return arrived

    def _missed(
        self, work: Sequence[Message], answered: Collection[str]
    ) -> list[Message]:
        """See :meth:`MessageGrid._missed`; who was beaten by others is not missed."""
        missed = super()._missed(work, answered)
        return [message for message in missed if message.id not in self._spare]

    # --- pushed work
    # ----------------------------------------------------------------------------------------------

    @property
    def clock_time(self) -> float:
        """Virtual seconds since the run began."""
        return self._clock.now

    def wait(self, until: float) -> None:
        """See :meth:`MessageGrid.wait`."""
        self._clock.wait(until)

    def collect_answers(
        self, work: Sequence[Message], timeout: float | None, options: WaveOptions
    ) -> Sequence[tuple[Message, int]]:
        """Collect the first answer to arrive, and all that arrive with it.

        See :meth:`Delivery.collect_answers`.
        Work that is not answered is given up at the deadline, or when its answer should have come.
        """
        self._begin(work, options)
        wanted_ids = {message.id for message in work}
        answers: list[tuple[Message, int]] = []
        later: list[tuple[Message, int]] = []
        for answer in self._early:
            (answers if answer[0].reply_to in wanted_ids else later).append(answer)
        self._early = later
        until = math.inf if timeout is None else self.clock_time + timeout
        # With an answer at hand, only those that arrive at the same moment are waited for.
        while timing := self._clock.step(self.clock_time if answers else until):
            answer = _answer(*self._close(timing))
            (answers if timing.job.id in wanted_ids else self._early).append(answer)
            self._charge(timing)
        self._known -= {reply.reply_to for reply, _ in answers}
        # By node, as all grids give answers that come at one moment.
        return sorted(answers, key=lambda answer: answer[0].node)

    def _begin(self, pushed: Sequence[Message], options: WaveOptions) -> None:
        """Have what was pushed and is not under way begin now."""
        new = [message for message in pushed if message.id not in self._known]
        if not new:
            return
        answers = {
            reply.reply_to: (reply, version)
            for reply, version in self._perform(new, options)
        }
        wave = FleetWave(self._due(new, None), self._chances(), options.is_sparse)
        for message in new:
            self._known.add(message.id)
            self._give(self._piece(message, answers[message.id], wave))

    # --- who is there
    # ---------------------------------------------------------------------------------------------

    def get_node_ids(self) -> list[int]:
        """Return the ids of the present clients, ascending.

        While too few are present, and nobody is at work, the clock goes on.

        Raises
        ------
        RunError
            If there never seem to be enough at once.
        """
        self.gather(math.inf)
        return [node_of(client) for client in self._present()]

    def absent(self) -> list[int]:
        """Return the clients that are away now, ascending."""
        return sorted(set(range(self.clients)) - set(self._present()))

    def report_to(self, listener: Listener) -> None:
        """Have a listener hear of work; it is told of the devices first."""
        super().report_to(listener)
        listener.describe(self.devices.names)

    def gather(self, until: float) -> None:
        """See :meth:`MessageGrid.gather`."""
        presence = self.devices.presence
        for _ in range(CHANGES_OF_PRESENCE):
            present = self._present()
            if (
                len(present) >= self._quorum
                or not self._clock.idle
                or self.clock_time >= until
            ):
                return
            absent = set(range(self.clients)) - set(present)
            returns = [
                presence.after(client, self.clock_time, 0.0) for client in absent
            ]
            self._clock.wait(min(until, *returns))
        raise RunError(
            f"fleet.availability: {counted(self._quorum, 'client')} wanted at once, which never were "
            f"there in {self.clock_time / 3600:.1f} h of virtual time"
        )

    def _present(self) -> Sequence[int]:
        presence = self.devices.presence
        if isinstance(presence, Always):
            return range(self.clients)
        return [
            client
            for client in range(self.clients)
            if presence.here(client, self.clock_time)
        ]

    def members(self) -> list[int]:
        """Ids of all clients."""
        return super().get_node_ids()

    # --- what there is to tell
    # ------------------------------------------------------------------------------------

    def elapsed(self) -> dict[str, float]:
        """Return virtual time so far and its parts; see :class:`Accounts`."""
        return self._accounts.elapsed(self.clock_time)

    def fleet(self) -> dict[str, Any]:
        """Return what each client's device did, for ``fleet.json``."""
        return self._accounts.report(self.clock_time)

    def state(self) -> dict[str, Any]:
        """Return the clock and the accounts, for checkpoints.

        Work under way is not in it, as there is none between rounds.
        """
        return {
            "now": self.clock_time,
            "waves": self._waves,
            **self._accounts.state(),
        }

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Delivery.restore_state`."""
        self._clock = Clock(self.devices.links, self.devices.presence, state["now"])
        self._waves = state["waves"]
        self._accounts.restore(state, self.clock_time)

    # --- the grid that does the work
    # ------------------------------------------------------------------------------

    def note_unusable(self, reply: Message) -> None:
        """See :meth:`Delivery.note_unusable`."""
        self.inner.note_unusable(reply)

    def peak_memory_mb(self) -> float:
        """See :meth:`MessageGrid.peak_memory_mb`."""
        return self.inner.peak_memory_mb()

    def close(self) -> None:
        """Close the grid that does the work."""
        super().close()
        self.inner.close()

    # --- helpers
    # --------------------------------------------------------------------------------------------------

    def reserves(self, messages: Sequence[FlowerMessage]) -> list[FlowerMessage]:
        """Make messages to further present clients, drawn at random, with ``fleet.over_commit``.

        Raises
        ------
        ConfigError
            If a strategy does not send all clients the same.
        """
        sent = messages
        if (
            self.settings.over_commit <= 1
            or not sent
            or any(
                message.metadata.message_type != MessageType.TRAIN for message in sent
            )
        ):
            return []
        content = sent[0].content
        if any(message.content is not content for message in sent):
            raise ConfigError(
                f"fleet.over_commit = {self.settings.over_commit:g} needs a strategy that sends all clients the same; "
                "set it to 1"
            )
        others = sorted(
            set(self.get_node_ids())
            - {message.metadata.dst_node_id for message in sent}
        )
        count = min(
            math.ceil(len(sent) * self.settings.over_commit) - len(sent), len(others)
        )
        # A generator of its own: strategies draw from the global one, which must not move.
        draw = random.Random(integer(self._seed, "fleet.more", self._waves))
        return [
            FlowerMessage(content, node, MessageType.TRAIN)
            for node in sorted(draw.sample(others, count))
        ]

    def _due(self, work: Sequence[Message], timeout: float | None) -> float:
        """Return until when answers to a wave count."""
        deadline = self.settings.deadline if all(map(can_fail, work)) else 0.0
        return self.clock_time + min(
            deadline or math.inf, math.inf if timeout is None else timeout
        )

    def _piece(
        self, message: Message, answer: tuple[Message, int], wave: FleetWave
    ) -> Piece:
        account = self._accounts.clients[client_of(message.node)]
        return make_piece(self.devices, account, wave, message, answer)

    def _chances(self) -> list[Chance]:
        """Draw the chances of the work that each client may be given now."""
        self._waves += 1
        return draw_chances(self.settings, self.clients, self._seed, self._waves)

    def _give(self, piece: Piece) -> None:
        self._at_work[piece.job.id] = piece
        self._clock.give(piece.job)

    def _close(self, timing: Timing) -> tuple[Piece, bool]:
        """Book the end of a piece of work; return it, and whether its answer came."""
        piece = self._at_work.pop(timing.job.id)
        is_failure = piece.reply.failure is not None
        return piece, self._accounts.book(timing, piece.flops, is_failure)

    def _charge(self, timing: Timing) -> None:
        """Charge the time since the last such moment.

        It went into the work whose end the server waited for.
        """
        shares = self._clock.shares(timing, self._accounts.charged)
        self._accounts.charge(self.clock_time, *shares)


def _answer(piece: Piece, has_arrived: bool) -> tuple[Message, int]:
    """Return a piece's answer, or the failure in its place, and the state's version."""
    return (piece.reply, piece.version) if has_arrived else piece.given_up()
