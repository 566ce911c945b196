"""When tasks arrive: each client meets its tasks at rounds of its own, or all do at the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.messages import client_of
from fedknow.protocols.seeds import generator
from fedknow.strategies.counterpart import Counterpart

__all__ = ["Arrivals"]


@dataclass(frozen=True, eq=False)
class Arrivals:
    """Which task each client is at, round by round of the server.

    Every client has a task from the first round to the last: the next one arrives where the last one ends, and the last
    task goes on until the run ends.

    Attributes
    ----------
    starts : int64 [client, task]
        Rounds of the server that are over when a task arrives; the first is there from the beginning, 0.
    rounds : int
        Rounds of the server in all.
    period : int
        ``train.rounds``: the server's own count of tasks and rounds goes on by it, whatever clients are at.
    """

    starts: NDArray[np.int64]
    rounds: int
    period: int

    @classmethod
    def of(cls, config: ExperimentConfig) -> Arrivals:
        """The schedule of an experiment; it depends on the configuration and the seed alone.

        ``staggered``: client c of n is ``arrival_lag * c / (n - 1)`` rounds behind client 0, rounded down, for which
        its first task takes longer. ``poisson``: tasks arrive at each client as a Poisson process, one in
        ``train.rounds`` rounds on average, rounded up to whole rounds; its first draw is the first task's length.
        """
        data, period = config.data, config.train.rounds
        lengths = np.full((data.clients, data.tasks), period, np.int64)
        if data.arrival == "staggered":
            lengths[:, 0] += data.arrival_lag * np.arange(data.clients) // max(1, data.clients - 1)
        elif data.arrival == "poisson":
            for client in range(data.clients):
                gaps = generator(config.seed, "arrivals", client).exponential(period, data.tasks)
                lengths[client] = np.maximum(1, np.ceil(gaps))
        ends = lengths.cumsum(axis=1)
        starts = np.concatenate([np.zeros((data.clients, 1), np.int64), ends[:, :-1]], axis=1)
        # The server's last period is as long as it takes, and not shorter than the others.
        return cls(starts, max(int(ends[:, -1].max()), period * data.tasks), period)

    def rounds_of(self, task: int) -> int:
        """Rounds of the server's own task, of which the last takes what is left."""
        tasks = self.starts.shape[1]
        return self.period if task < tasks - 1 else self.rounds - self.period * (tasks - 1)

    def position(self, client: int, done: int) -> tuple[int, int]:
        """A client's own task (from 0) and its round of that (from 1), when the server has done so many rounds."""
        task = int(np.searchsorted(self.starts[client], done, side="right")) - 1
        return task, done - int(self.starts[client, task]) + 1

    def leaving(self, done: int) -> dict[int, list[int]]:
        """Clients whose task is over now that the server has done so many rounds, by their task."""
        found: dict[int, list[int]] = {}
        for client in range(len(self.starts)):
            task, _ = self.position(client, done - 1)
            if done == self.rounds or self.position(client, done)[0] != task:
                found.setdefault(task, []).append(client)
        return dict(sorted(found.items()))

    def over(self, task: int, done: int) -> bool:
        """Whether every client has done its task of this number, when the server has done so many rounds."""
        last = task == self.starts.shape[1] - 1
        return done == self.rounds if last else bool((self.starts[:, task + 1] <= done).all())

    def tell(self, messages: Iterable[FlowerMessage], done: int) -> None:
        """Put the clients' own ``task`` and ``round`` in the place of the server's in messages to them.

        What is shared by clients that are equally far is shared still.
        """
        made: dict[tuple[int, int, int], tuple[RecordDict, RecordDict]] = {}
        for message in messages:
            content, position = message.content, self.position(client_of(message.metadata.dst_node_id), done)
            if (key := (id(content), *position)) not in made:
                own = {"task": position[0], "round": position[1]}
                records = {
                    k: ConfigRecord({**v, **own}) if isinstance(v, ConfigRecord) else v for k, v in content.items()
                }
                made[key] = content, RecordDict(records)  # both: an id is its own as long as what it is of is there
            message.content = made[key][1]

    @staticmethod
    def check(config: ExperimentConfig, strategy: Strategy) -> None:
        """See that an experiment can be run whose clients are at tasks of their own.

        Raises
        ------
        ConfigError
            If its strategy counts tasks itself, or something is wanted that is defined for all clients at once.
        """
        arrival = f"data.arrival = {config.data.arrival!r}"
        if config.data.arrival == "same":
            return
        if type(strategy).start is not Strategy.start:
            reason = "has a loop of its own, which is called once a task of all clients"
        elif isinstance(strategy, Counterpart):
            reason = "gathers what clients send when a task is over for all of them"
        else:
            if config.evaluation.every:
                raise ConfigError(
                    f"evaluation.every = {config.evaluation.every}: with {arrival} clients are scored when a task of "
                    "theirs is over, and not in between; set evaluation.every = 0"
                )
            return
        raise ConfigError(
            f"{arrival}: strategy {config.strategy.name} {reason}; set data.arrival = 'same', or take another strategy"
        )
