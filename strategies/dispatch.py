"""Work for clients that do not wait for each other, and their answers."""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from flwr.app import ArrayRecord, ConfigRecord, MessageType, RecordDict
from flwr.app import Message as FlowerMessage

from fedknow.protocols.messages import NO_ANSWER

__all__ = ["ArrivalGrid", "ClientUpdate", "Dispatcher"]

ATTEMPTS = 3
"""How often a client works on one version of the model while its answers are lost."""


class ArrivalGrid(Protocol):
    """A grid that waits for the first answer, not for all.

    :class:`fedknow.server.grids.strategy_grid.StrategyGrid` is one.
    """

    until: float
    """The moment from which on no work is given out any more."""

    @property
    def clock_time(self) -> float:
        """Seconds on the grid's clock."""
        ...

    def get_node_ids(self) -> Iterable[int]:
        """List the clients that are present."""
        ...

    def push_messages(self, messages: Iterable[FlowerMessage]) -> Iterable[str]:
        """Hand out work."""
        ...

    def pull_messages(
        self, message_ids: Iterable[str], timeout: float | None = None
    ) -> Iterable[FlowerMessage]:
        """Return the answers that have arrived; wait for one if none has.

        It waits at most ``timeout`` seconds, and not at all if no answer can come.
        """
        ...

    def bound_weights(self, replies: Sequence[FlowerMessage]) -> None:
        """Bound the weights that clients claim in their answers, in place."""
        ...


@dataclass(frozen=True)
class ClientUpdate:
    """A client's good answer.

    Attributes
    ----------
    reply : flwr.app.Message
    base : ArrayRecord
        The global model that the client began with.
    staleness : int
        How many steps the server has made since.
    """

    reply: FlowerMessage
    base: ArrayRecord
    staleness: int


@dataclass(frozen=True)
class _Job:
    """One client's work on one version of the global model."""

    node: int
    version: int
    arrays: ArrayRecord


class Dispatcher:
    """Give work to free clients, and take their answers one at a time.

    A client gets work when its last answer has been taken. It never gets the same version of
    the model twice, because it would draw the same batches and reach the same result. The
    exception is an answer that was lost: the client then tries again, three times at most.

    Parameters
    ----------
    grid : ArrivalGrid
    arrays : ArrayRecord
        The global model.
    config : ConfigRecord
        The settings that clients get; ``round`` and ``server-round`` count the server's steps.
    concurrency : int
        How many clients work at the same time at most; 0: all.

    Attributes
    ----------
    arrays : ArrayRecord
        The present global model.
    version : int
        Steps made.
    remaining : float
        Good answers still to come; no more work is given out than that.
    """

    def __init__(
        self,
        grid: ArrivalGrid,
        arrays: ArrayRecord,
        config: ConfigRecord,
        concurrency: int,
    ) -> None:
        self.grid = grid
        self.arrays = arrays
        self.version = 0
        # A strategy sets the limit before each round.
        self.remaining = math.inf
        self._config = config
        # Rounds of the run before this call.
        self._earlier_rounds = int(cast(int, config.get("server-round", 0)))
        self._concurrency = concurrency
        self._at_work: dict[str, _Job] = {}
        # A grid may return several answers at once; they are taken one by one.
        self._arrived: deque[FlowerMessage] = deque()
        self._sent_version: dict[int, int] = {}
        self._lost: Counter[tuple[int, int]] = Counter()

    @property
    def is_over(self) -> bool:
        """Whether no more work is given out and nobody is at work."""
        return self.grid.clock_time >= self.grid.until and not self._at_work

    def dispatch(self) -> bool:
        """Give the present model to free clients.

        Clients are drawn at random where not all are needed.

        Returns
        -------
        bool
            Whether any work was given out.
        """
        # Listing the clients may wait for them, so the clock is read afterwards.
        nodes = list(self.grid.get_node_ids())
        if self.grid.clock_time >= self.grid.until:
            return False
        chosen = self._choose(nodes)
        if not chosen:
            return False
        self._push(chosen)
        return True

    def next_update(self) -> ClientUpdate | None:
        """Keep clients busy until the next good answer.

        Returns
        -------
        ClientUpdate or None
            None: nobody is left to ask.
        """
        while self.dispatch() or self._at_work:
            if update := self.take_update():
                return update
        return None

    def take_update(self, deadline: float | None = None) -> ClientUpdate | None:
        """Take the next good answer.

        Parameters
        ----------
        deadline : float, optional
            When to stop waiting, on the grid's clock; by default it waits as long as somebody
            works.

        Returns
        -------
        ClientUpdate or None
            None: nobody is at work any more, or the time is over.
        """
        # A loop, because an answer may be a failure.
        while self._at_work:
            if not self._arrived:
                self._pull(deadline)
            if not self._arrived:
                if deadline is None:
                    # No answer can come any more, so whoever was at work is free again.
                    self._at_work.clear()
                return None
            reply = self._arrived.popleft()
            # From now on the client is free again.
            job = self._at_work.pop(reply.metadata.reply_to_message_id)
            if not reply.has_error():
                self.remaining -= 1
                return ClientUpdate(reply, job.arrays, self.version - job.version)
            # Every other error was counted and reported when it arrived.
            if reply.error.code == NO_ANSWER:
                self._allow_retry(job)
        return None

    def step(self, arrays: ArrayRecord) -> None:
        """Replace the global model after a step of the server."""
        self.arrays = arrays
        self.version += 1

    def _choose(self, nodes: Sequence[int]) -> list[int]:
        """Draw as many free clients as may work now."""
        busy = {job.node for job in self._at_work.values()}
        free = [
            node
            for node in nodes
            if node not in busy and self._sent_version.get(node) != self.version
        ]
        concurrency = self._concurrency or len(nodes)
        places = min(
            len(free), self.remaining - len(busy), concurrency - len(busy)
        )
        count = int(places)
        if count <= 0:
            return []
        # In order of number, so that the draw does not depend on the order of arrival.
        free.sort()
        if count == len(free):
            return free
        return sorted(random.sample(free, count))

    def _push(self, nodes: Sequence[int]) -> None:
        number = self.version + 1
        rounds = {"round": number, "server-round": self._earlier_rounds + number}
        config = ConfigRecord({**self._config, **rounds})
        # One content for all, so that the grid encodes it once.
        content = RecordDict({"arrays": self.arrays, "config": config})
        messages = [
            FlowerMessage(content, node, MessageType.TRAIN) for node in nodes
        ]
        ids = self.grid.push_messages(messages)
        for id, node in zip(ids, nodes, strict=True):
            self._at_work[id] = _Job(node, self.version, self.arrays)
            self._sent_version[node] = self.version

    def _pull(self, deadline: float | None) -> None:
        timeout = None
        if deadline is not None:
            timeout = max(0.0, deadline - self.grid.clock_time)
        self._arrived.extend(
            self.grid.pull_messages(list(self._at_work), timeout)
        )

    def _allow_retry(self, job: _Job) -> None:
        """Let a client whose answer was lost work on the same version again."""
        self._lost[job.node, job.version] += 1
        may_retry = self._lost[job.node, job.version] < ATTEMPTS
        if may_retry and self._sent_version[job.node] == job.version:
            del self._sent_version[job.node]
