"""Partition: the classes of each task, and each client's samples of it.

One seed fixes all of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from fedknow.client.data.arrays import Dataset
from fedknow.client.data.shares import SHARINGS, Indices, Pool, TaskShares
from fedknow.protocols.config import ConfigError, DataConfig
from fedknow.protocols.seeds import generator
from fedknow.protocols.texts import counted

__all__ = ["Partition", "Share", "make_partition"]


class Share(NamedTuple):
    """One client's share of one task."""

    classes: tuple[int, ...]
    """Classes of the task, the same for all clients."""
    train: Indices
    """Places in the training arrays, ascending."""
    test: Indices
    """Places in the test arrays, ascending."""
    held: tuple[int, ...]
    """Those of the classes that the client has training samples of."""


@dataclass(frozen=True, eq=False)
class Partition:
    """The samples of every client, task by task.

    Attributes
    ----------
    tasks : tuple of tuple of Share
        ``tasks[client][position]``; positions count in the client's own order of tasks.
    """

    tasks: tuple[tuple[Share, ...], ...]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all classes and rows: equal for equal partitions."""
        # Little-endian on every machine. Lengths stand before values, so that no two
        # partitions give the same bytes.
        total = hashlib.sha256()
        shape = [len(self.tasks), len(self.tasks[0])]
        total.update(np.array(shape, "<i8").tobytes())
        for share in chain.from_iterable(self.tasks):
            for part in (share.classes, share.train, share.test):
                total.update(np.array([len(part)], "<i8").tobytes())
                total.update(np.asarray(part, "<i8").tobytes())
        return total.hexdigest()

    def summary(self) -> dict[str, Any]:
        """Summarise for a log, as JSON.

        Returns
        -------
        dict
            The digest, and classes and sizes per client and task.
        """
        clients = [list(map(_share_summary, shares)) for shares in self.tasks]
        return {"digest": self.digest, "clients": clients}


def _share_summary(share: Share) -> dict[str, Any]:
    return {
        "classes": list(share.classes),
        "held": list(share.held),
        "train": len(share.train),
        "test": len(share.test),
    }


def make_partition(dataset: Dataset, config: DataConfig, seed: int) -> Partition:
    """Cut a data set into tasks and share each task among the clients.

    Tasks are the data set's groups (where it has them and ``classes_per_task`` is 0), else
    blocks of consecutive classes. ``class_order = "shuffled"`` shuffles the groups or the
    classes first. ``partition`` decides the shares:

    * ``paper`` (FedKNOW, ICDE 2023): a client draws between ``classes_min`` and ``classes_max``
      of the task's classes. It gets the fraction ``samples`` of each one's training samples,
      and ``test_samples`` of its test samples;
    * ``iid``: all samples of the task in equal parts (flwr-datasets' ``IidPartitioner``'s),
      train and test alike;
    * ``dirichlet``: the parts of each class follow Dirichlet(``alpha``) (flwr-datasets'
      ``DirichletPartitioner``); the test samples of a class are shared in the proportion of its
      training samples.

    The result depends on the data, ``config`` and ``seed`` only. Every client has at least one
    training and one test sample of every task.

    Raises
    ------
    ConfigError
        If there are too few classes or samples for what is asked; says which settings to change.
    """
    pools = _pools(dataset, _task_classes(dataset, config, seed), seed)
    shares = SHARINGS[config.partition](pools, config, seed)
    clients = []
    for client in range(config.clients):
        order = _task_order(config, seed, client)
        clients.append(
            tuple(
                _share(dataset, pools[task], shares[task], client)
                for task in order
            )
        )
    return Partition(tuple(clients))


def _task_order(config: DataConfig, seed: int, client: int) -> Indices:
    if config.task_order == "shuffled":
        # By client, so that one more client changes no other one's order.
        return generator(seed, "partition/order", client).permutation(
            config.tasks
        )
    return np.arange(config.tasks)


def _share(
    dataset: Dataset, pool: Pool, shares: TaskShares, client: int
) -> Share:
    train, test = shares[client]
    # Ascending rows read a mapped file from front to back.
    held = np.unique(dataset.train_y[train]).tolist()
    return Share(pool.classes, np.sort(train), np.sort(test), tuple(held))


def _task_classes(
    dataset: Dataset, config: DataConfig, seed: int
) -> list[tuple[int, ...]]:
    """Decide the classes of each task."""
    rng = generator(seed, "partition/classes")
    is_shuffled = config.class_order == "shuffled"
    if dataset.groups and config.classes_per_task == 0:
        count = len(dataset.groups)
        if config.tasks > count:
            raise ConfigError(
                f"data.tasks = {config.tasks}: {dataset.name} has "
                f"{counted(count, 'natural task')}; set data.tasks to {count} or less, "
                "or data.classes_per_task for tasks of equal size"
            )
        order = rng.permutation(count) if is_shuffled else np.arange(count)
        return [dataset.groups[group] for group in order[: config.tasks]]
    size = _task_size(dataset, config)
    labels = np.arange(dataset.classes)
    if is_shuffled:
        labels = rng.permutation(labels)
    blocks = labels[: config.tasks * size].reshape(config.tasks, size)
    return [tuple(block) for block in blocks.tolist()]


def _task_size(dataset: Dataset, config: DataConfig) -> int:
    """Decide how many classes each task has."""
    size = config.classes_per_task or dataset.classes // config.tasks
    if size == 0 or config.tasks * size > dataset.classes:
        required = config.tasks * max(size, 1)
        raise ConfigError(
            f"data.tasks = {config.tasks} of "
            f"{counted(max(size, 1), 'class', 'classes')} each (data.classes_per_task) need "
            f"{counted(required, 'class', 'classes')}, but {dataset.name} has "
            f"{dataset.classes}; lower data.tasks or data.classes_per_task"
        )
    return size


def _pools(
    dataset: Dataset, tasks: Sequence[tuple[int, ...]], seed: int
) -> list[Pool]:
    """Collect the rows of each task, class by class, in an order by the seed."""
    train = _rows_by_class(dataset.train_y, dataset.classes)
    test = _rows_by_class(dataset.test_y, dataset.classes)
    pools = []
    for task, classes in enumerate(tasks):
        for label in classes:
            _check_class(dataset, task, label, train, "training")
            _check_class(dataset, task, label, test, "test")
        # Each class has generators of its own: its order depends on no other class.
        pool = Pool(
            task,
            classes,
            [_shuffled(train[label], "train", label, seed) for label in classes],
            [_shuffled(test[label], "test", label, seed) for label in classes],
        )
        pools.append(pool)
    return pools


def _rows_by_class(y: Indices, classes: int) -> list[Indices]:
    # A stable sort keeps the rows of a class in their order in the data set.
    order = np.argsort(y, kind="stable")
    starts = np.searchsorted(y[order], np.arange(1, classes))
    return np.split(order, starts)


def _shuffled(rows: Indices, part: str, label: int, seed: int) -> Indices:
    return generator(seed, f"partition/{part}", label).permutation(rows)


def _check_class(
    dataset: Dataset, task: int, label: int, rows: Sequence[Indices], part: str
) -> None:
    if len(rows[label]) == 0:
        raise ConfigError(
            f"data set {dataset.name!r}: class {dataset.class_names[label]!r} of "
            f"task {task} has no {part} samples; every class needs both"
        )
