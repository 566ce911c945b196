"""Ways to share samples by number, by order, or by owner."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedknow.client.data.arrays import Dataset
from fedknow.client.data.people import choose_people
from fedknow.client.data.pools import find_column
from fedknow.client.data.shares import (
    Indices,
    Pool,
    TaskShares,
    check_enough_samples,
    proportional,
)
from fedknow.protocols.config import ConfigError, DataConfig
from fedknow.protocols.seeds import generator
from fedknow.protocols.texts import counted

__all__ = [
    "share_by_owner",
    "share_by_quantity",
    "share_by_shards",
]


# --- quantity skew --------------------------------------------------------------------------


def share_by_quantity(
    pools: Sequence[Pool], config: DataConfig, seed: int
) -> list[TaskShares]:
    """Share a task evenly by class and unevenly by number.

    The clients' shares of a task follow Dirichlet(``alpha``), and everybody has at least one
    training and one test sample. Source: "quantity skew" of Li et al., "Federated Learning on
    Non-IID Data Silos" (ICDE 2022).
    """
    shares = []
    for pool in pools:
        check_enough_samples(pool, config)
        rng = generator(seed, "partition/quantity", pool.task)
        weights = rng.dirichlet([config.alpha] * config.clients)
        train = rng.permutation(np.concatenate(pool.train))
        test = rng.permutation(np.concatenate(pool.test))
        shares.append(
            list(
                zip(
                    _cut(train, weights),
                    _cut(test, weights),
                    strict=True,
                ),
            )
        )
    return shares


def _cut(rows: Indices, weights: NDArray[np.float64]) -> list[Indices]:
    """Cut rows by weights, into parts of at least one row each."""
    # One row is everybody's; the weights share out the others.
    spare = len(rows) - len(weights)
    ends = np.rint(weights.cumsum() * spare).astype(np.int64)
    ends += np.arange(1, len(weights) + 1)
    # The weights' sum is one only up to rounding.
    ends[-1] = len(rows)
    return np.split(rows, ends[:-1])


# --- shards ---------------------------------------------------------------------------------


def share_by_shards(
    pools: Sequence[Pool], config: DataConfig, seed: int
) -> list[TaskShares]:
    """Deal equal pieces of the samples sorted by class.

    Each client gets ``data.shards`` pieces, so that it has few classes. Test samples of a class
    are shared in the proportion of its training samples. Source: McMahan et al.,
    "Communication-Efficient Learning of Deep Networks from Decentralized Data" (AISTATS 2017).
    """
    return [_deal_shards(pool, config, seed) for pool in pools]


def _deal_shards(pool: Pool, config: DataConfig, seed: int) -> TaskShares:
    rows = np.concatenate(pool.train)
    labels = np.repeat(
        np.arange(len(pool.classes)),
        list(map(len, pool.train)),
    )
    count = config.clients * config.shards
    if count > len(rows):
        raise ConfigError(
            f"data.shards = {config.shards} for data.clients = {config.clients}: task "
            f"{pool.task} has only {counted(len(rows), 'training sample')} for {count} "
            "shards; lower data.shards or data.clients, or lower data.tasks for larger tasks"
        )
    check_enough_samples(pool, config)
    order = generator(seed, "partition/shards", pool.task).permutation(count)
    pieces = np.array_split(np.arange(len(rows)), count)
    parts = []
    for dealt in np.split(order, config.clients):
        parts.append(np.concatenate([pieces[piece] for piece in dealt]))
    counts = [np.bincount(labels[p], minlength=len(pool.classes)) for p in parts]
    tests = proportional(np.stack(counts), [len(k) for k in pool.test])
    if tests is None:
        raise ConfigError(
            f"data.shards = {config.shards} with data.clients = {config.clients}: task "
            f"{pool.task} has too few test samples of some client's classes; raise "
            "data.shards or lower data.clients"
        )
    ends = tests.cumsum(axis=0)
    shares = []
    for client, part in enumerate(parts):
        test = [
            test_rows[ends[client, k] - tests[client, k] : ends[client, k]]
            for k, test_rows in enumerate(pool.test)
        ]
        shares.append((rows[part], np.concatenate(test)))
    return shares


# --- natural clients ------------------------------------------------------------------------


def share_by_owner(
    dataset: Dataset,
    pools: Sequence[Pool],
    config: DataConfig,
    seed: int,
) -> list[TaskShares]:
    """Give each client the samples of the people that it stands for.

    A column says whose a sample is. Where there are fewer clients than people, people are
    grouped: shuffled by the seed and dealt out in turn. A client may be left without samples
    of a task, which it then does not meet. People who are held out belong to no client.

    Raises
    ------
    ConfigError
        If there are more clients than people with training samples.
    """
    column = find_column(dataset, config.client_column, "data.client_column")
    present = np.intersect1d(column.train, column.test)
    present = np.setdiff1d(present, choose_people(column, config, seed))
    if len(present) < config.clients:
        remark = " who are not held out" if config.held_out else ""
        only_train = len(np.setdiff1d(column.train, column.test))
        raise ConfigError(
            f"data.clients = {config.clients}: column {config.client_column!r} of "
            f"{dataset.name} names {counted(len(present), 'person', 'people')}{remark} with "
            f"training and test samples, and {only_train} with training samples alone; set "
            f"data.clients to {len(present)} or less, or data.holdout to test on a part of "
            "the training samples"
        )
    people = generator(seed, "partition/people").permutation(present)
    # From a person to the client that stands for it; -1: nobody.
    client_of = np.full(len(column.names), -1, np.int64)
    client_of[people] = np.arange(len(people)) % config.clients
    shares = []
    for pool in pools:
        train = _by_client(
            pool.train,
            client_of[column.train],
            config.clients,
        )
        test = _by_client(
            pool.test,
            client_of[column.test],
            config.clients,
        )
        shares.append(list(zip(train, test, strict=True)))
    return shares


def _by_client(
    rows: Sequence[Indices], owner: Indices, clients: int
) -> list[Indices]:
    """Sort a task's rows by their client; ``owner`` says whose each row is."""
    together = np.concatenate(rows)
    order = together[np.argsort(owner[together], kind="stable")]
    # From -1 to the last: what belongs to nobody comes in front.
    cuts = np.searchsorted(owner[order], np.arange(clients + 1))
    return [order[cuts[k] : cuts[k + 1]] for k in range(clients)]
