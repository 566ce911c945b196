"""Work that is no plain step of training, and how the frame counts it.

A step is counted by itself, as is each hook. A method names here what the frame cannot see:
work that a step does only where its data ask for it, loops whose iterations cost the same, and
work that is done once for all clients of a process.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

from torch import Tensor

from fedknow.client.compute import cost

__all__ = ["each", "extra_steps", "on_demand", "once_for_all"]

Item = TypeVar("Item")


def on_demand(name: str, *sizes: Hashable) -> AbstractContextManager[None]:
    """Do work that a step does only where its data ask for it.

    Parameters
    ----------
    name : str
        Names the work among the learner's.
    sizes : hashable
        What its cost depends on: shapes, numbers of samples or classes.
    """
    return cost.part((name, *sizes))


def once_for_all() -> AbstractContextManager[None]:
    """Do work once for all clients of a process; none is charged with it."""
    return cost.free()


def each(items: Iterable[Item], name: str, *sizes: Hashable) -> Iterator[Item]:
    """Go through items of which each takes the same work, such as samples.

    Parameters
    ----------
    items : iterable
        What a loop goes through.
    name : str
        Names the loop among the learner's.
    sizes : hashable
        What the cost of an iteration depends on besides.
    """
    for item in items:
        with on_demand(name, *sizes):
            yield item


def extra_steps(
    indices: Iterable[Tensor],
    name: str,
    *sizes: Hashable,
    is_learning: bool = False,
) -> Iterator[Tensor]:
    """Go through the batches of steps on something else than the model.

    Parameters
    ----------
    indices : iterable of Tensor
        Places of each batch's samples, int64 [n].
    name : str
        Names the loop among the learner's.
    sizes : hashable
        What the cost of a step depends on besides its number of samples.
    is_learning : bool
        Whether its samples are learned from, as in training. Those that go through the
        model's own body are counted anyway.
    """
    for index in indices:
        with on_demand(name, len(index), *sizes):
            if is_learning:
                cost.add(samples=len(index))
            yield index
