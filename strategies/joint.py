"""Training in one place: the upper bound that needs neither federation nor continual learning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.app import Message as FlowerMessage
from flwr.serverapp import Grid

from fedknow.client.data.stream import TaskStream
from fedknow.client.host import one_thread
from fedknow.client.learners.frames.learner import Round
from fedknow.client.learners.frames.rehearsal import Replay, columns
from fedknow.client.learners.joint import JointCentral as JointLearner
from fedknow.client.learners.joint import join
from fedknow.protocols.config import ConfigError
from fedknow.protocols.flower import to_arrays, to_record
from fedknow.protocols.seeds import integer
from fedknow.strategies.paired import PairedStrategy, Setup

__all__ = ["JointCentral"]


class JointCentral(PairedStrategy):
    """Train one model on all clients' data of all tasks so far, here; clients get no work.

    Parameters
    ----------
    budget : float
        Samples of a round, as a multiple of those that FedAvg's clients have in it:
        ``fraction_train`` of all clients' samples of the current task.
    fraction_train, min_train_nodes, min_available_nodes
        See :class:`~fedknow.strategies.paired.PairedStrategy`; no client is waited for.
    """

    def __init__(
        self,
        budget: float = 1.0,
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
                "learner.name = 'joint-central' trains where all data are, and with data.name = 'local' they are with "
                "the clients; choose another learner, for example 'joint'"
            )
        if not isinstance(setup.learner, JointLearner):
            raise ConfigError(
                f"strategy.name = 'joint-central' does not fit learner.name = {setup.config.learner.name!r}; "
                "set learner.name = 'joint-central' and leave strategy.name out"
            )
        self._stream: TaskStream = setup.stream
        self._learner = setup.learner
        self._seed = setup.config.seed

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[FlowerMessage]:
        """Nothing for clients to do."""
        self._task, self._round = (
            int(cast(int, config["task"])),
            int(cast(int, config["round"])),
        )
        self._arrays = arrays
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[FlowerMessage]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """One round of training on everything.

        Returns
        -------
        tuple
            The trained parameters; ``loss`` and ``accuracy`` of the last epoch, and
            ``samples``, those of all epochs.
        """
        everything = self._everything()
        sizes = [
            len(self._stream.task(client, self._task).train)
            for client in range(self._stream.clients)
        ]
        count = int(self.budget * self.fraction_train * sum(sizes))
        round = Round(
            self._round, integer(self._seed, "joint", self._task, self._round)
        )
        self._learner.load_state_dict({})
        self._learner.receive(
            {
                name: torch.tensor(array)
                for name, array in to_arrays(self._arrays).items()
            }
        )
        with one_thread():
            report = self._learner.fit_on(
                everything, count, self._stream.task(0, self._task), round
            )
        samples = self._learner.drawn(everything, count) * self._learner.epochs
        arrays = to_record(
            {name: value.numpy() for name, value in self._learner.send().items()}
        )
        return arrays, MetricRecord({**report, "samples": samples})

    def kept_bytes(self) -> int:
        """All samples so far, with their labels; a resumed run lays them out anew."""
        if self._data is None:
            return 0
        _, samples = self._data
        return samples.x.nbytes + samples.y.nbytes

    def _everything(self) -> Replay:
        """All clients' samples of the tasks so far, laid out once a task."""
        if self._data is None or self._data[0] != self._task:
            width = self._learner.head.out_features
            parts = []
            for client in range(self._stream.clients):
                seen = [
                    self._stream.task(client, task) for task in range(self._task + 1)
                ]
                for task in seen:
                    head = columns(
                        seen[-1].head if task.incremental else task.head, width
                    )
                    parts.append(
                        Replay(
                            task.train.x, task.train.y, head.expand(len(task.train), -1)
                        )
                    )
            self._data = self._task, join(parts)
        return self._data[1]
