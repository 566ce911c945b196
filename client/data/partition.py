"""Which classes make which task, and which samples of it each client holds. One seed fixes all of it."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedknow.client.data.datasets import Dataset, require
from fedknow.protocols.config import ConfigError, DataConfig
from fedknow.protocols.seeds import generator, integer
from fedknow.protocols.texts import counted

__all__ = ["Partition", "Share", "make_partition"]

Indices = NDArray[np.int64]

_ATTEMPTS = 50
"""How often the classes of a task are drawn anew before it counts as impossible."""


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
    """Who holds what: ``tasks[client][position]``, positions counting in the client's own order of
    tasks."""

    tasks: tuple[tuple[Share, ...], ...]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over all classes and indices: equal digests mean equal partitions."""
        total = hashlib.sha256(
            np.array([len(self.tasks), len(self.tasks[0])], "<i8").tobytes()
        )
        for share in (share for client in self.tasks for share in client):
            for part in (share.classes, share.train, share.test):
                values = np.asarray(part, "<i8")
                total.update(
                    np.array([len(values)], "<i8").tobytes() + values.tobytes()
                )
        return total.hexdigest()

    def summary(self) -> dict[str, Any]:
        """What a log should keep, as JSON: the digest, and classes and sizes per client and task."""
        return {
            "digest": self.digest,
            "clients": [
                [
                    {
                        "classes": list(share.classes),
                        "held": list(share.held),
                        "train": len(share.train),
                        "test": len(share.test),
                    }
                    for share in client
                ]
                for client in self.tasks
            ],
        }


@dataclass(frozen=True)
class _Pool:
    """Samples of one task by class: train and test, in an order drawn once from the seed."""

    task: int
    classes: tuple[int, ...]
    train: list[Indices]
    test: list[Indices]


Drawn = list[tuple[Indices, Indices]]
"""Train and test places of each client, for one task."""


def make_partition(dataset: Dataset, config: DataConfig, seed: int) -> Partition:
    """Cut a data set into tasks and share each task among the clients.

    Tasks are the data set's groups (where it has them and ``classes_per_task`` is 0), else
    blocks of consecutive classes. ``class_order = "shuffled"`` shuffles the groups or the
    classes first. ``partition`` decides the shares:

    * ``paper`` (FedKNOW, ICDE 2023): a client draws between ``classes_min`` and ``classes_max``
      of the task's classes and the fraction ``samples`` of each one's training samples,
      ``test_samples`` of its test samples;
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
    draw = {"paper": _paper, "iid": _iid, "dirichlet": _dirichlet}[config.partition]
    drawn = draw(pools, config, seed)
    order = np.tile(np.arange(config.tasks), (config.clients, 1))
    if config.task_order == "shuffled":
        order = np.stack(
            [
                generator(seed, "partition/order", client).permutation(config.tasks)
                for client in range(config.clients)
            ]
        )
    return Partition(
        tuple(
            tuple(
                _share(dataset, pools[task].classes, *drawn[task][client])
                for task in order[client]
            )
            for client in range(config.clients)
        )
    )


def _share(
    dataset: Dataset, classes: tuple[int, ...], train: Indices, test: Indices
) -> Share:
    held = tuple(np.unique(dataset.train_y[train]).tolist())
    return Share(classes, np.sort(train), np.sort(test), held)


def _task_classes(
    dataset: Dataset, config: DataConfig, seed: int
) -> list[tuple[int, ...]]:
    rng = generator(seed, "partition/classes")
    if dataset.groups and config.classes_per_task == 0:
        if config.tasks > len(dataset.groups):
            raise ConfigError(
                f"data.tasks = {config.tasks}: {dataset.name} has "
                f"{counted(len(dataset.groups), 'natural task')}; "
                f"set data.tasks to {len(dataset.groups)} or less, or data.classes_per_task for tasks of equal size"
            )
        order = np.arange(len(dataset.groups))
        if config.class_order == "shuffled":
            order = rng.permutation(order)
        return [dataset.groups[group] for group in order[: config.tasks]]
    size = config.classes_per_task or dataset.classes // config.tasks
    if size == 0 or config.tasks * size > dataset.classes:
        needed = config.tasks * max(size, 1)
        raise ConfigError(
            f"data.tasks = {config.tasks} of "
            f"{counted(max(size, 1), 'class', 'classes')} each (data.classes_per_task) need "
            f"{counted(needed, 'class', 'classes')}, but "
            f"{dataset.name} has {dataset.classes}; lower data.tasks or data.classes_per_task"
        )
    labels = np.arange(dataset.classes)
    if config.class_order == "shuffled":
        labels = rng.permutation(labels)
    return [
        tuple(labels[task * size : (task + 1) * size].tolist())
        for task in range(config.tasks)
    ]


def _pools(
    dataset: Dataset, tasks: Sequence[tuple[int, ...]], seed: int
) -> list[_Pool]:
    def by_class(y: NDArray[np.int64]) -> list[Indices]:
        order = np.argsort(y, kind="stable")
        return np.split(order, np.searchsorted(y[order], np.arange(1, dataset.classes)))

    train, test = by_class(dataset.train_y), by_class(dataset.test_y)
    pools = []
    for task, classes in enumerate(tasks):
        for label in classes:
            for part, places in (("training", train), ("test", test)):
                if len(places[label]) == 0:
                    raise ConfigError(
                        f"data set {dataset.name!r}: class {dataset.class_names[label]!r} of task {task} has no {part} "
                        "samples; every class needs both"
                    )
        pools.append(
            _Pool(
                task,
                classes,
                [
                    generator(seed, "partition/train", label).permutation(train[label])
                    for label in classes
                ],
                [
                    generator(seed, "partition/test", label).permutation(test[label])
                    for label in classes
                ],
            )
        )
    return pools


# --- paper
# ------------------------------------------------------------------------------------------------------------


def _part(fraction: float, total: int) -> int:
    """A fraction of a number of samples, to the nearest, and at least one."""
    return max(1, int(fraction * total + 0.5))


def _paper(pools: Sequence[_Pool], config: DataConfig, seed: int) -> list[Drawn]:
    for pool in pools:
        if config.classes_min > len(pool.classes):
            raise ConfigError(
                f"data.classes_min = {config.classes_min}: task {pool.task} has "
                f"{counted(len(pool.classes), 'class', 'classes')}; "
                f"lower data.classes_min to {len(pool.classes)} or less, or lower data.tasks for larger tasks"
            )
    if config.share == "overlapping":
        return [_overlapping(pool, config, seed) for pool in pools]
    chosen = [_choose(pool, config, seed) for pool in pools]
    fit = min(map(len, chosen))
    if fit < config.clients:
        tightest = pools[min(range(len(pools)), key=lambda task: len(chosen[task]))]
        train, test = _slots(tightest, config)
        most = min(config.classes_max, len(tightest.classes))
        raise ConfigError(
            f"data.clients = {config.clients}: without sharing samples there is room for "
            f"{counted(fit, 'client')}. In task {tightest.task} "
            f"data.samples = {config.samples:g} makes "
            f"{counted(int(train.min()), 'share')} of a class's training samples and "
            f"data.test_samples = {config.test_samples:g} makes {test.min()} of its test samples. "
            f"A client needs shares of {config.classes_min} to "
            f"{counted(most, 'class', 'classes')}. "
            f"Set data.clients to {fit}, or lower data.samples or data.test_samples, "
            'or let clients hold the same samples: data.share = "overlapping"'
        )
    return [
        _deal(pool, choice, config) for pool, choice in zip(pools, chosen, strict=True)
    ]


def _classes_drawn(pool: _Pool, config: DataConfig, rng: np.random.Generator) -> int:
    return int(
        rng.integers(
            config.classes_min,
            min(config.classes_max, len(pool.classes)),
            endpoint=True,
        )
    )


def _overlapping(pool: _Pool, config: DataConfig, seed: int) -> Drawn:
    drawn = []
    for client in range(config.clients):
        rng = generator(seed, "partition/overlapping", pool.task, client)
        chosen = np.sort(
            rng.choice(
                len(pool.classes), _classes_drawn(pool, config, rng), replace=False
            )
        )
        train = [_some(pool.train[k], config.samples, rng) for k in chosen]
        test = [_some(pool.test[k], config.test_samples, rng) for k in chosen]
        drawn.append((np.concatenate(train), np.concatenate(test)))
    return drawn


def _some(places: Indices, fraction: float, rng: np.random.Generator) -> Indices:
    return rng.choice(places, _part(fraction, len(places)), replace=False)


def _slots(
    pool: _Pool, config: DataConfig
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many disjoint shares each class of a task has: of its training samples, of its test samples."""
    train = [len(places) // _part(config.samples, len(places)) for places in pool.train]
    test = [
        len(places) // _part(config.test_samples, len(places)) for places in pool.test
    ]
    return np.array(train), np.array(test)


def _choose(pool: _Pool, config: DataConfig, seed: int) -> list[NDArray[np.int64]]:
    """Classes of each client such that no class is asked for more shares than it has.

    Classes with more shares left are likelier, which keeps them even. A draw that runs into a
    dead end is thrown away. Where none succeeds, the longest: a draw for fewer clients is the
    beginning of one for more, so its length is a number of clients that does fit.
    """
    longest: list[NDArray[np.int64]] = []
    for attempt in range(_ATTEMPTS):
        rng = generator(seed, "partition/disjoint", pool.task, attempt)
        left = np.minimum(*_slots(pool, config))
        chosen: list[NDArray[np.int64]] = []
        for _ in range(config.clients):
            number = _classes_drawn(pool, config, rng)
            if np.count_nonzero(left) < number:
                break
            picked = np.sort(
                rng.choice(len(left), number, replace=False, p=left / left.sum())
            )
            left[picked] -= 1
            chosen.append(picked)
        if len(chosen) > len(longest):
            longest = chosen
        if len(longest) == config.clients:
            break
    return longest


def _deal(
    pool: _Pool, chosen: Sequence[NDArray[np.int64]], config: DataConfig
) -> Drawn:
    """Give each client the next unused share of each class it has chosen."""
    used = np.zeros(len(pool.classes), np.int64)

    def share(places: list[Indices], fraction: float, k: int) -> Indices:
        size = _part(fraction, len(places[k]))
        return places[k][used[k] * size : (used[k] + 1) * size]

    drawn = []
    for classes in chosen:
        train = np.concatenate([share(pool.train, config.samples, k) for k in classes])
        test = np.concatenate(
            [share(pool.test, config.test_samples, k) for k in classes]
        )
        used[classes] += 1
        drawn.append((train, test))
    return drawn


def _iid(pools: Sequence[_Pool], config: DataConfig, seed: int) -> list[Drawn]:
    # The parts of flwr-datasets' IidPartitioner, which takes milliseconds to give out each.
    def deal(places: list[Indices], purpose: str, task: int) -> list[Indices]:
        return np.array_split(
            generator(seed, purpose, task).permutation(np.concatenate(places)),
            config.clients,
        )

    drawn = []
    for pool in pools:
        _enough_samples(pool, config)
        train = deal(pool.train, "partition/iid", pool.task)
        test = deal(pool.test, "partition/iid-test", pool.task)
        drawn.append(list(zip(train, test, strict=True)))
    return drawn


# --- flwr-datasets
# ----------------------------------------------------------------------------------------------------


def _dirichlet(pools: Sequence[_Pool], config: DataConfig, seed: int) -> list[Drawn]:
    return [_dirichlet_task(pool, config, seed) for pool in pools]


def _dirichlet_task(pool: _Pool, config: DataConfig, seed: int) -> Drawn:
    _enough_samples(pool, config)
    partitioners = require("flwr_datasets.partitioner")
    sizes = [len(places) for places in pool.train]
    places, labels = (
        np.concatenate(pool.train),
        np.repeat(np.arange(len(pool.classes)), sizes),
    )
    for attempt in range(_ATTEMPTS):
        partitioner = partitioners.DirichletPartitioner(
            num_partitions=config.clients,
            partition_by="label",
            alpha=config.alpha,
            min_partition_size=1,
            seed=integer(seed, "partition/dirichlet", pool.task, attempt),
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # it warns at each draw that leaves a client empty; we draw again
                rows = _partition_rows(
                    partitioner,
                    np.arange(len(places)),
                    {"label": labels},
                    config.clients,
                )
        except ValueError:
            continue
        counts = np.stack(
            [np.bincount(labels[row], minlength=len(pool.classes)) for row in rows]
        )
        tests = _proportional(counts, [len(of_class) for of_class in pool.test])
        if tests is not None:
            break
    else:
        raise ConfigError(
            f"data.alpha = {config.alpha:g} with data.clients = {config.clients}: no draw gave every client a training "
            f"and a test sample of task {pool.task} "
            f"({counted(len(places), 'training sample')}, "
            f"{counted(sum(map(len, pool.test)), 'test sample')}); raise data.alpha or lower data.clients or data.tasks"
        )
    starts = np.cumsum(tests, axis=0) - tests
    drawn = []
    for client, row in enumerate(rows):
        test = [
            of_class[starts[client, k] : starts[client, k] + tests[client, k]]
            for k, of_class in enumerate(pool.test)
        ]
        drawn.append((places[row], np.concatenate(test)))
    return drawn


def _partition_rows(
    partitioner: Any, values: Indices, columns: dict[str, Indices], clients: int
) -> list[Indices]:
    """Run one of flwr-datasets' partitioners over rows of these columns and return each part's
    ``values``."""
    table = (
        require("datasets")
        .Dataset.from_dict(columns | {"value": values})
        .with_format("numpy")
    )
    partitioner.dataset = table
    return [
        np.asarray(partitioner.load_partition(part)[:]["value"], np.int64)
        for part in range(clients)
    ]


def _proportional(
    counts: NDArray[np.int64], available: Sequence[int]
) -> NDArray[np.int64] | None:
    """Share out each class's test samples in the proportion of the training samples, all of them,
    by largest remainder.

    A client that would be left without any takes one, of a class it trains on, from whoever has
    most of that class and more than one in all.

    Parameters
    ----------
    counts : ndarray of int64, shape (clients, classes)
        Training samples that each client holds.
    available : sequence of int
        Test samples of each class.

    Returns
    -------
    ndarray of int64, shape (clients, classes), or None
        Test samples for each client; None where not every client can have one.
    """
    quota = counts / counts.sum(axis=0) * np.asarray(available)
    tests: NDArray[np.int64] = np.floor(quota).astype(np.int64)
    for k, total in enumerate(available):
        most = np.argsort(
            tests[:, k] - quota[:, k], kind="stable"
        )  # largest remainder first, then by client
        tests[most[: total - tests[:, k].sum()], k] += 1
    for client in np.flatnonzero(tests.sum(axis=1) == 0):
        spare = np.where(
            (tests.sum(axis=1) > 1)[:, None] & (counts[client] > 0), tests, 0
        )
        donor, k = divmod(int(np.argmax(spare)), spare.shape[1])
        if spare[donor, k] == 0:
            return None
        tests[donor, k] -= 1
        tests[client, k] += 1
    return tests


def _enough_samples(pool: _Pool, config: DataConfig) -> None:
    for part, places in (("training", pool.train), ("test", pool.test)):
        total = sum(map(len, places))
        if config.clients > total:
            raise ConfigError(
                f"data.clients = {config.clients}: task {pool.task} has only "
                f"{counted(total, f'{part} sample')}, and every client needs one; "
                f"set data.clients to {total} or less, or lower data.tasks for larger tasks"
            )
