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

from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.messages import Message, node_of
from fedknow.protocols.seeds import integer
from fedknow.server.grids.activity import Listener
from fedknow.server.grids.base import Adversary, Answers, MessageGrid
from fedknow.server.grids.wave import WaveOptions
from fedknow.simulations.fleet.build import Fleet
from fedknow.simulations.fleet.pieces import Piece
from fedknow.simulations.fleet.spares import is_over_committed, spare_messages
from fedknow.simulations.fleet.timeline import Timeline

__all__ = ["FleetGrid"]


class FleetGrid(MessageGrid):
    """Clients on virtual devices, in front of a grid that does their work.

    The costs that an answer states, and the bytes of request and answer, decide when it arrives.
    The device's memory, the deadline and chance decide whether it does. Nothing of this depends
    on real time, on workers, or on the order in which the work is done for real. Scoring is
    measurement: it takes no virtual time, and all clients are scored.

    A wave of work begins at one moment. It ends when all have answered, or when the deadline is
    over. With ``over_commit`` it ends when as many have answered as the strategy chose; the
    others are told to stop. Messages that a task is over have no deadline, and no answer to them
    is lost.

    Parameters
    ----------
    inner : MessageGrid
        Has the work done.
    config : ExperimentConfig
    fleet : Fleet
    quorum : int
        Clients that must be present at once before work is given out; the clock goes on until
        they are.
    listener, adversary
        See :class:`~fedknow.server.grids.base.MessageGrid`.
    """

    is_timed = True

    def __init__(  # noqa: PLR0913  # settings of a public class
        self,
        inner: MessageGrid,
        config: ExperimentConfig,
        fleet: Fleet,
        quorum: int = 1,
        listener: Listener | None = None,
        adversary: Adversary | None = None,
    ) -> None:
        # The same store and the same dictionary of versions as the inner grid's.
        shared = inner.clients, inner.store, inner.versions
        super().__init__(*shared, listener=listener, adversary=adversary)
        self.inner = inner
        self.settings = config.fleet
        self._seed = config.seed
        self._quorum = quorum
        self._listener.describe(fleet.names)
        self._timeline = Timeline(fleet, config.fleet, config.seed)
        self._spare: set[str] = set()
        self._known: set[str] = set()
        self._early: list[tuple[Message, int]] = []

    # --- waves

    def deliver(
        self, work: Sequence[Message], timeout: float | None, options: WaveOptions
    ) -> Answers:
        """Have the work done and give the answers that arrive in time.

        See :meth:`Delivery.deliver`. The timeout is in virtual seconds; ``fleet.deadline``
        counts too.
        """
        if options.is_measurement:
            yield from self.inner.perform(work, None, options)
            return
        self._begin(list(self._pushed.values()), options)
        wave = self._timeline.open_wave(work, timeout, options.is_sparse)
        # Else all answers that are not lost will arrive, and need not be kept until then.
        is_held_back = bool(options.enough) or wave.due < math.inf
        requests = {message.id: message for message in work}
        pieces: dict[str, Piece] = {}
        for reply, version in self.inner.perform(work, None, options):
            request = requests[reply.reply_to]
            piece = self._timeline.make_piece(request, (reply, version), wave)
            if not is_held_back and not piece.job.is_lost:
                yield piece.reply, version
                # Only its job is needed from here on, and parameters take memory.
                piece = replace(piece, reply=replace(piece.reply, content={}))
            pieces[reply.reply_to] = piece
        # In the order given, however workers came to it: the clock depends on it.
        in_order = [pieces[message.id] for message in work]
        arrived = self._wave(in_order, options.enough)
        if is_held_back:
            for piece in arrived:
                yield piece.reply, piece.version

    def _wave(self, pieces: Sequence[Piece], enough: int) -> list[Piece]:
        """Have the clock go on until a wave is over.

        Parameters
        ----------
        pieces : sequence of Piece
        enough : int
            Good answers with which the wave is over; 0: it waits for all.

        Returns
        -------
        list of Piece
            The pieces that arrived.
        """
        for piece in pieces:
            self._timeline.give(piece)
        remaining = {piece.job.id for piece in pieces}
        arrived: list[Piece] = []
        good = 0
        self._spare = set()
        while remaining and (timing := self._timeline.clock.step()):
            piece, has_arrived = self._timeline.close(timing)
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
                self._timeline.drop(self._spare)
            if not remaining:
                self._timeline.charge(timing)
        return arrived

    def _missed(
        self, work: Sequence[Message], answered: Collection[str]
    ) -> list[Message]:
        """See :meth:`MessageGrid._missed`; clients that came too late are not."""
        missed = super()._missed(work, answered)
        return [message for message in missed if message.id not in self._spare]

    # --- pushed work

    @property
    def clock_time(self) -> float:
        """Virtual seconds since the run began."""
        return self._timeline.clock.time

    def wait(self, until: float) -> None:
        """See :meth:`MessageGrid.wait`."""
        self._timeline.clock.wait(until)

    def collect_answers(
        self, work: Sequence[Message], timeout: float | None, options: WaveOptions
    ) -> Sequence[tuple[Message, int]]:
        """Collect the next answer to arrive, and all that arrive with it.

        See :meth:`Delivery.collect_answers`. Work that is not answered is given up at the
        deadline, or when its answer should have come.
        """
        self._begin(work, options)
        wanted_ids = {message.id for message in work}
        early = self._early
        answers = [pair for pair in early if pair[0].reply_to in wanted_ids]
        self._early = [
            pair for pair in early if pair[0].reply_to not in wanted_ids
        ]
        until = math.inf if timeout is None else self.clock_time + timeout
        # With an answer at hand, only those that arrive at the same moment are waited for.
        clock = self._timeline.clock
        while timing := clock.step(clock.time if answers else until):
            answer = _answer(*self._timeline.close(timing))
            is_wanted = timing.job.id in wanted_ids
            (answers if is_wanted else self._early).append(answer)
            self._timeline.charge(timing)
        self._known -= {reply.reply_to for reply, _ in answers}
        # By node, as all grids give answers that come at one moment.
        return sorted(answers, key=lambda answer: answer[0].node)

    def _begin(self, pushed: Sequence[Message], options: WaveOptions) -> None:
        """Begin the pushed work that is not under way."""
        new = [message for message in pushed if message.id not in self._known]
        if not new:
            return
        performed = self.inner.perform(new, None, options)
        answers = {pair[0].reply_to: pair for pair in performed}
        wave = self._timeline.open_wave(new, None, options.is_sparse)
        # In the order given, however workers came to it: the clock depends on it.
        for message in new:
            self._known.add(message.id)
            piece = self._timeline.make_piece(message, answers[message.id], wave)
            self._timeline.give(piece)

    # --- presence

    def get_node_ids(self) -> list[int]:
        """Return the ids of the present clients, ascending.

        While too few are present, and none is at work, the clock goes on.

        Raises
        ------
        RunError
            If there never seem to be enough at once.
        """
        self.gather(math.inf)
        return [node_of(client) for client in self._timeline.present()]

    def absent(self) -> list[int]:
        """Return the clients that are away now, ascending."""
        return sorted(set(range(self.clients)) - set(self._timeline.present()))

    def gather(self, until: float) -> None:
        """See :meth:`MessageGrid.gather`."""
        self._timeline.gather(self._quorum, until)

    def members(self) -> list[int]:
        """Return the ids of all clients, also of absent ones."""
        return super().get_node_ids()

    # --- reports and checkpoints

    def elapsed(self) -> dict[str, float]:
        """Return virtual time so far and its parts; see :class:`Accounts`."""
        return self._timeline.accounts.elapsed(self.clock_time)

    def fleet(self) -> dict[str, Any]:
        """Return the accounts of each client's device, for ``fleet.json``."""
        return self._timeline.accounts.report(self.clock_time)

    def state(self) -> dict[str, Any]:
        """Return the clock and the accounts; see :meth:`Delivery.state`."""
        return self._timeline.state()

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Delivery.restore_state`."""
        self._timeline.restore(state)

    # --- the grid that does the work

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

    def reserves(self, messages: Sequence[FlowerMessage]) -> list[FlowerMessage]:
        """Make messages to further present clients, with ``fleet.over_commit``."""
        factor = self.settings.over_commit
        if not is_over_committed(messages, factor):
            return []
        present = self.get_node_ids()
        # A generator of its own: strategies draw from the global one, which must not move.
        seed = integer(self._seed, "fleet.more", self._timeline.waves)
        return spare_messages(messages, present, factor, random.Random(seed))


def _answer(piece: Piece, has_arrived: bool) -> tuple[Message, int]:
    """Return a piece's answer or a failure, and the state's version."""
    return (piece.reply, piece.version) if has_arrived else piece.given_up()
