"""The task stream of a simulation: a data set and its partition."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from fedknow.client.data.datasets import Dataset, Images, Labels, load_dataset
from fedknow.client.data.partition import Indices, Partition, make_partition
from fedknow.client.data.stream import Split, TaskData
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.seeds import generator
from fedknow.protocols.texts import counted

__all__ = ["Benchmark", "hold_out", "make_benchmark"]

_REMEMBERED = 64 * 2**20
"""Bytes of shares kept ready made: a client meets the same one in all rounds of a task."""


class Benchmark:
    """Every client's tasks, cut from one data set (a :class:`~fedknow.client.data.TaskStream`).

    Holds plain NumPy arrays, which processes can share and which are never written to; tensors
    are made, and normalised, when a share is asked for.

    Parameters
    ----------
    dataset : Dataset
        All samples.
    partition : Partition
        Who holds which of them.
    scenario : str
        ``"task-incremental"`` or ``"class-incremental"``.
    """

    def __init__(
        self,
        dataset: Dataset,
        partition: Partition,
        scenario: Literal["task-incremental", "class-incremental"] = "task-incremental",
    ) -> None:
        self.dataset = dataset
        self.partition = partition
        self.incremental = scenario == "class-incremental"
        self.clients = len(partition.tasks)
        self.tasks = len(partition.tasks[0])
        self.shape = dataset.shape
        # Classes that no task uses need no place in the head, as long as they come last.
        self.classes = 1 + max(max(share.classes) for share in partition.tasks[0])
        self._recent: OrderedDict[tuple[int, int], TaskData] = OrderedDict()
        self._bytes = 0

    def task(self, client: int, task: int) -> TaskData:
        """One client's share of the task at a position of its own order.

        Raises
        ------
        IndexError
            If there is no such client or task.
        """
        key = (client, task)
        if key in self._recent:
            self._recent.move_to_end(key)
            return self._recent[key]
        made = self._recent[key] = self._make(*key)
        self._bytes += _nbytes(made)
        while self._bytes > _REMEMBERED:
            self._bytes -= _nbytes(self._recent.popitem(last=False)[1])
        return made

    def train_size(self, client: int, task: int) -> int:
        """How many training samples a client has of a task; makes no tensors."""
        self._check(client, task)
        return len(self.partition.tasks[client][task].train)

    def _make(self, client: int, task: int) -> TaskData:
        self._check(client, task)
        shares = self.partition.tasks[client]
        return TaskData(
            task=task,
            classes=shares[task].classes,
            seen=tuple(
                label for share in shares[: task + 1] for label in share.classes
            ),
            train=self._split(
                self.dataset.train_x, self.dataset.train_y, shares[task].train
            ),
            test=self._split(
                self.dataset.test_x, self.dataset.test_y, shares[task].test
            ),
            incremental=self.incremental,
        )

    def _split(self, images: Images, labels: Labels, places: Indices) -> Split:
        # Indexing by an array copies, so tensors never share memory with the (perhaps
        # read-only) data set.
        x = torch.from_numpy(images[places]).to(torch.float32).div_(255)
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1)
            for values in (self.dataset.mean, self.dataset.std)
        )
        return Split(
            x.sub_(mean).div_(std), torch.from_numpy(np.asarray(labels[places]))
        )

    def _check(self, client: int, task: int) -> None:
        if not (0 <= client < self.clients and 0 <= task < self.tasks):
            raise IndexError(
                f"client {client}, task {task}: there are "
                f"{counted(self.clients, 'client')} and {counted(self.tasks, 'task')}, from 0"
            )

    def __getstate__(self) -> dict[str, Any]:
        # What is remembered can be made again: it does not travel.
        return self.__dict__ | {"_recent": OrderedDict(), "_bytes": 0}


def _nbytes(data: TaskData) -> int:
    return sum(split.x.nbytes + split.y.nbytes for split in (data.train, data.test))


def hold_out(dataset: Dataset, fraction: float, seed: int) -> Dataset:
    """The training samples alone, a part of each class (at least one sample, at most all but one)
    held out for testing.

    Who chooses settings by these scores has neither trained on the samples scored, on any
    client, nor seen the test samples. The normalisation stays that of all training samples.

    Parameters
    ----------
    dataset : Dataset
        Its test samples are put aside.
    fraction : float
        How much to hold out.
    seed : int
        Decides which.

    Raises
    ------
    ConfigError
        If a class has one training sample only.
    """
    held = np.zeros(len(dataset.train_y), bool)
    for label in np.unique(dataset.train_y):
        places = np.flatnonzero(dataset.train_y == label)
        if len(places) < 2:
            raise ConfigError(
                f"data.holdout = {fraction:g}: class {dataset.class_names[label]!r} of {dataset.name} has one training "
                "sample, of which nothing can be held out; set data.holdout = 0"
            )
        count = min(max(round(fraction * len(places)), 1), len(places) - 1)
        held[generator(seed, "holdout", int(label)).permutation(places)[:count]] = True
    x, y = dataset.train_x, dataset.train_y
    return replace(
        dataset, train_x=x[~held], train_y=y[~held], test_x=x[held], test_y=y[held]
    )


def make_benchmark(config: ExperimentConfig) -> Benchmark:
    """Load the data that a configuration names and share them among its clients by its seed.

    Raises
    ------
    ConfigError
        See :func:`~fedknow.client.data.load_dataset` and
        :func:`~fedknow.client.data.make_partition`.
    """
    dataset = load_dataset(config.data)
    if config.data.holdout:
        dataset = hold_out(dataset, config.data.holdout, config.seed)
    return Benchmark(
        dataset, make_partition(dataset, config.data, config.seed), config.data.scenario
    )
