"""People who are held out: no clients, and models are scored on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedknow.client.data.arrays import Dataset
from fedknow.client.data.columns import Column, Values
from fedknow.client.data.pools import find_column
from fedknow.client.data.shares import Indices, Pool, TaskShares
from fedknow.protocols.config import ConfigError, DataConfig, closest
from fedknow.protocols.seeds import generator
from fedknow.protocols.values import show

__all__ = ["HeldOutPerson", "choose_people", "hold_out_people"]

_NOBODY: Values = np.empty(0, np.int64)


class HeldOutPerson(NamedTuple):
    """A person who is no client.

    Attributes
    ----------
    name : str
        As the column names it.
    rows : list of (ndarray of int64, ndarray of int64)
        Rows of each task, ascending: in the training arrays, and in the test arrays. A person
        may have none of a task.
    """

    name: str
    rows: list[tuple[Indices, Indices]]


def choose_people(column: Column, config: DataConfig, seed: int) -> Values:
    """Choose the people who are held out.

    Parameters
    ----------
    column : Column
        Whose each sample is.
    config : DataConfig
        ``held_out`` says how many, or who.
    seed : int
        Decides who, where a share is asked for.

    Returns
    -------
    ndarray of int64
        Their values in the column, ascending.

    Raises
    ------
    ConfigError
        If the column does not name one of them.
    """
    if not config.held_out:
        return _NOBODY
    if isinstance(config.held_out, list):
        places = {name: value for value, name in enumerate(column.names)}
        for name in config.held_out:
            if name not in places:
                raise ConfigError(
                    f"data.held_out = {show(config.held_out)}: column {config.client_column!r} "
                    f"names nobody {show(name)}{closest(name, list(places))}; it names: "
                    f"{', '.join(column.names[:20])}"
                )
        return np.unique([places[name] for name in config.held_out])
    people = np.union1d(column.train, column.test)
    # At least one, as somebody asked for people to be held out.
    count = max(1, round(config.held_out * len(people)))
    drawn = generator(seed, "partition/held out").permutation(people)
    # In the order of names, so that results list people as the data do.
    return np.sort(drawn[:count])


def hold_out_people(
    dataset: Dataset,
    pools: Sequence[Pool],
    shares: Sequence[TaskShares],
    config: DataConfig,
    seed: int,
) -> list[HeldOutPerson]:
    """Collect the samples of the people who are held out, task by task.

    Nobody trains on any of them, so that training and test samples are both scored. With
    ``data.repeats`` a task has the same ones each time.

    Parameters
    ----------
    dataset : Dataset
        All samples.
    pools : sequence of Pool
        The different tasks.
    shares : sequence of TaskShares
        What clients have of each.
    config : DataConfig
        ``held_out`` and ``client_column``.
    seed : int
        As in :func:`choose_people`.

    Raises
    ------
    ConfigError
        If the column does not name one of them, one has no sample of any task, or a task is
        left to nobody else.
    """
    if not config.held_out:
        return []
    column = find_column(dataset, config.client_column, "data.client_column")
    for pool, clients in zip(pools, shares, strict=True):
        if not any(len(train) and len(test) for train, test in clients):
            raise ConfigError(
                f"data.held_out = {show(config.held_out)}: no client has training and test samples "
                f"of task {pool.task}, so that nobody learns it; hold out fewer people"
            )
    held_out = []
    for person in choose_people(column, config, seed).tolist():
        name = column.names[person]
        rows = []
        for pool in pools:
            rows.append(
                (
                    _rows_of(pool.train, column.train, person),
                    _rows_of(pool.test, column.test, person),
                )
            )
        if not any(len(train) + len(test) for train, test in rows):
            raise ConfigError(
                f"data.held_out = {show(config.held_out)}: {name} has no sample of any task; leave "
                "this person out of the list, or raise data.tasks"
            )
        # A task that comes again is scored on the same samples.
        held_out.append(HeldOutPerson(name, rows * config.repeats))
    return held_out


def _rows_of(rows: Sequence[Indices], owners: Values, person: int) -> Indices:
    together = np.concatenate(rows)
    return np.sort(together[owners[together] == person])
