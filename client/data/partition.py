"""Partition: the classes of each task, and each client's samples of it.

One seed fixes all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedknow.client.data.arrays import Dataset
from fedknow.client.data.domains import SHIFTS
from fedknow.client.data.packed import PackedShares, Share
from fedknow.client.data.people import hold_out_people
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

__all__ = ["MOST_LISTED", "QUANTILES", "Partition", "Share", "make_partition"]

MOST_LISTED = 1000
"""Clients that a summary lists one by one."""
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""What a summary of more clients tells of each task."""


@dataclass(frozen=True, eq=False)
class Partition:
    """The samples of every client, task by task.

    Attributes
    ----------
    tasks : PackedShares
        ``tasks[client][position]``; positions count in the client's own order of tasks. A
        client may have fewer than others. Made of any sequences of :class:`Share`.
    length : int
        Length of the stream; 0: the tasks of the client that has most.
    held_out : mapping of str to tuple of Share
        People who are no clients: what they have of each task of the stream. A share may be
        empty.
    """

    tasks: PackedShares
    length: int = 0
    held_out: Mapping[str, tuple[Share, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.tasks, PackedShares):
            object.__setattr__(self, "tasks", PackedShares(self.tasks))

    @property
    def positions(self) -> int:
        """Length of the stream: how many tasks a client can have."""
        return self.length or int(self.tasks.lengths.max())

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all classes and rows: equal for equal partitions."""
        lengths = self.tasks.lengths.tolist()
        shape = [len(lengths), self.positions]
        if set(lengths) != {self.positions}:
            # A length below 0 announces that those of the clients follow.
            shape = [len(lengths), -self.positions, *lengths]
        return self.tasks.digest(shape)

    def summary(self, limit: int = MOST_LISTED) -> dict[str, Any]:
        """Summarise for a log, as JSON.

        Parameters
        ----------
        limit : int
            Clients that are listed. Where there are more, the first of them stand for all, and
            each task has its quantiles over all clients.

        Returns
        -------
        dict
            The digest, and classes and sizes per client and task. Where people are held out,
            theirs too, by name.
        """
        listed = self.tasks[:limit]
        clients = [list(map(_share_summary, shares)) for shares in listed]
        summary: dict[str, Any] = {"digest": self.digest, "clients": clients}
        if len(self.tasks) > limit:
            tasks = [self._task_summary(task) for task in range(self.positions)]
            summary |= {"total": len(self.tasks), "tasks": tasks}
        if self.held_out:
            summary["held_out"] = {
                name: list(map(_share_summary, shares))
                for name, shares in self.held_out.items()
            }
        return summary

    def _task_summary(self, task: int) -> dict[str, Any]:
        summary: dict[str, Any] = {}
        for name in ("train", "test", "held"):
            counts = self.tasks.sizes(name).of_task(task)
            # A stream may be longer than the tasks of any client.
            summary[name] = (
                np.quantile(counts, QUANTILES).tolist() if len(counts) else []
            )
            summary |= {"clients": len(counts), f"{name}_sum": int(counts.sum())}
        return summary


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
    * ``natural``: the samples of the people that ``client_column`` names, but for those that
      ``held_out`` leaves for scoring.

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
    # One client after the other, as a list of all their shares would fill the memory.
    clients = (
        _client_shares(dataset, pools, shares, config, (client, count), seed)
        for client, count in enumerate(counts)
    )
    held_out = _held_out(dataset, pools, shares, config, seed)
    return Partition(PackedShares(clients), config.tasks, held_out)


def _client_shares(  # noqa: PLR0913  # what one client has, of all that was made before
    dataset: Dataset,
    pools: Sequence[Pool],
    shares: Sequence[TaskShares],
    config: DataConfig,
    place: tuple[int, int],
    seed: int,
) -> list[Share]:
    """Make a client's shares; ``place``: its number and that of its tasks."""
    client, count = place
    drafts = _drafts(dataset, pools, shares, config, client, seed)
    if not drafts:
        raise ConfigError(
            f"data.clients = {config.clients}: client {client} has no task with both "
            "training and test samples; lower data.clients, so that more people make a "
            "client, or lower data.tasks"
        )
    drafts = repeat(drafts, config, seed, client)[:count]
    labels = dataset.train_y
    return [
        _share(dataset, drop_labels(draft, labels, config, seed, (client, task)))
        for task, draft in enumerate(blur(drafts, config, seed, client))
    ]


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


def _held_out(
    dataset: Dataset,
    pools: Sequence[Pool],
    shares: Sequence[TaskShares],
    config: DataConfig,
    seed: int,
) -> dict[str, tuple[Share, ...]]:
    """Give what people who are no clients have of each task of the stream."""
    # With repeats, the different tasks come one after another again and again.
    stream = [*pools] * config.repeats
    held_out = {}
    for person in hold_out_people(dataset, pools, shares, config, seed):
        drafts = [
            _draft(dataset, pool, rows, config)
            for pool, rows in zip(stream, person.rows, strict=True)
        ]
        held_out[person.name] = tuple(_share(dataset, each) for each in drafts)
    return held_out


def _drafts(  # noqa: PLR0913  # what one client has, of all that was made before
    dataset: Dataset,
    pools: Sequence[Pool],
    shares: Sequence[TaskShares],
    config: DataConfig,
    client: int,
    seed: int,
) -> list[Draft]:
    """List a client's different tasks, in its own order."""
    drafts = []
    for task in _task_order(len(pools), config, seed, client).tolist():
        train, test = shares[task][client]
        # Natural clients need not have samples of every task; the others have.
        if len(train) == 0 or len(test) == 0:
            continue
        drafts.append(_draft(dataset, pools[task], (train, test), config))
    return drafts


def _draft(
    dataset: Dataset,
    pool: Pool,
    rows: tuple[Indices, Indices],
    config: DataConfig,
) -> Draft:
    """Make a task of its training and test rows."""
    is_domain = config.scenario == "domain-incremental"
    classes = tuple(range(dataset.classes)) if is_domain else pool.classes
    has_shift = is_domain and config.domain in SHIFTS
    return Draft(classes, *rows, pool.task if has_shift else -1)


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
