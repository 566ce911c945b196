"""When tasks arrive: each client meets its tasks at moments of its own, or all do at the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.messages import client_of
from fedknow.protocols.seeds import generator
from fedknow.strategies.asynchronous import Asynchronous
from fedknow.strategies.paired import PairedStrategy

__all__ = ["Arrivals"]


class Arrivals:
    """Which task each client is at: a schedule, and how far clients have come.

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
    seconds : bool
        Whether the schedule is in virtual seconds.

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

    def __init__(self, ends: NDArray[np.float64], rounds: int, seconds: bool) -> None:
        self.ends, self.rounds, self.seconds = ends, rounds, seconds
        self.tasks, self.since, self.before = np.zeros((3, len(ends)), np.int64)
        self.steps = 0

    @classmethod
    def of(cls, config: ExperimentConfig) -> Arrivals | None:
        """The schedule of an experiment, from the configuration and the seed alone; None: all
        tasks come to all at once, ``train.rounds`` rounds after each other.

        A task arrives each ``arrival_seconds``, or without these each ``train.rounds`` rounds.
        ``staggered``: client c of n is ``arrival_lag * c / (n - 1)`` behind client 0 (whole
        rounds, rounded down), for which its first task takes longer. ``poisson``: tasks arrive
        at each client as a Poisson process of that rate (whole rounds, rounded up); its first
        draw is the first task's length. The run ends when the last task of each client has
        taken its time.
        """
        data, seconds = config.data, config.data.arrival_seconds > 0
        if data.arrival == "same" and not seconds:
            return None
        lengths = np.full(
            (data.clients, data.tasks),
            data.arrival_seconds or float(config.train.rounds),
        )
        if data.arrival == "staggered":
            behind = (
                data.arrival_lag * np.arange(data.clients) / max(1, data.clients - 1)
            )
            lengths[:, 0] += behind if seconds else np.floor(behind)
        elif data.arrival == "poisson":
            for client in range(data.clients):
                gaps = generator(config.seed, "arrivals", client).exponential(
                    lengths[client]
                )
                lengths[client] = gaps if seconds else np.maximum(1, np.ceil(gaps))
        ends = lengths.cumsum(axis=1)
        ends[:, -1] = ends[:, -1].max()
        return cls(ends, config.train.rounds, seconds)

    # --- where clients are
    # ----------------------------------------------------------------------------------------

    def position(self, client: int) -> tuple[int, int]:
        """A client's own task, from 0, and its round of that, from 1, which counts the server's steps."""
        return int(self.tasks[client]), self.steps - int(self.before[client]) + 1

    @property
    def task(self) -> int:
        """The task that the server is at: that of whoever is furthest behind."""
        return int(self.tasks.min())

    @property
    def over(self) -> bool:
        """Whether all clients are through."""
        return bool(self.task == self.ends.shape[1])

    def leaving(self, moment: float) -> dict[int, list[int]]:
        """Clients whose task is over at a moment, by their task."""
        found: dict[int, list[int]] = {}
        for client in np.flatnonzero(self._until() <= moment).tolist():
            found.setdefault(int(self.tasks[client]), []).append(client)
        return dict(sorted(found.items()))

    def leave(self, clients: Sequence[int], done: int) -> None:
        """These have been told that their task is over, when the server has done so many rounds."""
        self.tasks[clients] += 1
        self.since[clients] = done
        self.before[clients] = self.steps

    def next(self) -> float:
        """The next moment at which a task is over for somebody."""
        return float(self._until().min())

    def idle(self, done: int) -> bool:
        """Whether everybody has had the rounds of its task, so that the server waits for the next
        moment."""
        return self.seconds and self._missing(done) <= 0

    def span(self, done: int) -> tuple[int, float]:
        """How far the server's task goes on at most, from a moment at which all clients are where
        they should be.

        Returns
        -------
        rounds : int
            Those until it is over, or in virtual seconds until everybody has had the rounds of
            its task.
        until : float
            The virtual second at which it is over; never, where rounds are counted.
        """
        end = float(self.ends[:, self.task].max())
        return (self._missing(done), end) if self.seconds else (int(end) - done, np.inf)

    def _missing(self, done: int) -> int:
        """Rounds until everybody has had those of its task."""
        return int((self.since + self.rounds - done).max())

    def _until(self) -> NDArray[np.float64]:
        """When each client's present task is over; never, where there is none any more."""
        ends = np.pad(self.ends, ((0, 0), (0, 1)), constant_values=np.inf)
        return np.take_along_axis(ends, self.tasks[:, None], axis=1)[:, 0]

    def state(self) -> dict[str, Any]:
        """How far clients have come, for checkpoints."""
        return {
            "tasks": self.tasks,
            "since": self.since,
            "before": self.before,
            "steps": self.steps,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to what :meth:`state` gave."""
        self.tasks, self.since, self.before = (
            np.array(state[name]) for name in ("tasks", "since", "before")
        )
        self.steps = state["steps"]

    # --- messages
    # -------------------------------------------------------------------------------------------------

    def tell(self, messages: Iterable[FlowerMessage]) -> None:
        """Put the clients' own ``task`` and ``round`` in the place of the server's in messages to
        them.

        What is shared by clients that are equally far is shared still.
        """
        made: dict[tuple[int, int, int], tuple[RecordDict, RecordDict]] = {}
        for message in messages:
            content, position = (
                message.content,
                self.position(client_of(message.metadata.dst_node_id)),
            )
            if (key := (id(content), *position)) not in made:
                own = {"task": position[0], "round": position[1]}
                records = {
                    k: ConfigRecord({**v, **own}) if isinstance(v, ConfigRecord) else v
                    for k, v in content.items()
                }
                made[key] = (
                    content,
                    RecordDict(records),
                )  # both: an id is its own as long as what it is of is there
            message.content = made[key][1]

    @staticmethod
    def check(config: ExperimentConfig, strategy: Strategy, real: bool = False) -> None:
        """See that an experiment can be run whose clients are at tasks of their own, or whose
        tasks have times.

        Parameters
        ----------
        config : ExperimentConfig
        strategy : Strategy
        real : bool
            Whether its clients are real ones, of which none can be asked anything else while
            others do pushed work.

        Raises
        ------
        ConfigError
            If its strategy counts tasks itself, or something is wanted that is defined for all
            clients at once.
        """
        data, same = config.data, config.data.arrival == "same"
        if same and not data.arrival_seconds:
            return
        arrival = (
            f"data.arrival_seconds = {data.arrival_seconds:g}"
            if same
            else f"data.arrival = {data.arrival!r}"
        )
        otherwise = "data.arrival_seconds = 0" if same else "data.arrival = 'same'"
        if isinstance(strategy, Asynchronous) and real and not same:
            reason = "has clients at work when others are to end a task, which real clients cannot"
        elif type(strategy).start is not Strategy.start and not isinstance(
            strategy, Asynchronous
        ):
            reason = "has a loop of its own, which is called once a task of all clients"
        elif isinstance(strategy, PairedStrategy) and not same:
            reason = "gathers what clients send when a task is over for all of them"
        else:
            if config.evaluation.every and not same:
                raise ConfigError(
                    f"evaluation.every = {config.evaluation.every}: with {arrival} clients are scored when a task of "
                    "theirs is over, and not in between; set evaluation.every = 0"
                )
            return
        raise ConfigError(
            f"{arrival}: strategy {config.strategy.name} {reason}; set {otherwise}, or take another strategy"
        )
