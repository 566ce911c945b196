"""Tasks in time: repeats, blurred boundaries, missing labels.

Each step takes the shares of one client in its own order, and gives them anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np

from fedknow.client.data.shares import Indices
from fedknow.protocols.config import ConfigError, DataConfig
from fedknow.protocols.seeds import generator
from fedknow.protocols.texts import counted

__all__ = ["NO_ROWS", "Draft", "blur", "count_tasks", "drop_labels", "repeat"]

NO_ROWS: Indices = np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class Draft:
    """One client's share of one task, while it is made.

    Attributes
    ----------
    classes : tuple of int
        The task's classes.
    train, test : ndarray of int64
        Rows of the data set.
    domain : int
        The domain that its samples are moved to; -1: none.
    domains : ndarray of int64
        The domain of each training row, where samples of other tasks are among them; empty
        where all are of ``domain``.
    """

    classes: tuple[int, ...]
    train: Indices
    test: Indices
    domain: int = -1
    domains: Indices = field(default_factory=lambda: NO_ROWS)


def repeat(
    drafts: Sequence[Draft],
    config: DataConfig,
    seed: int,
    client: int,
) -> list[Draft]:
    """Let the tasks come several times, each time with samples of its own.

    The training samples of a task are cut into as many parts; its test samples are the same
    each time, as it is the same task. Source: "class-incremental with repetition" (Hemati et
    al., CoLLAs 2023).
    """
    if config.repeats == 1:
        return list(drafts)
    passes: list[list[Draft]] = [[] for _ in range(config.repeats)]
    for place, draft in enumerate(drafts):
        if len(draft.train) < config.repeats:
            raise ConfigError(
                f"data.repeats = {config.repeats}: client {client} has "
                f"{counted(len(draft.train), 'training sample')} of a task, and each repeat "
                "needs one; lower data.repeats or data.clients, or raise data.samples"
            )
        # By client and task: what one client draws depends on no other.
        rng = generator(seed, "partition/repeats", client, place)
        parts = np.array_split(rng.permutation(draft.train), config.repeats)
        for drafts_of_pass, part in zip(passes, parts, strict=True):
            # Only training samples are split: each repeat is scored on all test samples.
            drafts_of_pass.append(replace(draft, train=part))
    return list(chain.from_iterable(passes))


def blur(
    drafts: Sequence[Draft],
    config: DataConfig,
    seed: int,
    client: int,
) -> list[Draft]:
    """Let a share of each task's training samples come early or late.

    ``data.blur`` of them leave for the tasks next to it, in equal parts to either side, and at
    least one stays. No sample comes twice. Source: the blurred boundaries of Aljundi et al.,
    "Gradient based sample selection" (NeurIPS 2019), and of Koh et al., "i-Blurry" (ICLR
    2022).
    """
    # A single task has no neighbour to give samples to.
    if not config.blur or len(drafts) == 1:
        return list(drafts)
    staying = []
    moves: list[tuple[int, int, Indices]] = []
    for place, draft in enumerate(drafts):
        rng = generator(seed, "partition/blur", client, place)
        rows = rng.permutation(draft.train)
        # One sample stays at least, as a task needs one.
        count = min(round(config.blur * len(rows)), len(rows) - 1)
        # The first and the last task have one neighbour.
        targets = [
            near for near in (place - 1, place + 1) if 0 <= near < len(drafts)
        ]
        for near, part in zip(
            targets, np.array_split(rows[:count], len(targets)), strict=True
        ):
            moves.append((place, near, part))
        staying.append(replace(draft, train=rows[count:]))
    # After all moves are known: samples that came must not move on.
    return [
        _receive(place, staying, drafts, moves) for place in range(len(drafts))
    ]


def _receive(
    place: int,
    staying: Sequence[Draft],
    drafts: Sequence[Draft],
    moves: Sequence[tuple[int, int, Indices]],
) -> Draft:
    """Add what comes to a task from those next to it."""
    draft = staying[place]
    coming = [
        (source, rows)
        for source, target, rows in moves
        if target == place and len(rows)
    ]
    train = [draft.train, *(rows for _, rows in coming)]
    # Samples keep the domain that they come from.
    domains = [np.full(len(draft.train), draft.domain)]
    for source, rows in coming:
        domains.append(np.full(len(rows), drafts[source].domain))
    # Where nothing came, the task's own domain says it all.
    has_domains = draft.domain >= 0 and bool(coming)
    return replace(
        draft,
        train=np.concatenate(train),
        domains=np.concatenate(domains).astype(np.int64)
        if has_domains
        else NO_ROWS,
    )


def drop_labels(
    draft: Draft,
    labels: Indices,
    config: DataConfig,
    seed: int,
    place: tuple[int, int],
) -> Draft:
    """Leave out the training samples that nobody has labelled.

    ``data.labelled`` of each class stay, and at least one: no learner here learns from samples
    without a label.

    Parameters
    ----------
    draft : Draft
    labels : ndarray of int64
        Labels of all training samples of the data set.
    config, seed
        Settings and seed.
    place : tuple of int
        Client and position of its task.
    """
    if config.labelled == 1:
        return draft
    is_labelled = np.zeros(len(draft.train), bool)
    y = labels[draft.train]
    # By class: a rare one must not lose all its labels by chance.
    for label in np.unique(y).tolist():
        places = np.flatnonzero(y == label)
        rng = generator(seed, "partition/labelled", *place, label)
        count = max(1, round(config.labelled * len(places)))
        is_labelled[rng.permutation(places)[:count]] = True
    domains = draft.domains[is_labelled] if len(draft.domains) else NO_ROWS
    return replace(draft, train=draft.train[is_labelled], domains=domains)


def count_tasks(config: DataConfig) -> list[int]:
    """Count the tasks of each client, by ``data.tasks_min``.

    Client 0 has ``tasks``, the last one ``tasks_min``, and those between them evenly in
    between.

    Examples
    --------
    >>> count_tasks(DataConfig(tasks=5, tasks_min=3, clients=4))
    [5, 4, 4, 3]
    """
    fewest = config.tasks_min or config.tasks
    steps = np.linspace(config.tasks, fewest, config.clients)
    # Halves go up; NumPy's `rint` would round them to even numbers.
    counts: list[int] = np.floor(steps + 0.5).astype(int).tolist()
    return counts
