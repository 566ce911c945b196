"""Ways to share the samples of a task among clients.

Each way is a function from a task's rows by class, the settings and the seed to the rows of
each client. None looks at a sample: labels are enough.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedknow.client.data.arrays import require
from fedknow.protocols.config import ConfigError, DataConfig
from fedknow.protocols.seeds import generator, integer
from fedknow.protocols.texts import counted

__all__ = [
    "SHARINGS",
    "Indices",
    "Pool",
    "Sharing",
    "TaskShares",
    "check_enough_samples",
    "proportional",
]

Indices = NDArray[np.int64]
"""Rows of a data set's arrays."""

TaskShares = list[tuple[Indices, Indices]]
"""Training and test rows of each client, for one task."""

_ATTEMPTS = 50
"""How often a task's shares are drawn before they count as impossible."""


@dataclass(frozen=True)
class Pool:
    """Rows of one task by class, in an order drawn once from the seed.

    Attributes
    ----------
    task : int
        Number of the task.
    classes : tuple of int
        The task's classes.
    train, test : list of ndarray of int64
        Rows of each class, in the order of ``classes``.
    """

    task: int
    classes: tuple[int, ...]
    train: list[Indices]
    test: list[Indices]


Sharing = Callable[[Sequence[Pool], DataConfig, int], list[TaskShares]]
"""From the pools of all tasks, the settings and the seed to the shares of each task."""


def _part(fraction: float, total: int) -> int:
    """Take a fraction of a count, to the nearest, and at least one."""
    # Halves go up, where Python's round would take them to the even number.
    return max(1, int(fraction * total + 0.5))


# --- paper ----------------------------------------------------------------------------------


def _share_as_paper(
    pools: Sequence[Pool], config: DataConfig, seed: int
) -> list[TaskShares]:
    for pool in pools:
        if config.classes_min > len(pool.classes):
            raise ConfigError(
                f"data.classes_min = {config.classes_min}: task {pool.task} has "
                f"{counted(len(pool.classes), 'class', 'classes')}; "
                f"lower data.classes_min to {len(pool.classes)} or less, "
                "or lower data.tasks for larger tasks"
            )
    if config.share == "overlapping":
        return [_overlapping(pool, config, seed) for pool in pools]
    choices = [_choose_classes(pool, config, seed) for pool in pools]
    if min(map(len, choices)) < config.clients:
        raise _no_room(pools, choices, config)
    pairs = zip(pools, choices, strict=True)
    return [_deal(pool, choice, config) for pool, choice in pairs]


def _no_room(
    pools: Sequence[Pool],
    choices: Sequence[Sequence[Indices]],
    config: DataConfig,
) -> ConfigError:
    """Name the task with the fewest shares, and the ways out."""
    counts = [len(choice) for choice in choices]
    fitting = min(counts)
    tightest = pools[counts.index(fitting)]
    train, test = _disjoint_shares(tightest, config)
    limit = min(config.classes_max, len(tightest.classes))
    return ConfigError(
        f"data.clients = {config.clients}: without sharing samples there is room for "
        f"{counted(fitting, 'client')}. In task {tightest.task} "
        f"data.samples = {config.samples:g} makes "
        f"{counted(int(train.min()), 'share')} of a class's training samples and "
        f"data.test_samples = {config.test_samples:g} makes {test.min()} of its test samples. "
        f"A client needs shares of {config.classes_min} to "
        f"{counted(limit, 'class', 'classes')}. "
        f"Set data.clients to {fitting}, or lower data.samples or data.test_samples, "
        'or let clients hold the same samples: data.share = "overlapping"'
    )


def _draw_class_count(
    pool: Pool, config: DataConfig, rng: np.random.Generator
) -> int:
    limit = min(config.classes_max, len(pool.classes))
    return int(rng.integers(config.classes_min, limit, endpoint=True))


def _overlapping(pool: Pool, config: DataConfig, seed: int) -> TaskShares:
    """Let each client draw by itself: clients may hold the same samples."""
    shares = []
    for client in range(config.clients):
        # A generator of each client's own: one more client changes nothing for the others.
        rng = generator(seed, "partition/overlapping", pool.task, client)
        count = _draw_class_count(pool, config, rng)
        chosen = np.sort(rng.choice(len(pool.classes), count, replace=False))
        # All training draws come before the test draws. The order fixes the numbers.
        train = [_draw(pool.train[k], config.samples, rng) for k in chosen]
        test = [_draw(pool.test[k], config.test_samples, rng) for k in chosen]
        shares.append((np.concatenate(train), np.concatenate(test)))
    return shares


def _draw(rows: Indices, fraction: float, rng: np.random.Generator) -> Indices:
    return rng.choice(rows, _part(fraction, len(rows)), replace=False)


def _disjoint_shares(pool: Pool, config: DataConfig) -> tuple[Indices, Indices]:
    """Count the disjoint shares that each class of a task can be cut into.

    Returns
    -------
    (ndarray of int64, ndarray of int64), each of shape (classes,)
        Shares of training samples, shares of test samples.
    """
    train = [len(rows) // _part(config.samples, len(rows)) for rows in pool.train]
    test = [
        len(rows) // _part(config.test_samples, len(rows)) for rows in pool.test
    ]
    return np.array(train), np.array(test)


def _choose_classes(pool: Pool, config: DataConfig, seed: int) -> list[Indices]:
    """Choose classes for each client, none more often than it has shares.

    Classes with more shares left are likelier, which keeps them even. A draw that runs into a
    dead end is thrown away. Where none succeeds, the longest is returned. A draw for fewer
    clients is the beginning of one for more, so its length is a number of clients that does
    fit.

    Returns
    -------
    list of ndarray of int64
        Places in ``pool.classes``, for each client that there is room for.
    """
    longest: list[Indices] = []
    for attempt in range(_ATTEMPTS):
        rng = generator(seed, "partition/disjoint", pool.task, attempt)
        # A client needs a share of both, training and test samples.
        free = np.minimum(*_disjoint_shares(pool, config))
        choices: list[Indices] = []
        for _ in range(config.clients):
            count = _draw_class_count(pool, config, rng)
            # From fewer classes than the client needs rng.choice could not draw.
            if np.count_nonzero(free) < count:
                break
            # Classes with more free shares are likelier, so that none is used up early.
            likelihood = free / free.sum()
            drawn = rng.choice(len(free), count, replace=False, p=likelihood)
            picked = np.sort(drawn)
            free[picked] -= 1
            choices.append(picked)
        if len(choices) > len(longest):
            longest = choices
        if len(longest) == config.clients:
            break
    return longest


def _deal(
    pool: Pool, choices: Sequence[Indices], config: DataConfig
) -> TaskShares:
    """Give each client the next unused share of each class it has chosen."""
    # Shares of each class that are given out. Training and test shares keep in step.
    used = np.zeros(len(pool.classes), np.int64)

    def next_share(rows: list[Indices], fraction: float, k: int) -> Indices:
        size = _part(fraction, len(rows[k]))
        start = used[k] * size
        return rows[k][start : start + size]

    shares = []
    for chosen in choices:
        train = [next_share(pool.train, config.samples, k) for k in chosen]
        test = [next_share(pool.test, config.test_samples, k) for k in chosen]
        used[chosen] += 1
        shares.append((np.concatenate(train), np.concatenate(test)))
    return shares


# --- equal parts ----------------------------------------------------------------------------


def _share_evenly(
    pools: Sequence[Pool], config: DataConfig, seed: int
) -> list[TaskShares]:
    # The parts of flwr-datasets' IidPartitioner, which takes milliseconds to give out each.
    def deal(rows: list[Indices], purpose: str, task: int) -> list[Indices]:
        shuffled = generator(seed, purpose, task).permutation(
            np.concatenate(rows)
        )
        return np.array_split(shuffled, config.clients)

    shares = []
    for pool in pools:
        check_enough_samples(pool, config)
        train = deal(pool.train, "partition/iid", pool.task)
        test = deal(pool.test, "partition/iid-test", pool.task)
        shares.append(list(zip(train, test, strict=True)))
    return shares


# --- Dirichlet, by flwr-datasets ------------------------------------------------------------


def _share_by_dirichlet(
    pools: Sequence[Pool], config: DataConfig, seed: int
) -> list[TaskShares]:
    return [_dirichlet_task(pool, config, seed) for pool in pools]


def _dirichlet_task(pool: Pool, config: DataConfig, seed: int) -> TaskShares:
    check_enough_samples(pool, config)
    sizes = [len(rows) for rows in pool.train]
    rows = np.concatenate(pool.train)
    # Labels within the task, 0 to its number of classes.
    labels = np.repeat(np.arange(len(pool.classes)), sizes)
    parts, tests = _draw_dirichlet(pool, labels, config, seed)
    ends = np.cumsum(tests, axis=0)
    starts = ends - tests
    shares = []
    for client, part in enumerate(parts):
        test = [
            test_rows[starts[client, k] : ends[client, k]]
            for k, test_rows in enumerate(pool.test)
        ]
        shares.append((rows[part], np.concatenate(test)))
    return shares


def _draw_dirichlet(
    pool: Pool, labels: Indices, config: DataConfig, seed: int
) -> tuple[list[Indices], Indices]:
    """Draw until every client has a training and a test sample.

    Parameters
    ----------
    pool : Pool
        The task.
    labels : ndarray of int64, shape (samples,)
        Labels of the task's training samples, from 0.
    config, seed
        Settings and seed.

    Returns
    -------
    (list of ndarray of int64, ndarray of int64 of shape (clients, classes))
        Places in ``labels`` for each client; test samples of each client by class.
    """
    partitioners = require("flwr_datasets.partitioner")
    available = [len(rows) for rows in pool.test]
    for attempt in range(_ATTEMPTS):
        partitioner = partitioners.DirichletPartitioner(
            num_partitions=config.clients,
            partition_by="label",
            alpha=config.alpha,
            min_partition_size=1,
            # The attempt is in the seed, or each one would draw the same again.
            seed=integer(seed, "partition/dirichlet", pool.task, attempt),
        )
        try:
            parts = _run_partitioner(partitioner, labels, config.clients)
        # Its own word for a draw that left a client empty.
        except ValueError:
            continue
        counts = [
            np.bincount(labels[part], minlength=len(available)) for part in parts
        ]
        tests = proportional(np.stack(counts), available)
        if tests is not None:
            return parts, tests
    raise ConfigError(
        f"data.alpha = {config.alpha:g} with data.clients = {config.clients}: no draw gave "
        f"every client a training and a test sample of task {pool.task} "
        f"({counted(len(labels), 'training sample')}, "
        f"{counted(sum(available), 'test sample')}); "
        "raise data.alpha or lower data.clients or data.tasks"
    )


def _run_partitioner(
    partitioner: Any, labels: Indices, clients: int
) -> list[Indices]:
    """Run one of flwr-datasets' partitioners over labels.

    Returns
    -------
    list of ndarray of int64
        Places in ``labels``, part by part.
    """
    columns = {"label": labels, "value": np.arange(len(labels))}
    table = require("datasets").Dataset.from_dict(columns)
    partitioner.dataset = table.with_format("numpy")
    with warnings.catch_warnings():
        # It warns at each draw that leaves a client empty. We draw again.
        warnings.simplefilter("ignore")
        parts = [partitioner.load_partition(part) for part in range(clients)]
        return [np.asarray(part[:]["value"], np.int64) for part in parts]


def proportional(
    counts: NDArray[np.int64], available: Sequence[int]
) -> NDArray[np.int64] | None:
    """Share out all test samples in the proportion of the training samples.

    Each class is shared by largest remainder. A client that would be left without any takes
    one, of a class it trains on, from the client that has most of that class and more than
    one in all.

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
        # The largest remainder comes in front. Equal ones go by client, as the sort is stable.
        order = np.argsort(tests[:, k] - quota[:, k], kind="stable")
        remaining = total - tests[:, k].sum()
        tests[order[:remaining], k] += 1
    for client in np.flatnonzero(tests.sum(axis=1) == 0):
        # A client with one test sample would itself be left without.
        can_give = (tests.sum(axis=1) > 1)[:, None]
        # Only of classes that the client trains on: on others it could only guess.
        spare = np.where(can_give & (counts[client] > 0), tests, 0)
        # The place of the largest number, as row and column.
        donor, k = divmod(int(np.argmax(spare)), spare.shape[1])
        if spare[donor, k] == 0:
            return None
        tests[donor, k] -= 1
        tests[client, k] += 1
    return tests


def check_enough_samples(pool: Pool, config: DataConfig) -> None:
    """Refuse a task with fewer samples than clients."""
    for part, rows in (("training", pool.train), ("test", pool.test)):
        total = sum(map(len, rows))
        if config.clients > total:
            raise ConfigError(
                f"data.clients = {config.clients}: task {pool.task} has only "
                f"{counted(total, f'{part} sample')}, and every client needs one; "
                f"set data.clients to {total} or less, "
                "or lower data.tasks for larger tasks"
            )


SHARINGS: Mapping[str, Sharing] = {
    "paper": _share_as_paper,
    "iid": _share_evenly,
    "dirichlet": _share_by_dirichlet,
}
"""Ways by their name in ``data.partition``."""
