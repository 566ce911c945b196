"""Gradient restorer: teachers of past tasks, and their losses.

FedKNOW (ICDE 2023), Sec. III-C: g_i is the gradient that would keep the model's answers for past
task i as its knowledge has them. No stored sample is needed. The paper's equations of this part
were not at hand; the loss is the soft cross-entropy that :func:`restored_cotangent` states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedknow.client.learners.fedknow.forms import read_knowledge
from fedknow.client.learners.fedknow.gradients import CurrentGradient
from fedknow.client.learners.fedknow.knowledge import Knowledge
from fedknow.client.learners.fedknow.restored import RestoredGradients
from fedknow.client.learners.fedknow.settings import FedKnowSettings
from fedknow.client.learners.frames.extra_work import on_demand
from fedknow.client.learners.frames.learner import Autocast, State

__all__ = ["Restorer", "restored_cotangent", "soft_labels"]

TEACHER_BATCH = 256
"""Samples that a teacher answers for at once."""


def soft_labels(logits: Tensor, settings: FedKnowSettings) -> Tensor:
    """Turn a teacher's logits into the distribution that the model is held to.

    Parameters
    ----------
    logits : Tensor
        Float [n, c].
    settings : FedKnowSettings
        ``labels`` and ``temperature``.

    Returns
    -------
    Tensor
        Probabilities, float [n, c].

    Examples
    --------
    >>> soft_labels(torch.tensor([[2.0, 0.0]]), FedKnowSettings(labels="hard")).tolist()
    [[1.0, 0.0]]
    """
    if settings.labels == "hard":
        return F.one_hot(logits.argmax(1), logits.shape[1]).to(logits)
    return (logits / settings.temperature).softmax(1)


def restored_cotangent(z: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Derive a past task's loss by the model's logits.

    The loss is ``l = -1/B sum_b sum_c target log softmax(z / T)``, and its gradient
    ``(softmax(z / T) - target) / (T B)``.

    Parameters
    ----------
    z : Tensor
        The model's logits of the past task's classes, float [B, c].
    target : Tensor
        The teacher's answer, float [B, c] (:func:`soft_labels`).
    temperature : float
        T.

    Returns
    -------
    Tensor
        Float [B, c].

    Examples
    --------
    >>> restored_cotangent(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), 2.0).tolist()
    [[-0.25, 0.25]]
    """
    # Closed form of cross-entropy's gradient, so that no graph of the loss is needed.
    return ((z / temperature).softmax(1) - target) / (temperature * len(z))


class Restorer:
    """The teachers of past tasks, and their answers for the current task.

    A teacher is a past task's knowledge. Its answers for the samples are constants, so they are
    computed once a task.

    Parameters
    ----------
    settings : FedKnowSettings
        ``labels`` and ``temperature``.
    body : nn.Module
        A body for teachers to work in; its weights are overwritten.
    autocast : callable
        Makes the context of a forward pass.

    Attributes
    ----------
    knowledge : dict
        Signature knowledge of each finished task.
    answers : dict
        By past task, distributions over its classes: float [n, c].
    """

    def __init__(
        self,
        settings: FedKnowSettings,
        body: nn.Module,
        autocast: Autocast,
    ) -> None:
        self._settings = settings
        # The body in training would forget its own weights.
        self._body = body
        self._autocast = autocast
        self.load_state({})

    def state(self) -> State:
        """Give what a client keeps of it."""
        return {
            "knowledge": {
                str(task): knowledge.state_dict()
                for task, knowledge in self.knowledge.items()
            },
            "answers": {
                str(task): answer for task, answer in self.answers.items()
            },
            "answers_task": self._task,
        }

    def load_state(self, state: State) -> None:
        """Become that of the client whose state this is."""
        self.knowledge = {
            int(task): read_knowledge(entry)
            for task, entry in state.get("knowledge", {}).items()
        }
        self.answers: dict[int, Tensor] = {
            int(task): answer for task, answer in state.get("answers", {}).items()
        }
        self._task = int(state.get("answers_task", -1))

    def begin(self, task: int, samples: int) -> bool:
        """Begin a round of a task.

        Returns
        -------
        bool
            Whether its samples are new, so that earlier answers are dropped.
        """
        # Answers are by a sample's place, so that other samples make them worthless.
        is_new = self._task != task or any(
            len(answer) != samples for answer in self.answers.values()
        )
        if is_new:
            self.answers = {}
            self._task = task
        return is_new

    def tasks_before(self, task: int) -> list[int]:
        """List the past tasks whose knowledge is there, ascending."""
        return sorted(number for number in self.knowledge if number < task)

    def ask(
        self,
        tasks: Sequence[int],
        x: Tensor,
        images: Callable[[Tensor], Tensor],
    ) -> None:
        """Have the teachers of some past tasks answer, unless they have.

        Parameters
        ----------
        tasks : sequence of int
            The past tasks.
        x : Tensor
            All samples of the current task, float [n, C, H, W].
        images : callable
            Puts samples into the memory format that a body takes.
        """
        missing = [task for task in tasks if task not in self.answers]
        # Once for all teachers, and not at all where none has to answer.
        if missing:
            x = images(x)
        for task in missing:
            self.answers[task] = self._answer(self.knowledge[task], x)

    def _answer(self, knowledge: Knowledge, x: Tensor) -> Tensor:
        with on_demand("answer", len(x), len(knowledge.classes)):
            logits = knowledge.logits(
                self._body, x, TEACHER_BATCH, self._autocast
            )
            return soft_labels(logits, self._settings)

    def forget_answers(self) -> None:
        """Drop all answers, as the task is over."""
        self.answers = {}
        self._task = -1

    def restore(
        self, gradient: CurrentGradient, tasks: list[int]
    ) -> RestoredGradients:
        """Restore the gradients of past tasks at a batch.

        Parameters
        ----------
        gradient : CurrentGradient
            That of the current task at the batch.
        tasks : list of int
            The past tasks.
        """
        logits = gradient.logits
        # One tensor for all tasks: products with all of them are then one call.
        at_logits = logits.new_zeros(len(tasks), *logits.shape)
        for cotangent, task in zip(at_logits, tasks, strict=True):
            classes = torch.tensor(
                self.knowledge[task].classes, device=logits.device
            )
            # Zero elsewhere: a past task says nothing of other tasks' classes.
            cotangent[:, classes] = restored_cotangent(
                logits[:, classes],
                self.answers[task][gradient.index],
                self._settings.temperature,
            )
        student = gradient.student
        return RestoredGradients(
            gradient.at_body,
            at_logits,
            student.head.weight.detach(),
            tasks,
            student.buffer,
        )

    @property
    def nbytes(self) -> int:
        """Size of all knowledge in bytes."""
        return sum(knowledge.nbytes for knowledge in self.knowledge.values())

    def classes(self, tasks: Sequence[int]) -> tuple[int, ...]:
        """Count each past task's classes."""
        return tuple(len(self.knowledge[task].classes) for task in tasks)
