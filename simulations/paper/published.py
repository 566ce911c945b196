"""The paper's values, method by method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedknow.server.reports.groups import Group
from fedknow.simulations.paper.protocol import Variant, paper_table

__all__ = [
    "Published",
    "Result",
    "by_task",
    "published_values",
    "tasks_compared",
    "value_after",
]

Published = Mapping[str, Any]
"""Values of one method (see ``paper.toml``)."""


@dataclass(frozen=True)
class Result:
    """The runs of a variant beside the paper's values.

    Attributes
    ----------
    experiment : str
        Such as ``"5.1"``.
    variant : Variant
        The comparison that was run.
    groups : mapping
        The measured runs by the name that a method was asked for by.
    published : mapping
        The paper's values by method; capitals mark one that is not run.
    """

    experiment: str
    variant: Variant
    groups: Mapping[str, Group]
    published: Mapping[str, Published]

    def published_for(self, method: str) -> Published:
        """Return the paper's values of a method; empty where it has none."""
        return self.published.get(method, {})

    def only_published(self) -> dict[str, Published]:
        """Return the values of methods that are not run."""
        return {
            name: values
            for name, values in self.published.items()
            if not name.islower()
        }


def published_values(experiment: str, variant: str) -> dict[str, Published]:
    """Return the paper's values of a variant by method."""
    table = paper_table()
    spec = table["experiments"][experiment]
    values: dict[str, Published] = {}
    # Values that two experiments share stand with the first of them in the table.
    for source in (spec.get("as_in", experiment), experiment):
        for method, published in table["values"][source].get(variant, {}).items():
            values[method] = {**values.get(method, {}), **published}
    return values


def by_task(published: Published, key: str) -> dict[int, float]:
    """Return values by the number of tasks learned.

    Fewer values than tasks are of the last tasks.
    """
    values = published.get(key, [])
    # A slice from -0 would be the whole list.
    if not values:
        return {}
    tasks = published["tasks"][-len(values) :]
    return dict(zip(tasks, values, strict=True))


def tasks_compared(published: Published, group: Group) -> int:
    """Return the most tasks after which both have a value.

    Where the paper has none, these are all tasks that the runs have ended.
    """
    # Interrupted runs count up to their last complete task.
    ended = min(run.tasks for run in group.runs)
    shared = [task for task in published.get("tasks", ()) if task <= ended]
    return max(shared, default=ended)


def value_after(published: Published, key: str, tasks: int) -> tuple[float, int]:
    """Return the paper's value after so many tasks, or else its last.

    Returns
    -------
    float
        NaN where the paper has none at all.
    int
        The number of tasks after which it is.
    """
    values = by_task(published, key)
    if tasks in values or not values:
        return values.get(tasks, math.nan), tasks
    # The nearest value that the paper shows.
    last_task = max(values)
    return values[last_task], last_task
