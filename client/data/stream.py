"""A client's view of the data: one task after another.

This module is light: learners import it, and it reads no data set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fedknow.client.data.samples import SampleSpec

__all__ = ["HeldOutTask", "Split", "TaskData", "TaskStream"]


@dataclass(frozen=True, eq=False)
class Split:
    """Samples ready for a model.

    Row ``i`` of all tensors is one sample. Code that does not look into samples selects rows
    and stays valid for any kind of them.

    Attributes
    ----------
    x : Tensor [n, ...]
        Model inputs as the stream's ``spec`` declares them: float32 ``[n, C, H, W]`` for images,
        int64 ``[n, T]`` for tokens (:class:`~fedknow.client.data.SampleSpec`).
    y : Tensor of int64, shape (n,)
        Labels of the whole head.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, eq=False)
class TaskData:
    """One client's share of one task.

    Attributes
    ----------
    task : int
        Position in this client's order, from 0.
    classes : tuple of int
        The task's classes: its slice of the head, whichever of them the client has samples of.
    seen : tuple of int
        Classes of this task and all earlier ones, in the order met.
    train, test : Split
        The client's samples.
    is_incremental : bool
        Whether the scenario is class-incremental. A test sample may then be of any class seen,
        so the head's slice grows.
    """

    task: int
    classes: tuple[int, ...]
    seen: tuple[int, ...]
    train: Split
    test: Split
    is_incremental: bool = False

    @property
    def head(self) -> tuple[int, ...]:
        """The slice of the head in use: ``seen`` if incremental, else ``classes``."""
        return self.seen if self.is_incremental else self.classes


@dataclass(frozen=True, eq=False)
class HeldOutTask:
    """Samples of a task of a person who is no client.

    Attributes
    ----------
    classes : tuple of int
        The task's classes.
    parts : tuple of Split
        The samples, in no, one or two parts.
    """

    classes: tuple[int, ...]
    parts: tuple[Split, ...]


class TaskStream(Protocol):
    """The tasks of all clients."""

    @property
    def tasks(self) -> int:
        """Length of the stream."""
        ...

    @property
    def classes(self) -> int:
        """Width of the head."""
        ...

    @property
    def spec(self) -> SampleSpec:
        """What a sample is."""
        ...

    @property
    def clients(self) -> int:
        """Number of clients."""
        ...

    def length(self, client: int) -> int:
        """Count the tasks that a client has: ``tasks`` or fewer."""
        ...

    def task(self, client: int, task: int) -> TaskData:
        """Give a client's share of the task at a position of its own order.

        A client that has fewer tasks than others goes on with its last one.
        """
        ...
