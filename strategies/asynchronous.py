"""What asynchronous strategies have in common: clients are given work when they are free, not all
at once."""

from __future__ import annotations

import math
import random
from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MessageType, MetricRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from fedknow.protocols.flower import to_arrays, to_record
from fedknow.protocols.messages import NO_ANSWER, Arrays

__all__ = ["Asynchronous", "Crew", "Update", "combine"]

PATIENCE = 3
"""How often a client is asked to work on one version of the model whose answers are lost."""


class ArrivalGrid(Protocol):
    """What is asked of a grid: pulls that wait for the first answer
    (:class:`fedknow.server.grids.base.MessageGrid`)."""

    until: float
    """The moment from which on no work is given out any more."""

    @property
    def now(self) -> float:
        """Seconds on the grid's clock."""
        ...

    def get_node_ids(self) -> Iterable[int]:
        """Who is there."""
        ...

    def push_messages(self, messages: Iterable[FlowerMessage]) -> Iterable[str]:
        """Hand out work."""
        ...

    def pull_messages(
        self, message_ids: Iterable[str], timeout: float | None = None
    ) -> Iterable[FlowerMessage]:
        """Answers that are there; the first, if it comes within ``timeout`` seconds; none if none
        can come."""
        ...


@dataclass(frozen=True)
class Update:
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


class Crew:
    """Who works on which version of the global model; gives out work, and takes answers one at a time.

    A client gets work when its last answer has been taken, and never twice the same version of
    the model, as it would draw the same batches and come to the same end; unless its answer was
    lost, and that three times at most.

    Parameters
    ----------
    grid : ArrivalGrid
    arrays : ArrayRecord
        The global model.
    config : ConfigRecord
        What clients are told; ``round`` and ``server-round`` count the server's steps.
    concurrency : int
        How many work at the same time at most; 0: all.

    Attributes
    ----------
    arrays : ArrayRecord
        The present global model.
    version : int
        Steps made.
    wanted : float
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
        self.wanted = math.inf
        self._config = config
        self._before = int(cast(int, config.get("server-round", 0)))
        self._concurrency = concurrency
        self._at_work: dict[str, tuple[int, int, ArrayRecord]] = {}
        self._arrived: deque[FlowerMessage] = deque()
        self._given: dict[int, int] = {}
        self._lost: Counter[tuple[int, int]] = Counter()

    @property
    def over(self) -> bool:
        """Whether the time in which work is given out is over, and nobody is at work any more."""
        return self.grid.now >= self.grid.until and not self._at_work

    def hand_out(self) -> bool:
        """Give the present model to free clients, drawn at random where not all are needed;
        whether any was given."""
        nodes = list(self.grid.get_node_ids())
        if self.grid.now >= self.grid.until:
            return False
        busy = {node for node, _, _ in self._at_work.values()}
        free = sorted(
            node
            for node in nodes
            if node not in busy and self._given.get(node) != self.version
        )
        count = int(
            min(
                len(free),
                self.wanted - len(busy),
                (self._concurrency or len(nodes)) - len(busy),
            )
        )
        if count <= 0:
            return False
        chosen = free if count == len(free) else sorted(random.sample(free, count))
        number = self.version + 1
        config = ConfigRecord(
            {**self._config, "round": number, "server-round": self._before + number}
        )
        content = RecordDict({"arrays": self.arrays, "config": config})
        ids = self.grid.push_messages(
            [FlowerMessage(content, node, MessageType.TRAIN) for node in chosen]
        )
        for id, node in zip(ids, chosen, strict=True):
            self._at_work[id] = node, self.version, self.arrays
            self._given[node] = self.version
        return True

    def next(self) -> Update | None:
        """Keep as many busy as may be until the next good answer; None: there is nobody left to ask."""
        while self.hand_out() or self._at_work:
            if update := self.take():
                return update
        return None

    def take(self, until: float | None = None) -> Update | None:
        """The next good answer.

        Parameters
        ----------
        until : float, optional
            When to stop waiting, on the grid's clock; by default it is waited for as long as
            somebody works.

        Returns
        -------
        Update or None
            None: nobody is at work any more, or the time is over.
        """
        while self._at_work:
            if not self._arrived:
                left = None if until is None else max(0.0, until - self.grid.now)
                self._arrived.extend(self.grid.pull_messages(list(self._at_work), left))
            if not self._arrived:
                if (
                    until is None
                ):  # none can come any more: whoever was at work is free again
                    self._at_work.clear()
                return None
            reply = self._arrived.popleft()
            node, version, base = self._at_work.pop(reply.metadata.reply_to_message_id)
            if not reply.has_error():  # errors were counted and told when they arrived
                self.wanted -= 1
                return Update(reply, base, self.version - version)
            if reply.error.code == NO_ANSWER:
                self._lost[node, version] += 1
                if (
                    self._lost[node, version] < PATIENCE
                    and self._given[node] == version
                ):
                    del self._given[node]
        return None

    def step(self, arrays: ArrayRecord) -> None:
        """The server has made a step: this is the global model now."""
        self.arrays = arrays
        self.version += 1


class Asynchronous(FedAvg):
    """Frame for strategies in which clients do not wait for each other.

    They run on any of our grids: where clients are equally fast all answers arrive at once, in
    the order of clients; with a fleet, in the order of virtual time; over gRPC, as they come.
    When :meth:`start` returns, nobody is at work any more, so a task that is over is over for
    everybody, and a checkpoint then is whole.

    Parameters
    ----------
    concurrency : int
        How many clients work at the same time; 0: all.
    staleness : {"polynomial", "hinge", "constant"}
        How an answer counts whose model the server has moved on from by ``d`` steps: ``(d +
        1)^-a``; 1 up to ``b`` and ``1 / (a (d - b) + 1)`` from there; or 1 (Xie et al. 2019,
        section 5.2).
    staleness_a, staleness_b : float
        The ``a`` and ``b`` in it.

    Raises
    ------
    ValueError
        If an option has an impossible value.
    """

    by_clock = False
    """Whether what it does hangs on the grid's clock, so that it is another strategy where that
    stands still."""

    def __init__(
        self,
        concurrency: int = 0,
        staleness: str = "polynomial",
        staleness_a: float = 0.5,
        staleness_b: float = 4.0,
    ) -> None:
        super().__init__(
            fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1
        )
        whole("concurrency", concurrency, 0)
        if staleness not in ("polynomial", "hinge", "constant"):
            raise ValueError(
                f"staleness = {staleness!r}: must be polynomial, hinge or constant"
            )
        for name, value in (("staleness_a", staleness_a), ("staleness_b", staleness_b)):
            if value < 0:
                raise ValueError(f"{name} = {value!r}: must not be below 0")
        self.concurrency = concurrency
        self.staleness = staleness
        self.staleness_a = staleness_a
        self.staleness_b = staleness_b
        self.round_metrics = MetricRecord()

    @abstractmethod
    def round(self, crew: Crew, left: int) -> MetricRecord | None:
        """Carry out one round, in which the crew's server makes a step at least; ``left`` rounds,
        this one included.

        Nobody may be at work after the last.
        """

    def settings(self) -> dict[str, float]:
        """What clients are told besides the experiment's own settings."""
        return {}

    def discount(self, staleness: int) -> float:
        """How much an answer counts that is so many steps late."""
        if self.staleness == "constant":
            return 1.0
        if self.staleness == "polynomial":
            return float((staleness + 1) ** -self.staleness_a)
        late = staleness - self.staleness_b
        return 1.0 if late <= 0 else 1.0 / (self.staleness_a * late + 1)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run as Flower's ``Strategy.start`` does; ``timeout`` and ``evaluate_config`` are not used.

        Where the grid says until when work is given out, there are fewer rounds when that comes
        first.

        Raises
        ------
        RuntimeError
            If in a round no client at all answered.
        """
        config = ConfigRecord({**(train_config or {}), **self.settings()})
        crew = Crew(cast(ArrivalGrid, grid), initial_arrays, config, self.concurrency)
        result = Result(arrays=initial_arrays)
        if evaluate_fn:
            evaluate_fn(0, crew.arrays)
        for number in range(1, num_rounds + 1):
            before = crew.version
            metrics = self.round(crew, num_rounds - number + 1)
            if crew.version == before and crew.over:
                break
            if crew.version == before:
                raise RuntimeError("no client gave a usable answer")
            self.round_metrics = metrics or MetricRecord()
            result.arrays, result.train_metrics_clientapp[number] = (
                crew.arrays,
                self.round_metrics,
            )
            if evaluate_fn:
                evaluate_fn(number, crew.arrays)
            if crew.over:
                break
        return result


def combine(update: Callable[..., np.ndarray], *records: ArrayRecord) -> ArrayRecord:
    """A record whose floating arrays are ``update`` of those of the records; others are the last
    record's own."""
    names = [to_arrays(record) for record in records]
    made = Arrays()
    for name, last in names[-1].items():
        if last.dtype.kind == "f":
            last = np.asarray(update(*(arrays[name] for arrays in names)), last.dtype)
            last.flags.writeable = (
                False  # the record refers to it, without another copy
            )
        made[name] = last
    return to_record(made)


def whole(name: str, value: float, least: int) -> None:
    """Refuse an option that is no whole number or too small."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} = {value!r}: must be a whole number, {least} or more")
