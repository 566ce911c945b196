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

from collections.abc import Mapping, Sequence
from typing import ClassVar

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.fedknow.forms import form_of
from fedknow.client.learners.fedknow.frame import KnowledgeClient
from fedknow.client.learners.fedknow.gradients import current_gradient
from fedknow.client.learners.fedknow.knowledge import FineTuning, extract
from fedknow.client.learners.fedknow.settings import SEARCH, FedKnowSettings
from fedknow.client.learners.frames.learner import Batch, Round

__all__ = ["FedKnow"]


class FedKnow(KnowledgeClient):
    """Signature task knowledge, extracted, restored, integrated (ICDE 2023).

    Integration follows the paper's Eq. (3) to (5). Extraction and restoring are stated without
    the numbers of their equations, which were not at hand. The first local epoch after a new
    global model integrates against negative transfer (Sec. III-E).

    Keeps: the signature knowledge of each finished task; the parameters that ``exchange`` does
    not send; within a task the knowledge's answers for its samples and, where a setting needs
    it, the body it last trained. Sends: the parameters that ``exchange`` names. Needs: no stored
    sample; a backward pass more for each signature task that the gradient opposes, and
    pushforwards to find them; once a task a forward pass of each knowledge over its samples, and
    the fine-tuning. Valid: any model with weight matrices and a bias in its head, task- or
    class-incremental.
    """

    Settings = FedKnowSettings
    search: ClassVar[Mapping[str, Sequence[float | str]]] = SEARCH

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
        result = self._integrator.integrate(
            gradient, restored, choose=self._selection.choose
        )
        self._counts.add(result, gradient.pullbacks)
        gradient.put(result.gradient)
        return gradient.report

    def end_task(self, task: TaskData, round: Round) -> dict[str, float]:
        """Extract the task's signature knowledge."""
        super().end_task(task, round)
        is_local = self.settings.extract_from == "local"
        self._fill_scratch(self._local if is_local else {})
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
            self._scratch, samples, task.classes, form_of(self.settings), tuning
        )
        self._restorer.forget_answers()
        self._local = {}
        return {"knowledge-bytes": float(self._restorer.nbytes)}
