"""Training in one place: an upper bound without federation.

In each round the server trains the model itself, on all clients' data of all tasks so far.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.app import Message as FlowerMessage
from flwr.serverapp import Grid

from fedknow.client.data.stream import TaskStream
from fedknow.client.host import one_thread
from fedknow.client.learners.frames.learner import Round
from fedknow.client.learners.frames.rehearsal import Replay, columns, concatenate
from fedknow.client.learners.joint import JointCentral as JointLearner
from fedknow.protocols.config import ConfigError
from fedknow.protocols.flower import to_arrays, to_record
from fedknow.protocols.seeds import integer
from fedknow.strategies.paired import PairedStrategy, Setup, to_tensors

__all__ = ["JointCentral"]


class JointCentral(PairedStrategy):
    """The server trains one model on all data so far; clients get no work.

    Parameters
    ----------
    budget : float
        Samples of a round, as a multiple of those that FedAvg's clients have in it:
        ``fraction_train`` of all clients' samples of the current task. 0: those of all tasks
        so far.
    fraction_train, min_train_nodes, min_available_nodes
        See :class:`~fedknow.strategies.paired.PairedStrategy`; the server waits for no client.
    """

    def __init__(
        self,
        budget: float = 0.0,
        fraction_train: float = 1.0,
        min_train_nodes: int = 1,
        min_available_nodes: int = 1,
    ) -> None:
        super().__init__(fraction_train, min_train_nodes, min_available_nodes)
        self.budget = budget
        self._data: tuple[int, Replay] | None = None

    def prepare(self, setup: Setup) -> None:
        """Take the data, and a learner to train with.

        Raises
        ------
        ConfigError
            If the server has no data, or the learner is another one.
        """
        if setup.stream is None:
            raise ConfigError(
                "learner.name = 'joint-central' trains where all data are, and with "
                "data.name = 'local' they are with the clients; choose another learner, "
                "for example 'joint'"
            )
        if not isinstance(setup.learner, JointLearner):
            raise ConfigError(
                "strategy.name = 'joint-central' does not fit learner.name = "
                f"{setup.config.learner.name!r}; set learner.name = 'joint-central' "
                "and leave strategy.name out"
            )
        self._stream: TaskStream = setup.stream
        self._learner = setup.learner
        self._seed = setup.config.seed

    def configure_train(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
    ) -> Iterable[FlowerMessage]:
        """Note the round; clients have nothing to do."""
        self._task = int(cast(int, config["task"]))
        self._round = int(cast(int, config["round"]))
        # The model to go on with; no reply brings one.
        self._arrays = arrays
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[FlowerMessage]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Train one round on everything.

        Returns
        -------
        tuple
            The trained parameters; ``loss`` and ``accuracy`` of the last epoch, and
            ``samples``, those of all epochs.
        """
        data = self._all_data()
        count = self._sample_count(data)
        seed = integer(self._seed, "joint", self._task, self._round)
        # A fresh state: the learner carries nothing from round to round but the parameters.
        self._learner.load_state_dict({})
        self._learner.receive(to_tensors(to_arrays(self._arrays)))
        # One thread, so that sums do not depend on the machine's number of cores.
        with one_thread():
            task = self._stream.task(0, self._task)
            report = self._learner.fit_on(
                data, count, task, Round(self._round, seed)
            )
        # Each epoch learns from as many.
        samples = self._learner.drawn(data, count) * self._learner.epochs
        trained = {
            name: value.numpy() for name, value in self._learner.send().items()
        }
        return to_record(trained), MetricRecord({**report, "samples": samples})

    def kept_bytes(self) -> int:
        """Return the size of all samples so far, with their labels.

        A resumed run lays them out anew, so they are no part of the state.
        """
        if self._data is None:
            return 0
        _, samples = self._data
        return samples.x.nbytes + samples.y.nbytes

    def _sample_count(self, data: Replay) -> int:
        """Count the samples of a round, from those of the current task."""
        if not self.budget:
            return len(data)
        total = 0
        for client in range(self._stream.clients):
            total += len(self._stream.task(client, self._task).train)
        return int(self.budget * self.fraction_train * total)

    def _all_data(self) -> Replay:
        """Return all clients' samples of the tasks so far, laid out once a task."""
        if self._data is None or self._data[0] != self._task:
            parts: list[Replay] = []
            for client in range(self._stream.clients):
                parts += self._client_data(client)
            self._data = self._task, concatenate(parts)
        return self._data[1]

    def _client_data(self, client: int) -> list[Replay]:
        """Return a client's samples of each task so far, with the classes of each."""
        count = min(self._task + 1, self._stream.length(client))
        tasks = [self._stream.task(client, task) for task in range(count)]
        width = self._learner.head.out_features
        parts = []
        for task in tasks:
            # With growing classes a sample is told from all classes that the client knows now.
            classes = tasks[-1].head if task.is_incremental else task.head
            head = columns(classes, width)
            rows = head.expand(len(task.train), -1)
            parts.append(Replay(task.train.x, task.train.y, rows))
        return parts
