"""Learning without forgetting: old answers stand in for old samples.

They are the old model's answers to the new samples.

Li and Hoiem, "Learning without Forgetting", ECCV 2016 and TPAMI 2018, arXiv 1606.09282.
Equations are numbered as in the later one; the objective as a whole has no number there.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedknow.client.data.stream import TaskData
from fedknow.client.learners.frames.learner import (
    Batch,
    ContinualSettings,
    Learner,
    Round,
    State,
    Tensors,
)
from fedknow.client.learners.frames.scoring import predict
from fedknow.client.learners.frames.settings import ANY_HEAD
from fedknow.protocols.config import ConfigError, TrainConfig

__all__ = ["Lwf", "LwfSettings", "distillation"]


class LwfSettings(ContinualSettings):
    """Settings of :class:`Lwf`."""

    strength: float = Field(1.0, ge=0)
    """lambda_o: weight of the old tasks' losses."""
    temperature: float = Field(2.0, gt=0)
    """T, which divides logits before the old answers are distilled."""
    anchor: Literal["global", "local"] = "global"
    """The old model: the shared one that a task ended with, under the client's own head, or the
    client's own as it last trained it (one more model to keep within a task)."""
    warmup_epochs: int = Field(0, ge=0, le=10_000)
    """Of the local epochs in which a client first meets a task, so many train its head alone; the
    paper's warm-up."""


def distillation(z: Tensor, old: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of answers with the recorded ones, Eqs. (2) and (3).

    Both are at a temperature. The result is a mean.

    Parameters
    ----------
    z, old : Tensor
        Logits of one slice of the head, float [n, c].
    temperature : float
        T. ``softmax(z / T)`` is the paper's ``y^(1/T)`` brought to sum 1, Eq. (4).
    """
    return F.cross_entropy(z / temperature, (old / temperature).softmax(1))


class Lwf(Learner):
    """Distil the old model's answers to new samples (ECCV 2016).

    With Y_o the old model's answers to the new task's samples, recorded before it is trained on
    them,

        L = lambda_o sum_{o < t} L_old(Y_o, Yhat_o) + L_new(Y_n, Yhat_n)

    over each old task's slice of the head; where class-incremental, over one slice of all
    classes seen before. There is no factor T^2, as in the paper. The old model is the one that
    the last task ended with (setting ``anchor``).

    Keeps: the old model. Sends: what ``exchange`` says, nothing more. Needs: no stored sample;
    one more forward pass a round over the task's samples. Valid: any model, task- or
    class-incremental.

    Raises
    ------
    ConfigError
        If the warm-up is longer than the round it is in, or leaves no epoch of the task for the
        body.
    """

    heads = ANY_HEAD
    Settings = LwfSettings
    settings: LwfSettings
    search: ClassVar[dict[str, list[Any]]] = {
        "strength": [0.1, 1.0, 10.0],
        "temperature": [1.0, 2.0, 4.0],
        "anchor": ["global", "local"],
        "warmup_epochs": [0, 1],
    }

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        settings: LwfSettings,
    ) -> None:
        super().__init__(model, train, settings)
        # With a single round the body would otherwise never be trained.
        limit = train.epochs - (train.rounds == 1)
        if settings.warmup_epochs > limit:
            raise ConfigError(
                f"learner.warmup_epochs = {settings.warmup_epochs}: a warm-up is in a "
                f"client's first round of a task "
                f"and must leave the body an epoch; with train.epochs = {train.epochs} "
                f"and train.rounds = "
                f"{train.rounds} it has at most {limit}"
            )
        self._scratch = copy.deepcopy(model)  # the old model speaks in here

    # --- state

    def load_own_state(self, state: State) -> None:
        """Take over the old model and the slices it answers in."""
        self.old: Tensors = dict(state.get("old", {}))
        self.slices = [list(classes) for classes in state.get("slices", [])]
        self._local: Tensors = dict(state.get("local", {}))
        self._answers = torch.zeros(0)
        self._first_met = self._warming = False
        self._steps, self._distilled = 0, 0.0

    def own_state(self) -> State:
        """Give the old model, its slices, and the model last trained here."""
        state: State = {"old": self.old, "slices": self.slices}
        return state | ({"local": self._local} if self._local else {})

    # --- training

    def begin(self, task: TaskData, round: Round) -> None:
        """Record the old model's answers to the task's samples."""
        super().begin(task, round)
        self._steps, self._distilled = 0, 0.0
        # By this client: others may have met the task before.
        self._first_met = self._trained_task < task.task
        if self.old:
            # Frozen parameters and counters are not kept, as they are the model's own.
            self._scratch.load_state_dict(self.model.state_dict() | self.old)
            self._scratch.eval()
            # Once a round, as the old model answers the same each epoch.
            self._answers = predict(self, self._scratch, task.train.x, 256)

    def begin_epoch(self, epoch: int) -> None:
        """Warm up in the first epochs of a task, where that is set."""
        self._warming = self._first_met and epoch < self.settings.warmup_epochs

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss of the batch and, beside it, of the old tasks' answers."""
        new = F.cross_entropy(logits, batch.y)
        if self._warming or not self.old:
            return new, new
        answers = self._answers[batch.index]
        # Each past task is distilled in its own slice of the head.
        outputs = batch.outputs
        losses = [
            distillation(outputs[:, s], answers[:, s], self.settings.temperature)
            for s in self.slices
        ]
        old = torch.stack(losses).sum()
        self._steps += 1
        self._distilled += old.item()
        return new + self.settings.strength * old, new

    def gradient(self, batch: Batch) -> tuple[float, int]:
        """Gradients of the batch; in a warm-up of the head alone."""
        report = super().gradient(batch)
        if self._warming:
            for parameter in self.body.parameters():
                # None and not requires_grad: the optimizer and its order of parameters stay as
                # they are.
                parameter.grad = None
        return report

    def counts(self) -> dict[str, float]:
        """``distillation``: the old tasks' losses, mean over the steps.

        They are added up, without lambda_o.
        """
        return {"distillation": self._distilled / max(1, self._steps)}

    def end_round(self, task: TaskData, round: Round) -> dict[str, float]:
        """Keep the model last trained here, where it is to be the old one."""
        if self.settings.anchor == "local":
            self._local = self.send()
        return {}

    def end_task(self, task: TaskData, round: Round) -> dict[str, float]:
        """Keep the model that the task ended with."""
        shared = self.send()
        # It trains a client that was never chosen, and so may change the last trained model.
        super().end_task(task, round)
        self.entries.load(self._local or shared)
        self._local = {}
        self.old = self.send() | self.local_parameters()
        if task.is_incremental:
            self.slices = [list(task.head)]
        elif list(task.classes) not in self.slices:
            self.slices = [*self.slices, list(task.classes)]
        return {
            "knowledge-bytes": float(
                sum(tensor.nbytes for tensor in self.old.values())
            )
        }
