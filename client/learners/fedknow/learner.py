"""FedKNOW: signature task knowledge, extracted, restored, integrated.

Luopan, Han, Zhang, Liu, Wang and Chen: "FedKNOW: Federated Continual Learning with Signature
Task Knowledge Integration at Edge", ICDE 2023, arXiv 2212.01738. In three parts:

- *extract* (Sec. III-B): when a task ends, keep its signature knowledge, a pruned and fine-tuned
  copy of the model (:mod:`~fedknow.client.learners.fedknow.knowledge`);
- *restore* (Sec. III-C): at a batch of the current task, compute the gradient g_i that would keep
  the model's answers for past task i (:mod:`~fedknow.client.learners.fedknow.restorer`);
- *integrate* (Sec. III-D): choose as signature tasks the k past tasks most dissimilar to the
  current one (:mod:`~fedknow.client.learners.fedknow.selection`), and turn the current gradient
  so that it hurts none of them (:mod:`~fedknow.client.learners.fedknow.integrator`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

from torch import nn

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.fedknow.checks import check_model
from fedknow.client.learners.fedknow.counts import RoundCounts
from fedknow.client.learners.fedknow.flat import GradientBuffer
from fedknow.client.learners.fedknow.gradients import Student, current_gradient
from fedknow.client.learners.fedknow.integrator import integrator_for
from fedknow.client.learners.fedknow.knowledge import FineTuning, extract
from fedknow.client.learners.fedknow.negative_transfer import NegativeTransferGuard
from fedknow.client.learners.fedknow.restorer import Restorer
from fedknow.client.learners.fedknow.selection import SignatureSelection
from fedknow.client.learners.fedknow.settings import SEARCH, FedKnowSettings
from fedknow.client.learners.fedknow.traits import BodyTraits
from fedknow.client.learners.frames.learner import (
    Batch,
    Learner,
    Round,
    State,
    Tensors,
)
from fedknow.protocols.config import TrainConfig

__all__ = ["FedKnow"]


class FedKnow(Learner):
    """Signature task knowledge, extracted, restored, integrated (ICDE 2023).

    Integration follows the paper's Eq. (3) to (5), but by default with multipliers of at least
    ``margin``, which the paper does not have. Extraction and restoring are stated without the
    numbers of their equations, which were not at hand.

    Keeps: the signature knowledge of each finished task; the parameters that ``exchange`` does
    not send; within a task the knowledge's answers for its samples and, where a setting needs
    it, the body it last trained. Sends: the parameters that ``exchange`` names. Needs: no stored
    sample; a backward pass more for each signature task that the gradient opposes, and
    pushforwards to find them; once a task a forward pass of each knowledge over its samples, and
    the fine-tuning. Valid: any model with weight matrices and a bias in its head, task- or
    class-incremental.
    """

    Settings = FedKnowSettings
    settings: FedKnowSettings
    search: ClassVar[Mapping[str, Sequence[float | str]]] = SEARCH

    def __init__(
        self, model: nn.Module, train: TrainConfig, settings: FedKnowSettings
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
        self._guard = NegativeTransferGuard(settings, self._student, self._scratch)

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
            self._student.traits.trace(self.images(task.train.x[:2]))
        if self._restorer.begin(task.task, len(task.train.y)):
            self._integrator.load({})
        is_used = self._integrator.uses_knowledge
        tasks = self._restorer.tasks_before(task.task) if is_used else []
        self._selection.begin(tasks, round.seed)
        self._restorer.ask(self._selection.candidates, task.train.x, self.images)
        if self._guard.begin(has_trained=bool(self._local)):
            self._load_own_model()
            self._scratch.eval()

    def begin_epoch(self, epoch: int) -> None:
        """See :meth:`Learner.begin_epoch`."""
        self._guard.begin_epoch(epoch)
        self._look_ahead()

    def gradient(self, batch: Batch) -> tuple[float, int]:
        """Leave the head's plain gradient, and the body's integrated one."""
        if self._guard.is_active:
            return self._guard.gradient(batch, super().gradient)
        self._counts.batches += 1
        tasks = self._selection.tasks
        if not tasks or self._counts.batches % self.settings.every:
            return super().gradient(batch)
        gradient = current_gradient(
            self._student, batch, self.settings.restore_from, super().gradient
        )
        restored = self._restorer.restore(gradient, tasks)
        integrator = self._integrator.prepare(gradient, restored, self.settings.k)
        signature = self._selection.choose(gradient, restored)
        result = integrator.integrate(gradient, signature)
        self._counts.add(result, len(signature), gradient.pullbacks)
        gradient.put(result.gradient)
        return gradient.report

    def step(self) -> None:
        """Move the parameters, and see which kind of step comes next."""
        super().step()
        self._look_ahead()

    def _look_ahead(self) -> None:
        """Note the slices that the next step restores: its cost depends on them."""
        is_plain = (self._counts.batches + 1) % self.settings.every != 0
        tasks = [] if self._guard.is_active or is_plain else self._selection.tasks
        self._slices = [self._restorer.knowledge[task].classes for task in tasks]

    def end_round(self, task: TaskData, round: Round) -> dict[str, float]:
        """Keep the model last trained here, where a setting needs it."""
        is_local = self.settings.extract_from == "local"
        if is_local or self.settings.post_aggregation != "off":
            self._local = self.send()
        return {}

    def end_task(self, task: TaskData, round: Round) -> dict[str, float]:
        """Extract the task's signature knowledge."""
        super().end_task(task, round)
        if self.settings.extract_from == "local":
            self._load_own_model()
        else:
            self._scratch.load_state_dict(self.model.state_dict())
        samples = Split(self.images(task.train.x), task.train.y)
        tuning = FineTuning(
            self.settings.finetune_epochs,
            self.train.batch_size,
            self.settings.finetune_lr,
            round.seed,
            self.smallest_batch(task.train.x),
            self.autocast,
        )
        self._restorer.knowledge[task.task] = extract(
            self._scratch, samples, task.classes, self.settings.rho, tuning
        )
        self._restorer.forget_answers()
        self._local = {}
        return {"knowledge-bytes": float(self._restorer.nbytes)}

    def counts(self) -> dict[str, float]:
        """Give the means over the round's integrated steps."""
        return self._counts.means() | {"opposed": self._guard.opposed}

    def _load_own_model(self) -> None:
        """Put the model that this client last trained into the scratch model."""
        self._scratch.load_state_dict(self.model.state_dict() | self._local)
