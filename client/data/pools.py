"""Tasks: the classes and rows of each, before clients share them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from fedknow.client.data.arrays import Dataset
from fedknow.client.data.columns import Column
from fedknow.client.data.shares import Indices, Pool, proportional
from fedknow.protocols.config import ConfigError, DataConfig
from fedknow.protocols.seeds import generator
from fedknow.protocols.texts import counted

__all__ = ["find_column", "make_pools", "rows_by_class"]

log = logging.getLogger(__name__)

_ATTEMPTS = 50
"""How often shares of labels are drawn before they count as impossible."""


def make_pools(dataset: Dataset, config: DataConfig, seed: int) -> list[Pool]:
    """Cut a data set into its different tasks.

    Each row belongs to one task at most. With ``data.repeats`` a task comes several times, and
    is one pool here.

    Raises
    ------
    ConfigError
        If there are too few classes, domains or samples for so many tasks.
    """
    count = config.tasks // config.repeats
    if config.scenario == "domain-incremental":
        return _domains(dataset, config, seed)
    return _pools(dataset, _task_classes(dataset, config, seed, count), seed)


# --- tasks of classes -----------------------------------------------------------------------


def _task_classes(
    dataset: Dataset,
    config: DataConfig,
    seed: int,
    tasks: int,
) -> list[tuple[int, ...]]:
    """Decide the classes of each task."""
    rng = generator(seed, "partition/classes")
    is_shuffled = config.class_order == "shuffled"
    # A size that was set goes before the data set's own tasks.
    if dataset.groups and config.classes_per_task == 0:
        count = len(dataset.groups)
        if tasks > count:
            raise ConfigError(
                f"data.tasks = {config.tasks}: {dataset.name} has "
                f"{counted(count, 'natural task')}; set data.tasks to "
                f"{count * config.repeats} or less, "
                "or data.classes_per_task for tasks of equal size"
            )
        order = rng.permutation(count) if is_shuffled else np.arange(count)
        return [dataset.groups[group] for group in order[:tasks]]
    size = _task_size(dataset, config, tasks)
    labels = np.arange(dataset.classes)
    if is_shuffled:
        labels = rng.permutation(labels)
    blocks = labels[: tasks * size].reshape(tasks, size)
    return [tuple(block) for block in blocks.tolist()]


def _task_size(dataset: Dataset, config: DataConfig, tasks: int) -> int:
    """Decide how many classes each task has."""
    size = config.classes_per_task or dataset.classes // tasks
    if size == 0 or tasks * size > dataset.classes:
        required = tasks * max(size, 1)
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
    train = rows_by_class(dataset.train_y, dataset.classes)
    test = rows_by_class(dataset.test_y, dataset.classes)
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


def rows_by_class(y: Indices, classes: int) -> list[Indices]:
    """Collect the rows of each class, ascending."""
    # A stable sort keeps the rows of a class in their order in the data set.
    order = np.argsort(y, kind="stable")
    starts = np.searchsorted(y[order], np.arange(1, classes))
    return np.split(order, starts)


def _shuffled(rows: Indices, part: str, label: int, seed: int) -> Indices:
    return generator(seed, f"partition/{part}", label).permutation(rows)


def _check_class(
    dataset: Dataset,
    task: int,
    label: int,
    rows: Sequence[Indices],
    part: str,
) -> None:
    if len(rows[label]) == 0:
        raise ConfigError(
            f"data set {dataset.name!r}: class {dataset.class_names[label]!r} of "
            f"task {task} has no {part} samples; every class needs both"
        )


# --- tasks of domains -----------------------------------------------------------------------


def find_column(dataset: Dataset, name: str, key: str) -> Column:
    """Find a column of a data set by a setting.

    Parameters
    ----------
    dataset : Dataset
    name : str
        Name of the column.
    key : str
        The setting that names it, for the error.

    Raises
    ------
    ConfigError
        If the data set has no such column; names those it has.
    """
    if name in dataset.columns:
        return dataset.columns[name]
    has = ", ".join(dataset.columns) or "none"
    raise ConfigError(
        f"{key} = {name!r}: {dataset.name} has no such column; it has: {has}. Set {key} to one "
        "of them, or give the data set columns (Dataset.from_arrays(..., columns=...))"
    )


def _domains(dataset: Dataset, config: DataConfig, seed: int) -> list[Pool]:
    """Make a task of each domain, with all classes that it has samples of."""
    train = rows_by_class(dataset.train_y, dataset.classes)
    test = rows_by_class(dataset.test_y, dataset.classes)
    count = config.tasks // config.repeats
    if config.domain == "column":
        train, test, parts = _by_column(dataset, config, seed, (train, test))
    else:
        train = [_shuffled(r, "train", k, seed) for k, r in enumerate(train)]
        test = [_shuffled(r, "test", k, seed) for k, r in enumerate(test)]
        parts = (
            _drawn_shares(train, test, config, seed)
            if config.domain == "labels"
            else (_even_shares(train, count), _even_shares(test, count))
        )
    pools = []
    for task in range(count):
        pool = _domain_pool(task, (train, test), parts)
        if not pool.classes:
            raise ConfigError(
                f"data.tasks = {config.tasks}: domain {task} of {dataset.name} has no class "
                "with both training and test samples; lower data.tasks, or choose another "
                "data.domain or data.domain_column"
            )
        pools.append(pool)
    _tell_left_out(pools, dataset, config)
    return pools


def _tell_left_out(
    pools: Sequence[Pool], dataset: Dataset, config: DataConfig
) -> None:
    """Warn of samples that no task has though their domain has one."""
    if config.domain == "column" and len(pools) < len(
        dataset.columns[config.domain_column].names
    ):
        return  # the user asked for fewer domains than there are
    train = sum(_size(pool.train) for pool in pools)
    test = sum(_size(pool.test) for pool in pools)
    missing = len(dataset.train_y) - train, len(dataset.test_y) - test
    if any(missing):
        log.warning(
            "%s: %s and %s belong to no task, as their domain has only training or only test "
            "samples of their class",
            dataset.name,
            counted(missing[0], "training sample"),
            counted(missing[1], "test sample"),
        )


def _size(rows: Sequence[Indices]) -> int:
    return sum(map(len, rows))


Ends = np.ndarray
"""Where the rows of each class are cut: int64 [classes, tasks + 1]."""


def _domain_pool(
    task: int,
    rows: tuple[Sequence[Indices], Sequence[Indices]],
    ends: tuple[Ends, Ends],
) -> Pool:
    """Take a task's rows of the classes that have both parts in it."""
    parts = []
    for class_rows, cuts in zip(rows, ends, strict=True):
        part = [
            labelled[cuts[k, task] : cuts[k, task + 1]]
            for k, labelled in enumerate(class_rows)
        ]
        parts.append(part)
    train, test = parts
    # A class that a domain cannot be scored on is not learned in it, nor the other way round.
    classes = [
        k for k in range(len(train)) if len(train[k]) > 0 and len(test[k]) > 0
    ]
    return Pool(
        task,
        tuple(classes),
        [train[k] for k in classes],
        [test[k] for k in classes],
    )


def _even_shares(rows: Sequence[Indices], tasks: int) -> Ends:
    """Cut the rows of each class into equal parts, one a task."""
    sizes = np.array([len(labelled) for labelled in rows])
    # Running totals divided: the parts differ by one row at most.
    cuts = sizes[:, None] * np.arange(tasks + 1) // tasks
    return np.asarray(cuts, np.int64)


def _drawn_shares(
    train: Sequence[Indices],
    test: Sequence[Indices],
    config: DataConfig,
    seed: int,
) -> tuple[Ends, Ends]:
    """Draw how the samples of each class are spread over the tasks.

    Each class has shares of its own, from Dirichlet(``domain_alpha``), so that the classes'
    frequencies shift from task to task.
    """
    tasks = config.tasks // config.repeats
    sizes = np.array([len(labelled) for labelled in train])
    tests = [len(labelled) for labelled in test]
    for attempt in range(_ATTEMPTS):
        # Each attempt has a generator of its own, so that it is a new draw.
        rng = generator(seed, "partition/labels", attempt)
        weights = rng.dirichlet([config.domain_alpha] * tasks, len(sizes))
        ends = np.zeros((len(sizes), tasks + 1), np.int64)
        # Running totals are rounded, so that the parts add up to the class.
        ends[:, 1:] = np.rint(weights.cumsum(axis=1) * sizes[:, None])
        # A running total of floats may end a little beside 1.
        ends[:, -1] = sizes
        counts = np.diff(ends).T
        if counts.sum(axis=1).min() == 0:
            continue
        # A task is tested in the proportions that it was trained in.
        shares = proportional(counts, tests)
        if shares is not None:
            test_ends = np.zeros_like(ends)
            test_ends[:, 1:] = shares.cumsum(axis=0).T
            return ends, test_ends
    raise ConfigError(
        f"data.domain_alpha = {config.domain_alpha:g} with data.tasks = {config.tasks}: no draw "
        "gave every task a training and a test sample; raise data.domain_alpha or lower "
        "data.tasks"
    )


def _by_column(
    dataset: Dataset,
    config: DataConfig,
    seed: int,
    rows: tuple[list[Indices], list[Indices]],
) -> tuple[list[Indices], list[Indices], tuple[Ends, Ends]]:
    """Sort the rows of each class by their domain."""
    column = find_column(dataset, config.domain_column, "data.domain_column")
    tasks = config.tasks // config.repeats
    different = len(column.names)
    if tasks > different:
        raise ConfigError(
            f"data.tasks = {config.tasks}: column {config.domain_column!r} of {dataset.name} "
            f"has {counted(different, 'domain')}; set data.tasks to "
            f"{different * config.repeats} or less"
        )
    sorted_rows, ends = [], []
    parts = (("train", column.train), ("test", column.test))
    for (part, values), class_rows in zip(parts, rows, strict=True):
        cuts = np.zeros((len(class_rows), tasks + 1), np.int64)
        ordered = []
        for label, labelled in enumerate(class_rows):
            shuffled = _shuffled(labelled, part, label, seed)
            # Stable, so that within a domain the drawn order stays.
            shuffled = shuffled[np.argsort(values[shuffled], kind="stable")]
            cuts[label] = np.searchsorted(values[shuffled], np.arange(tasks + 1))
            ordered.append(shuffled)
        sorted_rows.append(ordered)
        ends.append(cuts)
    return sorted_rows[0], sorted_rows[1], (ends[0], ends[1])
