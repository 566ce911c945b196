"""The parts of a FedKNOW client, and what it keeps between messages."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import cast

from torch import nn

from fedknow.client.data.stream import TaskData
from fedknow.client.learners.fedknow.checks import check_model
from fedknow.client.learners.fedknow.counts import RoundCounts
from fedknow.client.learners.fedknow.gradients import Student
from fedknow.client.learners.fedknow.inference import infer_tasks
from fedknow.client.learners.fedknow.integrator import integrator_for
from fedknow.client.learners.fedknow.negative_transfer import (
    NegativeTransferGuard,
)
from fedknow.client.learners.fedknow.restorer import Restorer
from fedknow.client.learners.fedknow.selection import SignatureSelection
from fedknow.client.learners.fedknow.settings import FedKnowSettings
from fedknow.client.learners.fedknow.traits import BodyTraits
from fedknow.client.learners.frames.gradient_buffer import GradientBuffer
from fedknow.client.learners.frames.learner import (
    Learner,
    Predictor,
    Round,
    State,
    Tensors,
)
from fedknow.protocols.config import TrainConfig

__all__ = ["KnowledgeClient"]


class KnowledgeClient(Learner):
    """The frame of FedKNOW: its parts, its state, and the course of a round.

    The method itself is :class:`~fedknow.client.learners.fedknow.learner.FedKnow`.
    """

    settings: FedKnowSettings

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        settings: FedKnowSettings,
    ) -> None:
        super().__init__(model, train, settings)
        check_model(self.body, self.head, settings)
        # Teachers, extraction and the model before aggregation work in this copy, one at a time.
        self._scratch = copy.deepcopy(model)
        scratch_body = cast(nn.Module, self._scratch.body)
        traits = BodyTraits(self.body, scratch_body, train.precision)
        self._student = Student(
            self.body, self.head, self.autocast, traits, GradientBuffer()
        )
        self._restorer = Restorer(settings, scratch_body, self.autocast)
        self._selection = SignatureSelection(settings)
        self._integrator = integrator_for(settings)
        self._guard = NegativeTransferGuard(
            settings, self._student, self._scratch
        )

    def load_own_state(self, state: State) -> None:
        """Take over the knowledge of past tasks and what is known of this one."""
        self._local: Tensors = dict(state.get("local", {}))
        self._restorer.load_state(state)
        self._selection.load(state.get("signature", []))
        self._integrator.load(state.get("multipliers", {}))
        self._guard.reset()
        self._counts = RoundCounts()

    def own_state(self) -> State:
        """Give the knowledge of past tasks and what is known of this one."""
        return self._restorer.state() | {
            "local": self._local,
            "signature": self._selection.signature,
            "multipliers": self._integrator.state(),
        }

    @property
    def epochs(self) -> int:
        """Local epochs, and the extra one where a setting asks for it."""
        return self.train.epochs + self._guard.extra_epochs

    def begin(self, task: TaskData, round: Round) -> None:
        """Choose candidates among past tasks, and have their teachers answer."""
        super().begin(task, round)
        self._counts = RoundCounts()
        if self._restorer.knowledge:
            # Two samples, as some layers squeeze a batch of one.
            self._student.traits.trace(self.images(task.train.x[:2]))
        if self._restorer.begin(task.task, len(task.train.y)):
            # Multipliers of another task say nothing of this one.
            self._integrator.load({})
        # Teachers answer for nothing where no gradient is restored.
        is_used = self._integrator.uses_knowledge
        tasks = self._restorer.tasks_before(task.task) if is_used else []
        self._selection.begin(tasks, round.seed)
        self._restorer.ask(self._selection.candidates, task.train.x, self.images)
        if self._guard.begin(has_trained=bool(self._local)):
            self._fill_scratch(self._local)
            self._scratch.eval()

    def begin_epoch(self, epoch: int) -> None:
        """See :meth:`Learner.begin_epoch`."""
        self._guard.begin_epoch(epoch)
        self._look_ahead()

    def step(self) -> None:
        """Move the parameters, and see which kind of step comes next."""
        super().step()
        self._look_ahead()

    def _look_ahead(self) -> None:
        """Note the slices that the next step restores: its cost depends on them."""
        # Of the next batch, which is not counted yet.
        is_plain = (self._counts.batches + 1) % self.settings.every != 0
        tasks = [] if self._guard.is_active or is_plain else self._selection.tasks
        self._slices = [self._restorer.knowledge[task].classes for task in tasks]

    def end_round(self, task: TaskData, round: Round) -> dict[str, float]:
        """Keep the model last trained here, where a setting needs it."""
        is_local = self.settings.extract_from == "local"
        # It is as large as the model, so that it is kept only where it is used.
        if is_local or self.settings.post_aggregation != "off":
            self._local = self.send()
        return {}

    def counts(self) -> dict[str, float]:
        """Give the means over the round's integrated steps."""
        return self._counts.means() | {"opposed": self._guard.opposed}

    def predictors(self, count: int) -> Iterable[Predictor]:
        """Give the model, or what infers each sample's task first."""
        measure = self.settings.infer_task
        knowledge = [part for _, part in sorted(self._restorer.knowledge.items())]
        if measure == "off" or not knowledge:
            return super().predictors(count)
        body = cast(nn.Module, self._scratch.body)
        predictor = infer_tasks(self.model, body, knowledge, measure, self.images)
        return [predictor] * count

    def _fill_scratch(self, entries: Tensors) -> None:
        """Put the model into the scratch model, over it the given entries."""
        self._scratch.load_state_dict(self.model.state_dict() | entries)
