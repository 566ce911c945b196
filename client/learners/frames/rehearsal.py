"""Replay memory: a part of each finished task's samples.

Here is what every method has in common that replays them.

Samples are kept as the client trained on them: float32, normalised. That is four bytes a value
where a file of 8-bit images has one, and is what :attr:`Memory.nbytes` counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fedknow.client.data.stream import TaskData
from fedknow.client.learners.frames.batch import columns
from fedknow.client.learners.frames.learner import (
    Batch,
    ContinualSettings,
    Learner,
    Round,
    State,
)
from fedknow.protocols.seeds import integer

__all__ = [
    "Memory",
    "MemorySettings",
    "Rehearsal",
    "Replay",
    "Stored",
    "choose",
    "columns",
    "concatenate",
]


class MemorySettings(ContinualSettings):
    """Settings of a method that keeps samples."""

    memory: float = Field(0.1, gt=0, le=1)
    """Fraction of each task's training samples that the client keeps."""
    memory_floor: int = Field(1, ge=0, le=1_000_000)
    """The fewest samples for each class of a task, whatever ``memory`` says, as far as the task
    has them. Without it a client with few samples may keep none of a class."""
    memory_bytes: int = Field(0, ge=0, le=2**40)
    """The most bytes that a task's samples and labels take. If set, it decides in place of
    ``memory`` and ``memory_floor``; at least one sample is kept. 0: it does not decide."""

    def count(self, x: Tensor, y: Tensor) -> int:
        """Say how many of a task's samples to keep.

        Parameters
        ----------
        x : Tensor
            The samples, [n, ...].
        y : Tensor
            Their labels, int64 [n].

        Returns
        -------
        int
            From 1 to n.

        Examples
        --------
        Ten percent of fifteen samples is one or two, and there are three classes:

        >>> x, y = torch.zeros(15, 1, 2, 2), torch.arange(15) % 3
        >>> MemorySettings(memory=0.1).count(x, y)
        3
        >>> MemorySettings(memory_bytes=200).count(x, y)  # 16 + 8 bytes a sample
        8
        """
        n = len(y)
        if self.memory_bytes:
            limit = self.memory_bytes // (x[0].nbytes + y[0].nbytes)
        else:
            floor = self.memory_floor * int((y.bincount() > 0).sum())
            limit = max(round(self.memory * n), floor)
        return min(max(limit, 1), n)


@dataclass(frozen=True, eq=False)
class Stored:
    """Samples of one finished task.

    Attributes
    ----------
    classes : tuple of int
        The task's classes: its slice of the head.
    x : Tensor
        Float32 [n, C, H, W].
    y : Tensor
        Labels of the whole head, int64 [n].
    """

    classes: tuple[int, ...]
    x: Tensor
    y: Tensor


@dataclass(frozen=True, eq=False)
class Replay:
    """Samples to replay, each with the slice of the head it is scored in.

    They are of any number of tasks.

    Attributes
    ----------
    x : Tensor
        Float32 [n, C, H, W].
    y : Tensor
        Labels of the whole head, int64 [n].
    head : Tensor
        Columns of the head that a prediction may name, bool [n, classes].
    """

    x: Tensor
    y: Tensor
    head: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def loss(self, logits: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy, each sample in its own slice of the head.

        Logits are over the whole head, float [n, classes].
        """
        return F.cross_entropy(
            # Each sample among the classes of its own task, in one call for all.
            logits.masked_fill(~self.head, -torch.inf),
            self.y,
            reduction=reduction,
        )


def concatenate(replays: Sequence[Replay]) -> Replay:
    """Join samples of several tasks or clients."""
    return Replay(
        torch.cat([replay.x for replay in replays]),
        torch.cat([replay.y for replay in replays]),
        torch.cat([replay.head for replay in replays]),
    )


def choose(
    y: Tensor,
    count: int,
    generator: torch.Generator,
    balanced: bool = True,
) -> Tensor:
    """Draw samples to keep.

    Parameters
    ----------
    y : Tensor
        Labels, int64 [n].
    count : int
        How many, at most n.
    generator : torch.Generator
        Source of the draw.
    balanced : bool
        As many of each class as of any other (one more of some, where they do not divide, and
        all of a class that has too few); otherwise uniformly, whatever the classes.

    Returns
    -------
    Tensor
        Indices in ascending order, int64 [count], on the CPU.
    """
    # The generator is the CPU's, for the same draw on any device.
    y = y.cpu()
    order = torch.randperm(len(y), generator=generator)
    if balanced:
        grouped = y[order].argsort(stable=True)
        sizes = torch.bincount(y)
        rank = torch.empty_like(order)  # how many of its class come before each
        rank[grouped] = torch.arange(len(y)) - (
            sizes.cumsum(0) - sizes
        ).repeat_interleave(sizes)
        # By rank within the class: the first of each class, then the second of each, and so on.
        order = order[rank.argsort(stable=True)]
    # In the order of the data set, so that what is kept does not depend on the draw's order.
    return order[:count].sort().values


class Memory:
    """The samples that one client keeps, by task.

    Parameters
    ----------
    tasks : mapping of int to Stored
        What is kept of each finished task.
    """

    def __init__(self, tasks: Mapping[int, Stored] | None = None) -> None:
        self.tasks = dict(tasks or {})

    def __len__(self) -> int:
        """Count the stored samples."""
        return sum(len(stored.y) for stored in self.tasks.values())

    @property
    def nbytes(self) -> int:
        """Size of all samples and labels, in bytes."""
        return sum(
            stored.x.nbytes + stored.y.nbytes for stored in self.tasks.values()
        )

    def store(
        self,
        task: TaskData,
        count: int,
        seed: int,
        balanced: bool = True,
    ) -> None:
        """Keep ``count`` of a task's samples (:func:`choose`), or all it has."""
        x, y = task.train.x, task.train.y
        index = choose(y, count, torch.Generator().manual_seed(seed), balanced)
        self.tasks[task.task] = Stored(task.classes, x[index], y[index])

    def replay_of(self, number: int, current: TaskData, width: int) -> Replay:
        """Give all samples of a past task, with its slice of the head.

        When class-incremental the slice has all classes seen. ``width`` is that of the head.
        """
        stored = self.tasks[number]
        # A class-incremental head is asked for all classes seen, also with old samples.
        head = columns(
            current.head if current.is_incremental else stored.classes,
            width,
            stored.y.device,
        )
        # A view of one row: a mask for each sample would take memory.
        return Replay(stored.x, stored.y, head.expand(len(stored.y), -1))

    def all(self, current: TaskData, width: int) -> Replay:
        """All samples, in the order of tasks.

        Raises
        ------
        ValueError
            If nothing is kept.
        """
        if not self.tasks:
            raise ValueError("the memory is empty: no task is finished")
        return concatenate(
            [
                self.replay_of(number, current, width)
                # In the order of tasks, however the state came back from a file.
                for number in sorted(self.tasks)
            ]
        )

    def state_dict(self) -> State:
        """As tensors and numbers that can be saved."""
        return {
            str(t): {"classes": list(s.classes), "x": s.x, "y": s.y}
            for t, s in self.tasks.items()
        }

    @classmethod
    def from_state(cls, state: State) -> Memory:
        """Reverse :meth:`state_dict`; ``{}`` is an empty memory."""
        return cls(
            {
                int(t): Stored(tuple(s["classes"]), s["x"], s["y"])
                for t, s in state.items()
            }
        )


class Rehearsal(Learner):
    """A learner that keeps samples of each finished task.

    They are in ``self.memory``. It is the frame for methods that replay them.

    During a round ``self.past`` holds all of them, ready for the model, or None in the first
    task, and ``self.draws`` is a generator for choosing among them.
    """

    Settings = MemorySettings
    settings: MemorySettings
    replay = ("memory",)
    balanced = True
    """Whether classes have equal shares of the memory."""
    replays_alone: ClassVar[bool] = False
    """Whether stored samples pass through the model without others, to be trained on."""

    def load_own_state(self, state: State) -> None:
        """Take over the memory."""
        self.memory = Memory.from_state(state.get("memory", {}))
        self.past: Replay | None = None
        self.draws = torch.Generator()

    def own_state(self) -> State:
        """Give the memory."""
        return {"memory": self.memory.state_dict()}

    def begin(self, task: TaskData, round: Round) -> None:
        """Lay out the memory for the round."""
        super().begin(task, round)
        # A generator of its own, so that replay does not change the order of the task's
        # batches.
        self.draws = torch.Generator().manual_seed(integer(round.seed, "replay"))
        self.past = None
        if self.memory.tasks:
            replay = self.memory.all(task, self.head.out_features)
            self.past = Replay(self.images(replay.x), replay.y, replay.head)

    @property
    def smallest_known_batch(self) -> int:
        """The fewest samples a batch may have, as far as it is known yet."""
        return self.batch_minimum or 1

    def draw(self, replay: Replay, count: int) -> Replay:
        """At most ``count`` samples, uniformly at random without replacement."""
        index = torch.randperm(len(replay), generator=self.draws)[:count].to(
            replay.y.device
        )
        return Replay(replay.x[index], replay.y[index], replay.head[index])

    def join(self, batch: Batch, stored: Replay) -> Replay:
        """Join a batch, first, and stored samples."""
        head = batch.head.columns(len(batch.y))
        return Replay(
            self.images(torch.cat([batch.x, stored.x])),
            torch.cat([batch.head.names(batch.y), stored.y]),
            torch.cat([head, stored.head]),
        )

    def end_task(self, task: TaskData, round: Round) -> dict[str, float]:
        """Keep a part of the task's samples."""
        super().end_task(task, round)
        count = self.settings.count(task.train.x, task.train.y)
        if self.replays_alone:
            # Alone, a single stored sample would stop BatchNorm.
            count = max(count, self.smallest_batch(task.train.x))
        seed = integer(round.seed, "memory")
        self.memory.store(task, count, seed, self.balanced)
        return {"knowledge-bytes": float(self.memory.nbytes)}
