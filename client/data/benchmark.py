"""The task stream of a simulation: a data set and its partition."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch

from fedknow.client.data.arrays import Dataset, Labels
from fedknow.client.data.columns import Column
from fedknow.client.data.datasets import load_dataset
from fedknow.client.data.domains import SHIFTS, Shift
from fedknow.client.data.packed import Share
from fedknow.client.data.partition import (
    Partition,
    make_partition,
)
from fedknow.client.data.samples import (
    Raw,
    model_input,
    shaped,
)
from fedknow.client.data.shares import Indices
from fedknow.client.data.splits import load_split
from fedknow.client.data.stream import (
    HeldOutTask,
    Split,
    TaskData,
)
from fedknow.protocols.config import (
    ConfigError,
    DataConfig,
    ExperimentConfig,
)
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
        ``"task-incremental"``, ``"class-incremental"`` or ``"domain-incremental"``.
    shift : Shift, optional
        Moves images to the domains that the partition names.
    """

    def __init__(
        self,
        dataset: Dataset,
        partition: Partition,
        scenario: str = "task-incremental",
        shift: Shift | None = None,
    ) -> None:
        self.dataset = dataset
        self.partition = partition
        self.is_incremental = scenario == "class-incremental"
        self.clients = len(partition.tasks)
        self.tasks = partition.positions
        self.spec = dataset.spec
        self.shape = dataset.shape
        # Classes that no task uses need no place in the head, as long as they come last.
        used = partition.tasks.columns["classes"].values
        self.classes = 1 + int(used.max())
        self._train_sizes = partition.tasks.sizes("train")
        self._shift = shift
        self._recent: OrderedDict[tuple[int, int], TaskData] = OrderedDict()
        self._bytes = 0

    def length(self, client: int) -> int:
        """Count the tasks that a client has."""
        return len(self.partition.tasks[client])

    def task(self, client: int, task: int) -> TaskData:
        """One client's share of the task at a position of its own order.

        A client that has fewer tasks than others goes on with its last one.

        Raises
        ------
        IndexError
            If there is no such client or task.
        """
        self._check(client, task)
        key = (client, min(task, self.length(client) - 1))
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
        sizes = self._train_sizes[client]
        return sizes[min(task, len(sizes) - 1)]

    @property
    def people(self) -> tuple[str, ...]:
        """Names of the people who are held out."""
        return tuple(self.partition.held_out)

    def held_out(self, name: str, task: int) -> HeldOutTask:
        """Give all samples that a person held out has of a task of the stream.

        A task's classes are those of the stream, whether the person shows them or not.
        """
        share = self.partition.held_out[name][task]
        # A part without samples has no tensors to be made.
        parts = [
            self._split(share, part)
            for part in ("train", "test")
            if len(getattr(share, part))
        ]
        return HeldOutTask(share.classes, tuple(parts))

    def stream_classes(self, task: int) -> tuple[int, ...]:
        """List the classes of the stream up to a task, for people held out."""
        # The same for all of them: their shares are of the stream's own tasks.
        shares = next(iter(self.partition.held_out.values()))
        classes = chain.from_iterable(s.classes for s in shares[: task + 1])
        return tuple(dict.fromkeys(classes))

    def _make(self, client: int, task: int) -> TaskData:
        shares = self.partition.tasks[client]
        share = shares[task]
        return TaskData(
            task=task,
            classes=share.classes,
            seen=shares.seen(task),
            train=self._split(share, "train"),
            test=self._split(share, "test"),
            is_incremental=self.is_incremental,
        )

    def _split(self, share: Share, part: str) -> Split:
        data = self.dataset
        samples: Raw = data.train_x if part == "train" else data.test_x
        labels: Labels = data.train_y if part == "train" else data.test_y
        places = share.train if part == "train" else share.test
        # Indexing by an array copies, so tensors never share memory with the (perhaps
        # read-only) data set.
        raw = samples[places]
        try:
            if self._shift and share.domain >= 0:
                x = self._shifted(self._shift, raw, share, part)
            else:
                x = model_input(raw, self.spec, data.mean, data.std)
        except ValueError as error:
            raise ConfigError(f"data set {data.name!r}: {error}") from error
        return Split(x, torch.from_numpy(np.asarray(labels[places])))

    def _shifted(
        self,
        shift: Shift,
        raw: Raw,
        share: Share,
        part: str,
    ) -> torch.Tensor:
        """Move images to their domains, on their own scale, and normalise."""
        count = self.spec.channels
        x = model_input(raw, self.spec, [0.0] * count, [1.0] * count)
        rows = share.train if part == "train" else share.test
        x = shift(x, rows, _domains(share, part, len(rows)), part)
        mean = shaped(self.dataset.mean, self.spec)
        return x.sub_(mean).div_(shaped(self.dataset.std, self.spec))

    def _check(self, client: int, task: int) -> None:
        if not (0 <= client < self.clients and 0 <= task < self.tasks):
            raise IndexError(
                f"client {client}, task {task}: there are "
                f"{counted(self.clients, 'client')} and {counted(self.tasks, 'task')}, from 0"
            )

    def __getstate__(self) -> dict[str, Any]:
        # Remembered shares can be made again: they do not travel to other processes.
        return self.__dict__ | {
            "_recent": OrderedDict(),
            "_bytes": 0,
        }


def _domains(share: Share, part: str, count: int) -> Indices:
    """Give the domain of each sample of a share, int64 [count]."""
    # Samples that come early or late are still of their own domain.
    if part == "train" and len(share.domains):
        return share.domains
    return np.full(count, share.domain, np.int64)


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
        name: Column(
            column.train[~held],
            column.train[held],
            column.names,
        )
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


def _check_shift(dataset: Dataset, data: DataConfig) -> None:
    """Refuse samples that cannot be moved to a domain."""
    spec = dataset.spec
    # On a scale that nobody knows there is no telling what is dark, or loud.
    if spec.kind != "image" or spec.dtype != "uint8":
        raise ConfigError(
            f"data.domain = {data.domain!r}: it changes 8-bit images, and {dataset.name} has "
            f"{spec} ({spec.dtype}); set data.domain = 'column' or 'labels'"
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
    data = config.data
    partition = (
        load_split(data.split, dataset, data)
        if data.split
        else make_partition(dataset, data, config.seed)
    )
    shift = None
    if data.domain in SHIFTS:
        _check_shift(dataset, data)
        domains = data.tasks // data.repeats
        shift = Shift(
            data.domain,
            domains,
            data.domain_strength,
            config.seed,
        )
    return Benchmark(dataset, partition, data.scenario, shift)
