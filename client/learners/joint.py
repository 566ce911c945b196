"""Joint training on all tasks seen so far, as if nothing were forgotten.

Each of the two ways, on clients and in one place, comes twice. ``joint`` and ``joint-central``
pass over all samples in each round. They are upper bounds, and learn from more samples than
any other method. ``joint-equal`` and ``joint-central-equal`` learn from as many samples as the
others. Those are bounds on the same budget, which a method may surpass.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from fedknow.client.data.stream import TaskData
from fedknow.client.learners.frames.batch import MaskedHead, columns
from fedknow.client.learners.frames.learner import (
    Learner,
    LearnerSettings,
    Round,
    Samples,
)
from fedknow.client.learners.frames.rehearsal import (
    MemorySettings,
    Rehearsal,
    Replay,
    concatenate,
)
from fedknow.client.learners.frames.settings import ANY_HEAD
from fedknow.protocols.seeds import integer

__all__ = [
    "Budget",
    "Joint",
    "JointCentral",
    "JointCentralEqual",
    "JointCentralEqualSettings",
    "JointCentralSettings",
    "JointEqual",
    "JointEqualSettings",
    "JointSettings",
    "UnionTraining",
]


Budget = Literal["all"] | Annotated[float, Field(gt=0)]
"""Samples of a round: all, or a multiple of those that other methods have in it."""


def _count(budget: Budget, equal_count: int, everything: Replay) -> int:
    """Say how many samples a round draws; others draw ``equal_count``."""
    return len(everything) if budget == "all" else int(budget * equal_count)


class JointSettings(MemorySettings):
    """Settings of :class:`Joint`."""

    memory: float = Field(1.0, ge=1, le=1)
    """All samples of past tasks are kept."""
    budget: Budget = "all"
    """Samples of a round: those of all tasks seen, or a multiple of those that other methods
    have in it, the current task's."""


class JointEqualSettings(JointSettings):
    """Settings of :class:`JointEqual`."""

    budget: Budget = 1.0
    """Samples of a round, as a multiple of those that other methods have in it; or ``all``."""


class JointCentralSettings(LearnerSettings):
    """Settings of :class:`JointCentral`."""

    budget: Budget = "all"
    """Samples of a round: those of all clients and all tasks seen, or a multiple of those that
    all chosen clients of FedAvg have in it together."""


class JointCentralEqualSettings(JointCentralSettings):
    """Settings of :class:`JointCentralEqual`."""

    budget: Budget = 1.0
    """Samples of a round, as a multiple of those that FedAvg's clients have in it; or ``all``."""


class _Jointly(Learner):
    """Training on samples of many tasks at once."""

    heads = ANY_HEAD

    def sample(self, everything: Replay, count: int, round: Round) -> Samples:
        """Draw at most ``count`` samples, each with its slice of the head."""
        # A stream of its own: the order of batches must not depend on the draw.
        draws = torch.Generator().manual_seed(integer(round.seed, "joint"))
        order = torch.randperm(len(everything), generator=draws)
        # Sorted, so that all samples drawn are the same training as without a draw.
        index = order[: self.drawn(everything, count)].sort().values
        # Samples of different tasks are scored among different classes.
        head = MaskedHead(everything.head[index])
        return Samples(everything.x[index], everything.y[index], head)

    def drawn(self, everything: Replay, count: int) -> int:
        """Tell how many samples a round draws where ``count`` are asked for.

        They are at least as many as a step takes.
        """
        return min(max(self.smallest_batch(everything.x), count), len(everything))


class UnionTraining(_Jointly, Rehearsal):
    """A frame: train on the task's samples and all stored ones as one set."""

    def union(self, task: TaskData) -> Replay:
        """Join samples of past tasks, in their order, and the task's."""
        width = self.head.out_features
        x, y = task.train.x, task.train.y
        current = Replay(
            x, y, columns(task.head, width, self.device).expand(len(y), -1)
        )
        return (
            concatenate([self.memory.all(task, width), current])
            if self.memory.tasks
            else current
        )


class Joint(UnionTraining):
    """Federated joint training on all tasks seen. An upper bound.

    Bodies are averaged. In each epoch a client passes over its samples of all tasks seen, so
    in task t it learns from about t times the samples of other methods. In the first task it
    is plain local training.

    Keeps: every sample of every task. Sends: what ``exchange`` says, nothing more. Needs: what
    :class:`~fedknow.client.learners.baselines.Finetune` needs, times the tasks seen. Valid: any
    model, task- or class-incremental.
    """

    Settings = JointSettings
    settings: JointSettings

    def training_data(self, task: TaskData, round: Round) -> Samples:
        """Draw from the samples of all tasks seen."""
        union = self.union(task)
        count = _count(self.settings.budget, len(task.train), union)
        return self.sample(union, count, round)


class JointEqual(Joint):
    """Federated joint training on the sample budget of the other methods.

    A round draws as many samples of all tasks as the current one has (times ``budget``), and
    passes over them as often as other methods do.

    Keeps: every sample of every task. Sends: what ``exchange`` says, nothing more. Needs: what
    :class:`~fedknow.client.learners.baselines.Finetune` needs, times ``budget``. Valid: any
    model, task- or class-incremental.
    """

    Settings = JointEqualSettings


class JointCentral(_Jointly):
    """Joint training in one place, on all clients' data. An upper bound.

    The server trains one model on all tasks seen.

    The rounds are in :class:`fedknow.strategies.joint.JointCentral`; clients take the model and
    are scored, no more. In each epoch it passes over the samples of all clients and all tasks
    seen.

    Keeps: nothing on clients, every sample on the server. Sends: nothing; clients get the model
    where it is scored. Needs: nothing of clients, and of the server the training of all of
    them, in each round and on all tasks seen. Valid: any model, task- or class-incremental;
    where the server has the data, so not with ``data.name = "local"``.
    """

    Settings = JointCentralSettings
    settings: JointCentralSettings
    strategy: ClassVar[str] = "joint-central"

    def fit_on(
        self,
        everything: Replay,
        count: int,
        task: TaskData,
        round: Round,
    ) -> dict[str, float]:
        """Train one round on a draw of at most ``count`` samples."""
        self._samples = self.sample(everything, count, round)
        return self.fit(task, round)

    def training_data(self, task: TaskData, round: Round) -> Samples:
        """Give what was drawn for this round."""
        return self._samples

    @classmethod
    def strategy_options(cls, settings: LearnerSettings) -> dict[str, Any]:
        """Return the strategy's budget, in which 0 stands for all."""
        # The strategy's budget is a number, and 0 stands for all samples.
        options = settings.model_dump()
        return {
            "budget": 0.0 if options["budget"] == "all" else options["budget"]
        }


class JointCentralEqual(JointCentral):
    """Joint training in one place, on the sample budget of FedAvg's clients.

    A round draws as many samples of all tasks and clients as FedAvg's clients have in it (times
    ``budget``), and passes over them as often.

    Keeps: nothing on clients, every sample on the server. Sends: nothing; clients get the model
    where it is scored. Needs: of the server the training of FedAvg's clients, times ``budget``.
    Valid: any model, task- or class-incremental; where the server has the data, so not with
    ``data.name = "local"``.
    """

    Settings = JointCentralEqualSettings
