"""Joint training on all tasks seen so far: what a continual learner could reach if nothing had to
be forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.frames.learner import (
    Batch,
    Learner,
    LearnerSettings,
    Round,
    widen,
)
from fedknow.client.learners.frames.rehearsal import (
    MemorySettings,
    Rehearsal,
    Replay,
    columns,
)
from fedknow.protocols.seeds import integer

__all__ = [
    "Joint",
    "JointCentral",
    "JointCentralSettings",
    "JointSettings",
    "UnionTraining",
    "join",
]


class JointSettings(MemorySettings):
    """Settings of :class:`Joint`."""

    memory: float = Field(1.0, ge=1, le=1)
    """All samples of past tasks are kept."""
    budget: float = Field(1.0, gt=0)
    """Samples of a round, as a multiple of those that other methods have in it: the current task's."""


class JointCentralSettings(LearnerSettings):
    """Settings of :class:`JointCentral`."""

    budget: float = Field(1.0, gt=0)
    """Samples of a round, as a multiple of those that all chosen clients of FedAvg have in it
    together."""


class _Jointly(Learner):
    """Training on samples of many tasks at once."""

    def fit_on(
        self, everything: Replay, count: int, task: TaskData, round: Round
    ) -> dict[str, float]:
        """One round on a random draw of at most ``count`` samples, each scored in its own slice of
        the head."""
        draws = torch.Generator().manual_seed(integer(round.seed, "joint"))
        index = (
            torch.randperm(len(everything), generator=draws)[
                : self.drawn(everything, count)
            ]
            .sort()
            .values
        )
        self._drawn = Replay(
            everything.x[index], everything.y[index], everything.head[index]
        )
        return super().fit(
            replace(task, train=Split(self._drawn.x, self._drawn.y)), round
        )

    def drawn(self, everything: Replay, count: int) -> int:
        """How many samples a round draws where ``count`` are asked for: at least as many as a step
        takes."""
        return min(max(self.smallest_batch(everything.x), count), len(everything))

    cost_key = Learner.cost_key

    def gradient(self, batch: Batch) -> tuple[float, int]:
        """Gradients of the mean loss."""
        drawn = Replay(
            batch.x, self._drawn.y[batch.index], self._drawn.head[batch.index]
        )
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            z = widen(self.model(batch.x))
        loss = drawn.loss(z)
        loss.backward()  # type: ignore[no-untyped-call]
        hits = z.detach().masked_fill(~drawn.head, -torch.inf).argmax(1) == drawn.y
        return loss.item(), int(hits.sum())


class UnionTraining(_Jointly, Rehearsal):
    """A learner that trains on the task's samples and on all it has stored as one set; a frame."""

    def union(self, task: TaskData) -> Replay:
        """Samples of past tasks, in their order, and the task's."""
        width = self.head.out_features
        x, y = task.train.x, task.train.y
        here = Replay(x, y, columns(task.head, width, self.device).expand(len(y), -1))
        return join([self.memory.all(task, width), here]) if self.memory.tasks else here


class Joint(UnionTraining):
    """Joint training, federated: each client trains on all the tasks it has seen, and bodies are
    averaged. A bound.

    A round draws as many samples of all tasks as the current one has (times ``budget``) and
    passes over them as often as other methods do: as many samples are learned from. In the
    first task it is plain local training.

    Keeps: every sample of every task. Sends: what ``exchange`` says, nothing more. Needs: what
    :class:`~fedknow.client.learners.baselines.Finetune` needs, times ``budget``. Valid: any
    model, task- or class-incremental.
    """

    Settings = JointSettings
    settings: JointSettings

    metered = ("fit",)

    def fit(self, task: TaskData, round: Round) -> dict[str, float]:
        """One round on samples of all tasks seen."""
        return self.fit_on(
            self.union(task), int(self.settings.budget * len(task.train)), task, round
        )


class JointCentral(_Jointly):
    """Joint training in one place: the server trains one model on all clients' data of all tasks
    seen. A bound.

    The rounds are in :class:`fedknow.strategies.joint.JointCentral`; clients take the model and
    are scored, no more. A round draws as many samples of all tasks and clients as FedAvg's
    clients have in it (times ``budget``), and passes over them as often.

    Keeps: nothing on clients, every sample on the server. Sends: nothing; clients get the model
    where it is scored. Needs: nothing of clients, and of the server the training of all of
    them, times ``budget``. Valid: any model, task- or class-incremental; where the server has
    the data, so not with ``data.name = "local"``.
    """

    Settings = JointCentralSettings
    settings: JointCentralSettings
    strategy: ClassVar[str] = "joint-central"

    @classmethod
    def strategy_options(cls, settings: LearnerSettings) -> dict[str, Any]:
        """The strategy's budget."""
        return settings.model_dump()


def join(parts: Sequence[Replay]) -> Replay:
    """Samples of several tasks or clients as one."""
    fields: list[list[Tensor]] = [
        [getattr(part, name) for part in parts] for name in ("x", "y", "head")
    ]
    return Replay(*map(torch.cat, fields))
