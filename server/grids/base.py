"""The base of all grids: it sends messages and takes answers in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Protocol, TypeVar

from flwr.app import Message as FlowerMessage

from fedknow.client.state import StateStore
from fedknow.protocols.flower import Run, empty_run, identify
from fedknow.protocols.messages import NO_ANSWER, Message, client_of, node_of
from fedknow.server.grids.activity import Change, Listener
from fedknow.server.grids.delivery import Answers, Delivery
from fedknow.server.grids.traffic import Traffic
from fedknow.server.grids.wave import WaveOptions

__all__ = ["Adversary", "Answers", "MessageGrid"]

T = TypeVar("T")

PLAIN = WaveOptions()


class Adversary(Protocol):
    """Hostile clients (:class:`fedknow.simulations.attacks.Attack`)."""

    def falsify(
        self, work: Sequence[Message], answers: Iterable[tuple[Message, int]]
    ) -> Iterable[tuple[Message, int]]:
        """Replace the answers of hostile clients."""
        ...


class MessageGrid(Delivery):
    """A grid that sends messages and takes answers in.

    A subclass delivers the messages. Answers come back in the order of the node ids, whatever
    the order of arrival, so that sums over them are the same from run to run.

    Strategies see it through :class:`fedknow.server.grids.strategy_grid.StrategyGrid`. A process
    uses one grid at a time: Flower keeps a run's identity in class attributes.

    Parameters
    ----------
    clients, store, versions
        See :class:`~fedknow.server.grids.delivery.Delivery`.
    run : Run, optional
        The run, where Flower itself has begun one.
    listener : Listener, optional
        Hears which clients are at work.
    adversary : Adversary, optional
        Falsifies answers first.

    Attributes
    ----------
    traffic : Traffic
        The ledger of what was sent so far.
    run : Run
        The run that strategies see.
    """

    def __init__(  # noqa: PLR0913  # what all grids are made of
        self,
        clients: int,
        store: StateStore | None = None,
        versions: dict[int, int] | None = None,
        run: Run | None = None,
        listener: Listener | None = None,
        adversary: Adversary | None = None,
    ) -> None:
        super().__init__(clients, store, versions)
        self.traffic = Traffic()
        # One that does nothing, so that no call has to ask whether anybody listens.
        self._listener = listener or Listener()
        self._adversary = adversary
        self._pushed: dict[str, Message] = {}
        self._sent = 0
        # Flower's messages take the run's id from class attributes of Flower's.
        if run is None:
            run = empty_run()
            identify(run.run_id)
        self.run = run

    # --- waves

    def exchange(
        self,
        messages: Sequence[Message],
        options: WaveOptions = PLAIN,
        timeout: float | None = None,
    ) -> list[Message]:
        """Send our own messages, give them ids, and wait for the answers.

        Parameters
        ----------
        messages : sequence of Message
        options : WaveOptions
            The experiment's wishes for the wave.
        timeout : float, optional
            Seconds to wait; answers that did not come by then are missing.

        Returns
        -------
        list of Message
            The answers (failures too), ordered by node id, then as sent.

        Raises
        ------
        ValueError
            If a message goes to a node that does not exist.
        """
        work = [replace(message, id=self.next_id()) for message in messages]
        return self.collect(work, options, timeout, lambda reply: reply)

    def collect(
        self,
        work: Sequence[Message],
        options: WaveOptions,
        timeout: float | None,
        convert: Callable[[Message], T],
    ) -> list[T]:
        """Send messages that have ids, and convert each answer when it arrives.

        Parameters
        ----------
        work, options, timeout
            See :meth:`exchange`.
        convert : callable
            Makes of an answer the part to keep, while other clients still work.

        Returns
        -------
        list
            The converted answers, ordered by node id, then as sent.
        """
        self._give_out(work, options)
        self._listener.send(work, self.absent())
        replies: dict[str, T] = {}
        # Closed at once after an error: clients that still work must not write states any more.
        with closing(self.perform(work, timeout, options)) as answers:
            for reply, version in _falsify(self._adversary, work, answers):
                checked = self._take_in(reply, version, options)
                replies[reply.reply_to] = convert(checked)
        unanswered = [message for message in work if message.id not in replies]
        if unanswered:
            self._listener.miss(unanswered)
        missed = self._missed(work, replies.keys())
        if missed and options.on_missed:
            options.on_missed(missed)
        # By node and not by arrival: strategies sum floats in the order that they are given.
        by_node = sorted(work, key=lambda message: message.node)
        return [
            replies[message.id] for message in by_node if message.id in replies
        ]

    def _missed(
        self, work: Sequence[Message], answered: Collection[str]
    ) -> list[Message]:
        """Find the work of a wave whose answers are missed."""
        return [message for message in work if message.id not in answered]

    def _give_out(self, work: Sequence[Message], options: WaveOptions) -> None:
        """Check that the nodes of some work exist, and count the work."""
        nodes = {message.node for message in work}
        span = range(node_of(0), node_of(self.clients))
        if strangers := sorted(node for node in nodes if node not in span):
            span_text = f"they are {span[0]} to {span[-1]}"
            raise ValueError(f"no such nodes: {strangers}; {span_text}")
        _touch(self.store, map(client_of, nodes))
        self.traffic.count_requests(work, options)

    def _take_in(
        self, reply: Message, version: int, options: WaveOptions
    ) -> Message:
        """Count and check an answer; return it, or a failure in its place."""
        self.traffic.count_answer(reply, options)
        checked = options.inspect(reply) if options.inspect else reply
        # Pushed work may be answered after the next checkpoint.
        _touch(self.store, [client_of(reply.node)])
        # A client whose answer is not used goes back to the state before it.
        if checked.failure is None:
            self.versions[client_of(reply.node)] = version
        elif reply.failure is None:
            self.note_unusable(checked)
        self._listener.answer(checked)
        return checked

    def next_id(self) -> str:
        """Make the id of a message."""
        self._sent += 1
        # A count and nothing random: versions of clients' states are made from it.
        return str(self._sent)

    # --- pushed work

    @property
    def at_work(self) -> set[int]:
        """Clients with pushed work whose answers have not been pulled."""
        return {client_of(work.node) for work in self._pushed.values()}

    def push(self, work: Sequence[Message], options: WaveOptions = PLAIN) -> None:
        """Take in work that has ids; it begins with the next pull, at the latest.

        Raises
        ------
        ValueError
            If a message goes to a node that does not exist.
        """
        self._give_out(work, options)
        self._listener.send(work, self.absent(), is_pushed=True)
        self._pushed |= {message.id: message for message in work}

    def pull(
        self,
        ids: Iterable[str],
        options: WaveOptions = PLAIN,
        timeout: float | None = None,
    ) -> list[Message]:
        """Collect the answers to pushed work, and wait for one if need be.

        Parameters
        ----------
        ids : iterable of str
            Ids of pushed work; those pulled already or never pushed give nothing.
        options : WaveOptions
            The experiment's wishes for the work.
        timeout : float, optional
            Seconds of :attr:`clock_time` to wait for the earliest answer; by default as long as
            it takes.

        Returns
        -------
        list of Message
            Answers (failures too) in the order of arrival, those that arrived together in the
            order of nodes. Empty: none came in time, or none can come any more.
        """
        work = [self._pushed[id] for id in ids if id in self._pushed]
        if not work:
            return []
        replies = []
        answers = self.collect_answers(work, timeout, options)
        for reply, version in _falsify(self._adversary, work, answers):
            request = self._pushed.pop(reply.reply_to)
            if reply.failure is not None and reply.failure.code == NO_ANSWER:
                # Nothing came from the client, so there is nothing to count or to inspect.
                self._listener.miss([request])
                if options.on_missed:
                    options.on_missed([request])
                replies.append(reply)
            else:
                replies.append(self._take_in(reply, version, options))
        return replies

    # --- for those who watch

    def news(self) -> Sequence[Change]:
        """Take what changed in the membership since the last call."""
        return ()

    # --- for Flower's face

    def reserves(
        self, messages: Sequence[FlowerMessage]
    ) -> Sequence[FlowerMessage]:
        """Make messages to further clients, in case some do not answer.

        By default there are none. Where there are, a wave is over with as many good answers as
        the strategy asked for.
        """
        return ()

    # --- checkpoints

    def restore(
        self,
        versions: Mapping[int, int],
        traffic: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        """Go back to the client states, and the traffic, of a checkpoint."""
        self.restore_versions(versions)
        _touch(self.store, None)
        if traffic is not None:
            self.traffic.restore(traffic)


def _touch(store: StateStore | None, clients: Iterable[int] | None) -> None:
    """Note clients whose states may change; ``None``: any may have."""
    if store is not None:
        store.touch(clients)


def _falsify(
    adversary: Adversary | None,
    work: Sequence[Message],
    answers: Iterable[tuple[Message, int]],
) -> Iterable[tuple[Message, int]]:
    """Let an adversary have its way with answers, if there is one."""
    return answers if adversary is None else adversary.falsify(work, answers)
