"""The server's half of :mod:`fedknow.protocols.secure`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from flwr.app import Message as FlowerMessage

from fedknow.protocols.flower import from_flower, to_flower
from fedknow.protocols.messages import (
    ARRAYS,
    EXTRA,
    METRICS,
    Arrays,
    Config,
    Content,
    Message,
    Metrics,
    client_of,
)
from fedknow.protocols.secure import rounds
from fedknow.protocols.secure.fixed import (
    SumLayout,
    decode,
    decode_sums,
    size_of,
    sum_size,
)
from fedknow.protocols.texts import counted
from fedknow.protocols.work import NUM_EXAMPLES
from fedknow.server.checks.arrays import longest_noise, norm
from fedknow.server.checks.faults import RunError
from fedknow.server.grids.running_mean import mean_metrics
from fedknow.server.run.context import RunContext
from fedknow.server.run.secure_waves import (
    SecureWaves,
    Session,
    TooFew,
    require,
)

__all__ = ["SecureRounds"]


class SecureRounds:
    """Exchanges messages so that only sums of what clients send are seen.

    Parameters
    ----------
    run : RunContext
    """

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self._waves = SecureWaves(run)
        self._heavy: set[int] = set()

    def exchange(self, messages: Sequence[FlowerMessage]) -> list[FlowerMessage]:
        """Send work, and give one answer for all.

        It has the weighted mean of the parameters.

        Parameters
        ----------
        messages : sequence of flwr.app.Message
            A strategy's work for a round.

        Returns
        -------
        list of flwr.app.Message
            One, in the name of the earliest client. Empty where too few clients of a fleet
            stayed, which a warning says.

        Raises
        ------
        RunError
            If too few real clients stayed, or what they sent does not add up.
        """
        if not messages:
            return []
        try:
            nodes = {each.metadata.dst_node_id for each in messages}
            session = self._waves.prepare(sorted(nodes))
            replies = self._train(session, messages)
            self._note_heavy(replies)
            total = self._waves.open(session, replies)
        except TooFew as problem:
            # Devices drop out by chance, so a round without a sum is no fault of the run.
            if self._run.parts.config.fleet.devices:
                self._run.incidents.warn(str(problem))
                return []
            task, round = self._run.incidents.inspector.position
            raise RunError(f"task {task + 1}, round {round}: {problem}") from None
        return [self._answer(total, replies, messages)]

    def end(self, messages: Sequence[Message]) -> list[Message]:
        """Tell clients that a task is over, and add up what they share.

        Parameters
        ----------
        messages : sequence of Message
            To each client.

        Returns
        -------
        list of Message
            Answers of those who stayed, by node. The earliest has the sum of all.

        Raises
        ------
        RunError
            If too few clients stayed, or what they sent does not add up. A fleet loses no
            answer to such messages.
        """
        layout = self._run.parts.learner.sum_layout()
        try:
            session = self._waves.prepare(
                sorted({message.node for message in messages})
            )
            replies = self._end(session, messages, sum_size(layout))
            total = self._waves.open(session, replies)
        except TooFew as problem:
            task, _ = self._run.incidents.inspector.position
            raise RunError(f"task {task + 1}, when it ended: {problem}") from None
        answers = [
            replace(reply, content={METRICS: reply.content[METRICS]})
            for reply in replies.values()
        ]
        content = dict(answers[0].content)
        content[EXTRA] = self._sum(total, layout, len(replies))
        return [replace(answers[0], content=content), *answers[1:]]

    # --- the waves

    def _train(
        self, session: Session, messages: Sequence[FlowerMessage]
    ) -> dict[int, Message]:
        """Wave 3 of a round: masked updates, by node."""
        record = ConfigRecord(
            {rounds.SESSION: session.id, rounds.NODES: session.peers}
        )
        chosen = [
            message
            for message in messages
            if message.metadata.dst_node_id in session.sealed
        ]
        for message in chosen:
            message.content = RecordDict(
                {**message.content, rounds.SECURE: record}
            )
        self._expect(size_of(self._run.state.arrays))
        replies = [
            from_flower(reply, {})
            for reply in self._run.strategy_grid.send_and_receive(chosen)
            if not reply.has_error()
        ]
        return _by_node(session, replies)

    def _end(
        self, session: Session, messages: Sequence[Message], size: int
    ) -> dict[int, Message]:
        """Wave 3 of a task's end: masked sums, by node."""
        record = Config({rounds.SESSION: session.id, rounds.NODES: session.peers})
        chosen = [
            replace(message, content={**message.content, rounds.SECURE: record})
            for message in messages
            if message.node in session.sealed
        ]
        self._expect(size)
        replies = [
            reply
            for reply in self._run.grid.exchange(chosen, self._run.options)
            if reply.failure is None
        ]
        return _by_node(session, replies)

    def _expect(self, size: int) -> None:
        # Masked numbers have another name and type than what is expected in the clear.
        self._run.incidents.inspector.expect_masked(
            Arrays({rounds.MASKED: np.zeros(size, np.uint64)})
        )

    # --- the result

    def _answer(
        self,
        total: np.ndarray,
        replies: Mapping[int, Message],
        messages: Sequence[FlowerMessage],
    ) -> FlowerMessage:
        """Make one answer of the opened sum."""
        answers = list(replies.values())
        weight = sum(_weight(reply) for reply in answers)
        sent = self._run.state.arrays
        mean = decode(total, sent, weight)
        self._check_size(mean, sent)
        content: Content = {ARRAYS: mean, METRICS: mean_metrics(answers)}
        earliest = answers[0]
        requests = {each.metadata.message_id: each for each in messages}
        reply = replace(earliest, content=content)
        return to_flower(reply, requests[earliest.reply_to])

    def _note_heavy(self, replies: Mapping[int, Message]) -> None:
        """Say whose claim of samples counts for more than it would in the clear."""
        multiple = self._run.parts.config.engine.max_weight
        if not multiple or self._run.incidents.claims.are_known:
            return
        weights = {node: _weight(reply) for node, reply in replies.items()}
        median = statistics.median_low(weights.values())
        for node, weight in weights.items():
            # Once for each client, as the next rounds would only repeat it.
            if weight <= multiple * median or node in self._heavy:
                continue
            self._heavy.add(node)
            # The client has weighed its numbers itself, so that nothing can be bounded here.
            self._run.incidents.warn(
                f"client {client_of(node)} claims {counted(int(weight), 'sample')}, and under "
                f"masks all of them count, where engine.max_weight = {multiple:g} would let "
                f"{multiple * median:.0f} count; eject the client if that is not so"
            )

    def _sum(self, total: np.ndarray, layout: SumLayout, clients: int) -> Arrays:
        """Decode the sum of what clients share."""
        sums = decode_sums(total, layout)
        try:
            self._run.parts.learner.check_sum(sums, clients)
        except ValueError as error:
            raise RunError(
                f"secure aggregation: the sum that {counted(clients, 'client')} shared is "
                f"impossible: {error}; a client sent wrong shares or sums, and the sum does not "
                "tell which"
            ) from None
        return sums

    def _check_size(self, mean: Arrays, sent: Arrays) -> None:
        """Refuse a mean that no honest clients could have.

        A wrong share leaves a mask on the sum, which is then as large as the ring.
        """
        factor = self._run.parts.config.engine.max_update_norm
        privacy = self._run.parts.config.privacy
        # The clients' own, which in their mean is shorter.
        noise = longest_noise(privacy.noise * privacy.clip, sent)
        limit = factor and factor * max(norm(sent.values()), 1.0) + noise
        # Single updates are hidden, so that only their mean can be measured.
        length = norm(mean[name] - array for name, array in sent.items())
        if limit and length > limit:
            raise RunError(
                f"secure aggregation: the mean update's norm is {length:.4g}, and "
                f"engine.max_update_norm = {factor:g} allows {limit:.4g}; a client sent wrong "
                "shares, or a wrong update, and the sum does not tell which"
            )


def _by_node(session: Session, replies: Sequence[Message]) -> dict[int, Message]:
    """Sort masked answers by node; refuse to go on with too few."""
    require(len(replies), session.threshold, len(session.peers), "sent updates")
    return {reply.node: reply for reply in sorted(replies, key=_node)}


def _node(reply: Message) -> int:
    return reply.node


def _weight(reply: Message) -> float:
    metrics = reply.content[METRICS]
    assert isinstance(metrics, Metrics)  # the inspector saw to it
    weight = metrics[NUM_EXAMPLES]
    assert isinstance(weight, int | float)
    return float(weight)
