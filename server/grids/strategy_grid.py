"""Flower's view of a grid: the ``Grid`` that strategies see."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from flwr.app import Message as FlowerMessage
from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedknow.protocols.flower import (
    Cache,
    Run,
    from_flower,
    identify,
    set_id,
    to_flower,
)
from fedknow.protocols.messages import Message
from fedknow.server.grids.base import MessageGrid
from fedknow.server.grids.running_mean import RunningMean
from fedknow.server.grids.wave import WaveOptions

__all__ = ["StrategyGrid"]

PLAIN = WaveOptions()


class StrategyGrid(Grid):
    """The grid that strategies see; any Flower strategy runs on it unchanged.

    Parameters
    ----------
    grid : MessageGrid
        Sends the messages.
    options : WaveOptions
        The experiment's wishes for each wave that a strategy sends.
    address : callable, optional
        Called with Flower's messages before they are sent; may change what they say.
    until : float
        The moment of :attr:`clock_time` from which on no work is given out. Strategies with a
        loop of their own heed it.
    bound : callable, optional
        Called with Flower's answers as they arrive; may bound the weights that they claim.

    Attributes
    ----------
    until : float
        See the parameter.
    """

    def __init__(
        self,
        grid: MessageGrid,
        options: WaveOptions = PLAIN,
        address: Callable[[Sequence[FlowerMessage]], None] | None = None,
        until: float = math.inf,
        bound: Callable[[Sequence[FlowerMessage]], None] | None = None,
    ) -> None:
        self.until = until
        self._bound = bound
        self._grid = grid
        self._options = options
        self._address = address
        self._run = grid.run
        self._pushed: dict[str, FlowerMessage] = {}

    def with_loop(
        self,
        until: float,
        bound: Callable[[Sequence[FlowerMessage]], None],
    ) -> StrategyGrid:
        """Return the same grid for a strategy's own loop."""
        twin = StrategyGrid(
            self._grid, self._options, self._address, until, bound
        )
        # Shared: work that was pushed through one may be pulled through the other.
        twin._pushed = self._pushed
        twin._run = self._run
        return twin

    # --- the run

    def set_run(self, run: Run) -> None:
        """Set the run that this grid works for."""
        self._run = run
        identify(run.run_id)

    @property
    def run(self) -> Run:
        """The run, as Flower describes it."""
        return self._run

    @property
    def clock_time(self) -> float:
        """Seconds by which pulls wait; see :attr:`Delivery.clock_time`."""
        return self._grid.clock_time

    def get_node_ids(self) -> list[int]:
        """Return the ids of all present clients, ascending."""
        return self._grid.get_node_ids()

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> FlowerMessage:
        """Make a Flower message, as Flower's own constructor does."""
        return FlowerMessage(
            content, dst_node_id, message_type, ttl=ttl, group_id=group_id
        )

    # --- messages

    def push_messages(self, messages: Iterable[FlowerMessage]) -> list[str]:
        """Take messages in, as they are now.

        Work begins with the next pull, at the latest.

        Returns
        -------
        list of str
            Ids under which to pull the answers.

        Raises
        ------
        ValueError
            If a message goes to a node that does not exist.
        """
        sent = self._prepare(list(messages))
        self._grid.push(_from_flower(sent), self._options)
        self._pushed |= {message.metadata.message_id: message for message in sent}
        return [message.metadata.message_id for message in sent]

    def pull_messages(
        self, message_ids: Iterable[str], timeout: float | None = None
    ) -> list[FlowerMessage]:
        """Collect the answers to pushed messages, and wait for one if need be.

        Parameters
        ----------
        message_ids : iterable of str
            Ids that :meth:`push_messages` gave. An id that was pulled already or never pushed
            gives nothing.
        timeout : float, optional
            Seconds of :attr:`clock_time` to wait for the earliest answer; by default as long as
            it takes.

        Returns
        -------
        list of flwr.app.Message
            Answers (errors too) in the order of arrival, those that arrived together in the
            order of nodes. Empty: none came in time, or none can come any more.
        """
        replies = self._grid.pull(message_ids, self._options, timeout)
        pulled = [
            to_flower(reply, self._pushed.pop(reply.reply_to))
            for reply in replies
        ]
        self.bound_weights(pulled)
        return pulled

    def bound_weights(self, replies: Sequence[FlowerMessage]) -> None:
        """Bound the weights of answers, in place, where sizes are claims.

        A strategy that gathered answers calls it once more before it weighs them, as more
        claims are known by then.
        """
        if self._bound is not None:
            self._bound(replies)

    def send_and_receive(
        self, messages: Iterable[FlowerMessage], *, timeout: float | None = None
    ) -> list[FlowerMessage]:
        """Send Flower's messages and wait for the answers.

        Parameters
        ----------
        messages : iterable of flwr.app.Message
        timeout : float, optional
            Seconds to wait at most.

        Returns
        -------
        list of flwr.app.Message
            The answers (errors too), ordered by node id, then as sent; after a timeout those
            that arrived. With ``engine.running_mean`` one answer stands for all good answers to
            training. It is their mean, in the name of the earliest
            (:mod:`fedknow.server.grids.running_mean`).
        """
        chosen = list(messages)
        spare = self._grid.reserves(chosen)
        options = self._options
        if spare:
            # So many answers end the wave, whoever they are from.
            options = replace(options, enough=len(chosen))
        sent = self._prepare([*chosen, *spare])
        work = _from_flower(sent)
        requests = {message.metadata.message_id: message for message in sent}

        def convert(reply: Message) -> FlowerMessage:
            return to_flower(reply, requests[reply.reply_to])

        if not options.averages(work):
            answers = self._grid.collect(work, options, timeout, convert)
            self.bound_weights(answers)
            return answers
        running = RunningMean()
        replies = self._grid.collect(work, options, timeout, running.take)
        good = [reply for reply in replies if reply.failure is None]
        failed = [reply for reply in replies if reply.failure is not None]
        mean = [running.reply(good)] if good else []
        # Failures stay single, so that a strategy can count them.
        return [convert(reply) for reply in mean + failed]

    def _prepare(self, messages: list[FlowerMessage]) -> list[FlowerMessage]:
        """Let the experiment address messages, and give them ids."""
        # Addressing may change the content, so it comes before conversion.
        if self._address:
            self._address(messages)
        for message in messages:
            set_id(message, self._grid.next_id())
        return messages


def _from_flower(messages: Sequence[FlowerMessage]) -> list[Message]:
    """Convert messages; records that they share stay shared."""
    cache: Cache = {}
    return [from_flower(message, cache) for message in messages]
