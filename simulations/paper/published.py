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
    """What a variant came to.

    Attributes
    ----------
    experiment : str
        Such as ``"5.1"``.
    variant : Variant
        What was run.
    groups : mapping
        Our runs by the name that a method was asked for by.
    published : mapping
        The paper's values by method; capitals mark one that is not run.
    """

    experiment: str
    variant: Variant
    groups: Mapping[str, Group]
    published: Mapping[str, Published]

    def published_for(self, method: str) -> Published:
        """Give the paper's values of a method; empty where it has none."""
        return self.published.get(method, {})

    def only_published(self) -> dict[str, Published]:
        """Give the values of methods that are not run."""
        return {
            name: values
            for name, values in self.published.items()
            if not name.islower()
        }


def published_values(experiment: str, variant: str) -> dict[str, Published]:
    """Give the paper's values of a variant by method."""
    table = paper_table()
    spec = table["experiments"][experiment]
    values: dict[str, Published] = {}
    # What two experiments share stands with the first.
    for source in (spec.get("as_in", experiment), experiment):
        for method, found in table["values"][source].get(variant, {}).items():
            values[method] = {**values.get(method, {}), **found}
    return values


def by_task(published: Published, key: str) -> dict[int, float]:
    """Give values by the number of tasks learned; fewer values than tasks are of the last tasks."""
    values = published.get(key, [])
    return (
        dict(zip(published["tasks"][-len(values) :], values, strict=True))
        if values
        else {}
    )


def tasks_compared(published: Published, group: Group) -> int:
    """Give the most tasks after which both the paper and these runs have a value."""
    done = min(run.tasks for run in group.runs)
    return max(
        (task for task in published.get("tasks", ()) if task <= done), default=done
    )


def value_after(published: Published, key: str, tasks: int) -> tuple[float, int]:
    """Give the paper's value after so many tasks, or else its last, and after how many it is."""
    values = by_task(published, key)
    if tasks in values or not values:
        return values.get(tasks, math.nan), tasks
    last = max(values)
    return values[last], last
