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
from fedknow.client.data.domains import SHIFTS
from fedknow.client.data.pools import make_pools
from fedknow.client.data.recurrence import (
    NO_ROWS,
    Draft,
    blur,
    count_tasks,
    drop_labels,
    repeat,
)
from fedknow.client.data.shares import SHARINGS, Indices, Pool, TaskShares
from fedknow.client.data.skews import (
    share_by_owner,
    share_by_quantity,
    share_by_shards,
)
from fedknow.protocols.config import ConfigError, DataConfig
from fedknow.protocols.seeds import generator

__all__ = ["Partition", "Share", "make_partition"]


class Share(NamedTuple):
    """One client's share of one task."""

    classes: tuple[int, ...]
    """Classes of the task; all clients have the same ones where boundaries are sharp."""
    train: Indices
    """Places in the training arrays, ascending."""
    test: Indices
    """Places in the test arrays, ascending."""
    held: tuple[int, ...]
    """Those of the classes that the client has training samples of."""
    counts: tuple[int, ...] = ()
    """How many training samples of each of these."""
    domain: int = -1
    """The domain that its samples are moved to (:mod:`~fedknow.client.data.domains`); -1:
    none."""
    domains: Indices = NO_ROWS
    """The domain of each training row; empty where all are of ``domain``."""


@dataclass(frozen=True, eq=False)
class Partition:
    """The samples of every client, task by task.

    Attributes
    ----------
    tasks : tuple of tuple of Share
        ``tasks[client][position]``; positions count in the client's own order of tasks. A
        client may have fewer than others.
    length : int
        Length of the stream; 0: the tasks of the client that has most.
    """

    tasks: tuple[tuple[Share, ...], ...]
    length: int = 0

    @property
    def positions(self) -> int:
        """Length of the stream: how many tasks a client can have."""
        return self.length or max(map(len, self.tasks))

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all classes and rows: equal for equal partitions."""
        # Little-endian on every machine. Lengths stand before values, so that no two
        # partitions give the same bytes.
        total = hashlib.sha256()
        lengths = list(map(len, self.tasks))
        shape = [len(lengths), self.positions]
        if set(lengths) != {self.positions}:
            # A length below 0 announces that those of the clients follow.
            shape = [len(lengths), -self.positions, *lengths]
        total.update(np.array(shape, "<i8").tobytes())
        for share in chain.from_iterable(self.tasks):
            for part in (share.classes, share.train, share.test):
                total.update(np.array([len(part)], "<i8").tobytes())
                total.update(np.asarray(part, "<i8").tobytes())
            # Behind the rows, and only where there are domains: so partitions without them
            # have the digest that they always had.
            if share.domain >= 0:
                numbers = [share.domain, len(share.domains), *share.domains]
                total.update(np.array(numbers, "<i8").tobytes())
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
    summary: dict[str, Any] = {
        "classes": list(share.classes),
        "held": list(share.held),
        "counts": list(share.counts),
        "train": len(share.train),
        "test": len(share.test),
    }
    if share.domain >= 0:
        summary["domain"] = share.domain
    return summary


def make_partition(dataset: Dataset, config: DataConfig, seed: int) -> Partition:
    """Cut a data set into tasks and share each task among the clients.

    Tasks are the data set's groups (where it has them and ``classes_per_task`` is 0), else
    blocks of consecutive classes. ``class_order = "shuffled"`` shuffles the groups or the
    classes first. In a domain-incremental stream each task is a domain (``data.domain``) with
    all classes. ``partition`` decides the shares:

    * ``paper`` (FedKNOW, ICDE 2023): a client draws between ``classes_min`` and ``classes_max``
      of the task's classes. It gets the fraction ``samples`` of each one's training samples,
      and ``test_samples`` of its test samples;
    * ``iid``: all samples of the task in equal parts (flwr-datasets' ``IidPartitioner``'s),
      train and test alike;
    * ``dirichlet``: the parts of each class follow Dirichlet(``alpha``) (flwr-datasets'
      ``DirichletPartitioner``); the test samples of a class are shared in the proportion of its
      training samples;
    * ``quantity``: all classes alike, in parts whose sizes follow Dirichlet(``alpha``);
    * ``shards``: ``shards`` pieces of the samples sorted by class;
    * ``natural``: the samples of the people that ``client_column`` names.

    Then the tasks come ``repeats`` times, ``blur`` of their training samples come early or
    late, and ``labelled`` of these stay. The result depends on the data, ``config`` and
    ``seed`` only. Every client has at least one training and one test sample of each of its
    tasks.

    Raises
    ------
    ConfigError
        If there are too few classes or samples for what is asked; says which settings to change.
    """
    pools = make_pools(dataset, config, seed)
    shares = _share_out(dataset, pools, config, seed)
    counts = count_tasks(config)
    clients = []
    for client in range(config.clients):
        drafts = _drafts(dataset, pools, shares, config, client, seed)
        if not drafts:
            raise ConfigError(
                f"data.clients = {config.clients}: client {client} has no task with both "
                "training and test samples; lower data.clients, so that more people make a "
                "client, or lower data.tasks"
            )
        drafts = repeat(drafts, config, seed, client)[: counts[client]]
        drafts = blur(drafts, config, seed, client)
        clients.append(
            tuple(
                _share(
                    dataset,
                    drop_labels(
                        draft, dataset.train_y, config, seed, (client, place)
                    ),
                )
                for place, draft in enumerate(drafts)
            )
        )
    return Partition(tuple(clients), config.tasks)


_SHARINGS = {
    **SHARINGS,
    "quantity": share_by_quantity,
    "shards": share_by_shards,
}


def _share_out(
    dataset: Dataset,
    pools: Sequence[Pool],
    config: DataConfig,
    seed: int,
) -> list[TaskShares]:
    """Share each task's rows among the clients."""
    if config.partition == "natural":
        return share_by_owner(dataset, pools, config, seed)
    return _SHARINGS[config.partition](pools, config, seed)


def _drafts(  # noqa: PLR0913  # what one client has, of all that was made before
    dataset: Dataset,
    pools: Sequence[Pool],
    shares: Sequence[TaskShares],
    config: DataConfig,
    client: int,
    seed: int,
) -> list[Draft]:
    """List a client's different tasks, in its own order."""
    is_domain = config.scenario == "domain-incremental"
    drafts = []
    for task in _task_order(len(pools), config, seed, client).tolist():
        train, test = shares[task][client]
        # Natural clients need not have samples of every task; the others have.
        if len(train) == 0 or len(test) == 0:
            continue
        classes = (
            tuple(range(dataset.classes)) if is_domain else pools[task].classes
        )
        domain = task if is_domain and config.domain in SHIFTS else -1
        drafts.append(Draft(classes, train, test, domain))
    return drafts


def _task_order(
    tasks: int,
    config: DataConfig,
    seed: int,
    client: int,
) -> Indices:
    if config.task_order == "shuffled":
        # By client, so that one more client changes no other one's order.
        return generator(seed, "partition/order", client).permutation(tasks)
    return np.arange(tasks)


def _share(dataset: Dataset, draft: Draft) -> Share:
    """Finish a share: rows in their order, and what is known of them."""
    # Ascending rows read a mapped file from front to back.
    order = np.argsort(draft.train, kind="stable")
    train = draft.train[order]
    held, counts = np.unique(dataset.train_y[train], return_counts=True)
    # Samples that come early or late may be of classes that are none of the task's.
    classes = dict.fromkeys([*draft.classes, *held.tolist()])
    return Share(
        tuple(classes),
        train,
        np.sort(draft.test),
        tuple(held.tolist()),
        tuple(counts.tolist()),
        draft.domain,
        draft.domains[order] if len(draft.domains) else NO_ROWS,
    )
