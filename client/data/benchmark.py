"""The task stream of a simulation: a data set and its partition."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch

from fedknow.client.data.arrays import Dataset, Labels
from fedknow.client.data.columns import Column
from fedknow.client.data.datasets import load_dataset
from fedknow.client.data.partition import Partition, make_partition
from fedknow.client.data.samples import Raw, model_input
from fedknow.client.data.shares import Indices
from fedknow.client.data.stream import Split, TaskData
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.seeds import generator
from fedknow.protocols.texts import counted

__all__ = ["Benchmark", "hold_out", "make_benchmark"]

_REMEMBERED = 64 * 2**20
"""Bytes of shares that stay in memory as tensors.

A client meets the same share in all rounds of a task.
"""


class Benchmark:
    """Every client's tasks, cut from one data set.

    It is a :class:`~fedknow.client.data.TaskStream`. It holds plain NumPy arrays, which
    processes can share and which are never written to. Tensors are made, and normalised, when
    a share is asked for.

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
        scenario: Literal[
            "task-incremental", "class-incremental"
        ] = "task-incremental",
    ) -> None:
        self.dataset = dataset
        self.partition = partition
        self.is_incremental = scenario == "class-incremental"
        self.clients = len(partition.tasks)
        # The same for all clients: each has every task, in an order of its own.
        self.tasks = len(partition.tasks[0])
        self.spec = dataset.spec
        self.shape = dataset.shape
        # Classes that no task uses need no place in the head, as long as they come last.
        used = chain.from_iterable(share.classes for share in partition.tasks[0])
        self.classes = 1 + max(used)
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
        data = self._recent[key] = self._make(*key)
        self._bytes += _nbytes(data)
        # The data just made may go, too: a share can be larger than the memory for all.
        while self._bytes > _REMEMBERED:
            _, oldest = self._recent.popitem(last=False)
            self._bytes -= _nbytes(oldest)
        return data

    def train_size(self, client: int, task: int) -> int:
        """Count the training samples a client has of a task; makes no tensors."""
        self._check(client, task)
        return len(self.partition.tasks[client][task].train)

    def _make(self, client: int, task: int) -> TaskData:
        self._check(client, task)
        shares = self.partition.tasks[client]
        share = shares[task]
        # Classes of different tasks are disjoint here, so none comes twice.
        seen = chain.from_iterable(
            earlier.classes for earlier in shares[: task + 1]
        )
        dataset = self.dataset
        return TaskData(
            task=task,
            classes=share.classes,
            seen=tuple(seen),
            train=self._split(dataset.train_x, dataset.train_y, share.train),
            test=self._split(dataset.test_x, dataset.test_y, share.test),
            is_incremental=self.is_incremental,
        )

    def _split(self, samples: Raw, labels: Labels, places: Indices) -> Split:
        dataset = self.dataset
        # Indexing by an array copies, so tensors never share memory with the (perhaps
        # read-only) data set.
        raw = samples[places]
        try:
            x = model_input(raw, self.spec, dataset.mean, dataset.std)
        except ValueError as error:
            raise ConfigError(f"data set {dataset.name!r}: {error}") from error
        return Split(x, torch.from_numpy(np.asarray(labels[places])))

    def _check(self, client: int, task: int) -> None:
        if not (0 <= client < self.clients and 0 <= task < self.tasks):
            raise IndexError(
                f"client {client}, task {task}: there are "
                f"{counted(self.clients, 'client')} and {counted(self.tasks, 'task')}, from 0"
            )

    def __getstate__(self) -> dict[str, Any]:
        # Remembered shares can be made again: they do not travel to other processes.
        return self.__dict__ | {"_recent": OrderedDict(), "_bytes": 0}


def _nbytes(data: TaskData) -> int:
    splits = (data.train, data.test)
    return sum(split.x.nbytes + split.y.nbytes for split in splits)


def hold_out(dataset: Dataset, fraction: float, seed: int) -> Dataset:
    """Hold out a part of each class's training samples to test on.

    A choice of settings by these scores sees no test sample, and no client has trained on
    the samples scored. At least one sample of a class is held out, and at least one is not.
    The normalisation stays that of all training samples.

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
                f"data.holdout = {fraction:g}: class {dataset.class_names[label]!r} of "
                f"{dataset.name} has one training sample, of which nothing can be held "
                "out; set data.holdout = 0"
            )
        count = round(fraction * len(places))
        # At least one sample to test on, and one to train on.
        count = min(max(count, 1), len(places) - 1)
        # A seed of each class's own: its choice depends on no other class.
        shuffled = generator(seed, "holdout", int(label)).permutation(places)
        held[shuffled[:count]] = True
    x, y = dataset.train_x, dataset.train_y
    columns = {
        name: Column(column.train[~held], column.train[held], column.names)
        for name, column in dataset.columns.items()
    }
    return replace(
        dataset,
        columns=columns,
        train_x=x[~held],
        train_y=y[~held],
        test_x=x[held],
        test_y=y[held],
    )


def make_benchmark(config: ExperimentConfig) -> Benchmark:
    """Load the data that a configuration names and share them among clients.

    The configuration's seed fixes the result.

    Raises
    ------
    ConfigError
        See :func:`~fedknow.client.data.load_dataset` and
        :func:`~fedknow.client.data.make_partition`.
    """
    dataset = load_dataset(config.data)
    if config.data.holdout:
        dataset = hold_out(dataset, config.data.holdout, config.seed)
    partition = make_partition(dataset, config.data, config.seed)
    return Benchmark(dataset, partition, config.data.scenario)
