"""The times of tasks, and which task each client is at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fedknow.protocols.config import ConfigError, DataConfig, ExperimentConfig
from fedknow.protocols.messages import client_of
from fedknow.protocols.seeds import generator
from fedknow.strategies.asynchronous import Asynchronous
from fedknow.strategies.paired import PairedStrategy

__all__ = ["TaskTimes", "check_task_times", "has_task_times"]


def has_task_times(config: ExperimentConfig) -> bool:
    """Say whether tasks have times, instead of ``train.rounds`` rounds."""
    return config.data.arrival != "same" or config.data.arrival_seconds > 0


class TaskTimes:
    """The times at which tasks end, and how far clients have come.

    Every client has a task from the beginning to the end: the next one arrives where the last
    one ends, and the last task goes on until the run ends. A client comes to its next task when
    it is told that its last is over, so it meets all of them in order, however many have
    arrived meanwhile.

    Parameters
    ----------
    ends : float64 [client, task]
        When a task is over for a client, in rounds of the server that are done or in virtual
        seconds; the last when the run is.
    rounds : int
        ``train.rounds``.
    is_in_seconds : bool
        Whether these are virtual seconds.

    Attributes
    ----------
    tasks : int64 [client]
        Tasks that are over for a client, so the one it is at.
    since : int64 [client]
        Rounds of the server that were done when the client came to it.
    before : int64 [client]
        Steps of the server that were done then.
    steps : int
        Steps that the server has done: versions of the global model, of which a strategy's own
        loop may make several in a round.
    """

    def __init__(
        self,
        ends: NDArray[np.float64],
        rounds: int,
        is_in_seconds: bool,
    ) -> None:
        self.ends = ends
        self.rounds = rounds
        self.is_in_seconds = is_in_seconds
        self.tasks = np.zeros(len(ends), np.int64)
        self.since = np.zeros(len(ends), np.int64)
        self.before = np.zeros(len(ends), np.int64)
        self.steps = 0

    @classmethod
    def plan(cls, config: ExperimentConfig) -> Self:
        """Make the times of an experiment, from its settings and seed alone.

        A task arrives each ``arrival_seconds``, or without these each ``train.rounds`` rounds.
        ``staggered``: client c of n is ``arrival_lag * c / (n - 1)`` behind client 0 (whole
        rounds, rounded down), for which its first task takes longer. ``poisson``: tasks arrive
        at each client as a Poisson process of that rate (whole rounds, rounded up); its first
        draw is the first task's length. The run ends when the last task of each client has
        taken its time.
        """
        data = config.data
        is_in_seconds = data.arrival_seconds > 0
        lengths = np.full(
            (data.clients, data.tasks),
            data.arrival_seconds or float(config.train.rounds),
        )
        if data.arrival == "staggered":
            lengths[:, 0] += _lags(data, is_in_seconds)
        elif data.arrival == "poisson":
            for client in range(data.clients):
                # Each client draws from a generator of its own, so that its times do not
                # depend on how many others there are.
                draw = generator(config.seed, "arrivals", client)
                gaps = draw.exponential(lengths[client])
                lengths[client] = (
                    gaps if is_in_seconds else np.maximum(1, np.ceil(gaps))
                )
        ends = lengths.cumsum(axis=1)
        # The last task goes on until the run ends, which is when the last client is through.
        ends[:, -1] = ends[:, -1].max()
        return cls(ends, config.train.rounds, is_in_seconds)

    # --- where clients are

    def position(self, client: int) -> tuple[int, int]:
        """Give a client's own task, from 0, and its round of that, from 1.

        The round counts the server's steps.
        """
        return int(self.tasks[client]), self.steps - int(self.before[client]) + 1

    @property
    def task(self) -> int:
        """The task that the server is at: that of whoever is furthest behind."""
        return int(self.tasks.min())

    @property
    def is_over(self) -> bool:
        """Whether all clients are through."""
        return bool(self.task == self.ends.shape[1])

    def leaving(self, moment: float) -> dict[int, list[int]]:
        """Find the clients whose task is over at a moment, by their task."""
        by_task: dict[int, list[int]] = {}
        for client in np.flatnonzero(self._until() <= moment).tolist():
            by_task.setdefault(int(self.tasks[client]), []).append(client)
        # Earlier tasks first, so that they are scored in order.
        return dict(sorted(by_task.items()))

    def leave(self, clients: Sequence[int], rounds_done: int) -> None:
        """Move clients on to their next tasks.

        Parameters
        ----------
        clients : sequence of int
        rounds_done : int
            Rounds that the server has done.
        """
        self.tasks[clients] += 1
        self.since[clients] = rounds_done
        self.before[clients] = self.steps

    def next_moment(self) -> float:
        """Give the next moment at which a task is over for somebody."""
        return float(self._until().min())

    def is_idle(self, rounds_done: int) -> bool:
        """Say whether all have had their task's rounds, and a wait is due."""
        return self.is_in_seconds and self._missing(rounds_done) <= 0

    def span(self, rounds_done: int) -> tuple[int, float]:
        """Say how long the server's task goes on at most.

        All clients must be where they belong.

        Returns
        -------
        rounds : int
            Those until it is over, or in virtual seconds until everybody has had the rounds of
            its task.
        until : float
            The virtual second at which it is over; never, where rounds are counted.
        """
        end = float(self.ends[:, self.task].max())
        if self.is_in_seconds:
            return self._missing(rounds_done), end
        return int(end) - rounds_done, np.inf

    def _missing(self, rounds_done: int) -> int:
        """Count the rounds until everybody has had those of its task."""
        return int((self.since + self.rounds - rounds_done).max())

    def _until(self) -> NDArray[np.float64]:
        """Give the end of each client's present task; infinity without one."""
        # A column more, for clients that are through all tasks.
        ends = np.pad(self.ends, ((0, 0), (0, 1)), constant_values=np.inf)
        return np.take_along_axis(ends, self.tasks[:, None], axis=1)[:, 0]

    def state(self) -> dict[str, Any]:
        """Give how far clients have come, for checkpoints."""
        return {
            "tasks": self.tasks,
            "since": self.since,
            "before": self.before,
            "steps": self.steps,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to what :meth:`state` gave."""
        # A copy, as the arrays of a state must not be changed.
        self.tasks = np.array(state["tasks"])
        self.since = np.array(state["since"])
        self.before = np.array(state["before"])
        self.steps = state["steps"]

    # --- messages

    def address(self, messages: Iterable[FlowerMessage]) -> None:
        """Write clients' own tasks and rounds into messages to them.

        What is shared by clients that are equally far is shared still.
        """
        contents: dict[tuple[int, int, int], RecordDict] = {}
        # An id is unique only as long as its object lives, so the originals are kept.
        originals: list[RecordDict] = []
        for message in messages:
            content = message.content
            task, round = self.position(client_of(message.metadata.dst_node_id))
            key = (id(content), task, round)
            if key not in contents:
                contents[key] = _at(content, task, round)
                originals.append(content)
            message.content = contents[key]


def _lags(data: DataConfig, is_in_seconds: bool) -> NDArray[np.float64]:
    """Say how far each client is behind client 0."""
    # At least 1, as a single client has nobody to be behind.
    lags = data.arrival_lag * np.arange(data.clients) / max(1, data.clients - 1)
    return lags if is_in_seconds else np.floor(lags)


def _at(content: RecordDict, task: int, round: int) -> RecordDict:
    """Copy a message's content, with a client's own task and round."""
    records = {}
    for name, record in content.items():
        if isinstance(record, ConfigRecord):
            # A new record, as the strategy may send the old one to others.
            record = ConfigRecord({**record, "task": task, "round": round})
        records[name] = record
    return RecordDict(records)


def check_task_times(
    config: ExperimentConfig, strategy: Strategy, are_clients_real: bool = False
) -> None:
    """See that an experiment can be run whose tasks have times of their own.

    Parameters
    ----------
    config : ExperimentConfig
    strategy : flwr.serverapp.strategy.Strategy
    are_clients_real : bool
        Whether its clients are real ones, of which none can be asked anything else while
        others do pushed work.

    Raises
    ------
    ConfigError
        If its strategy counts tasks itself, or something is wanted that is defined for all
        clients at once.
    """
    if not has_task_times(config):
        return
    data = config.data
    is_same = data.arrival == "same"
    if is_same:
        setting = f"data.arrival_seconds = {data.arrival_seconds:g}"
        remedy = "data.arrival_seconds = 0"
    else:
        setting = f"data.arrival = {data.arrival!r}"
        remedy = "data.arrival = 'same'"
    reason = _unfit(strategy, is_same, are_clients_real)
    if reason:
        raise ConfigError(
            f"{setting}: strategy {config.strategy.name} {reason}; set {remedy}, or take "
            "another strategy"
        )
    if config.evaluation.every and not is_same:
        raise ConfigError(
            f"evaluation.every = {config.evaluation.every}: with {setting} clients are scored "
            "when a task of theirs is over, and not in between; set evaluation.every = 0"
        )


def _unfit(strategy: Strategy, is_same: bool, are_clients_real: bool) -> str:
    """Say why a strategy cannot do with tasks that have times; "" if it can."""
    if isinstance(strategy, Asynchronous):
        if are_clients_real and not is_same:
            return "has clients at work when others are to end a task, which real clients cannot"
    elif type(strategy).start is not Strategy.start:
        return "has a loop of its own, which is called once a task of all clients"
    if isinstance(strategy, PairedStrategy) and not is_same:
        return "gathers what clients send when a task is over for all of them"
    return ""
