"""DER++: experience replay that also keeps what the model answered.

Buzzega, Boschini, Porrello, Abati and Calderara, "Dark Experience for General Continual Learning:
a Strong, Simple Baseline", NeurIPS 2020, arXiv 2004.07211. With (x', z') drawn from the memory
and, in a draw of their own, (x'', y''),

    L = CE(y, f(x)) + alpha |z' - h(x')|^2 + beta CE(y'', f(x''))           (1)

where h gives logits and f = softmax(h). With beta = 0 it is the paper's DER. Equations are
numbered here, as the paper's numbers were not at hand.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedknow.client.data.stream import TaskData
from fedknow.client.learners.frames.learner import (
    Batch,
    Round,
    State,
    hits,
)
from fedknow.client.learners.frames.rehearsal import (
    MemorySettings,
    Rehearsal,
    Replay,
)
from fedknow.client.learners.frames.scoring import predict
from fedknow.client.learners.frames.settings import ANY_HEAD
from fedknow.protocols.config import TrainConfig

__all__ = ["Derpp", "DerppSettings", "distance"]

_PASS = 256
"""Samples of one forward pass."""


class DerppSettings(MemorySettings):
    """Settings of :class:`Derpp`."""

    alpha: float = Field(0.1, ge=0)
    """Weight of the distance from recorded logits."""
    beta: float = Field(0.5, ge=0)
    """Weight of the loss on stored labels; 0 is the paper's DER."""
    memory_batch: int = Field(0, ge=0, le=1_000_000)
    """Stored samples in each of the two draws of a step; 0: as many as a batch has, the paper's
    choice."""
    sampling: Literal["reservoir", "ring"] = "reservoir"
    """``reservoir``: a uniform sample of what the task had, as in the paper; ``ring``: as many of
    each class."""


def distance(z: Tensor, recorded: Tensor, mask: Tensor) -> Tensor:
    """Take the mean squared distance of logits from recorded ones.

    Parameters
    ----------
    z, recorded : Tensor
        Logits over the whole head, float [n, classes].
    mask : Tensor
        Columns that were recorded of each sample, bool [n, classes], one or more.
    """
    squares = (z - recorded).square() * mask
    return (squares.sum(1) / mask.sum(1)).mean()


class Derpp(Rehearsal):
    """Replay of stored samples, their labels and their logits (NeurIPS 2020).

    Buzzega et al. call it dark experience replay; the step is along the gradient of Eq. (1). Four
    things are as this house has them:

    - The paper's reservoir takes samples and logits as they stream by. Here the memory takes a
      part of a task when it is over, with the logits of the shared model under the client's head.
    - The paper's head has all classes from the start. Here logits are recorded, and compared, in
      the slice that was in use: the task's classes, or all classes seen by then.
    - The square is a mean over those columns, as in the authors' program, whose values of alpha
      the defaults are.
    - Batch and both draws pass the model at once, so that BatchNorm sees them together.

    Keeps: its samples of each task (setting ``memory``) and their logits. Sends: what
    ``exchange`` says, nothing more. Needs: a forward and backward pass over twice
    ``memory_batch`` more samples for each step, and one forward pass over what it stores.
    Valid: any model, task- or class-incremental.
    """

    heads = ANY_HEAD
    Settings = DerppSettings
    settings: DerppSettings
    search: ClassVar[dict[str, list[Any]]] = {
        "memory": [0.1, 0.25, 0.5],
        "alpha": [0.1, 0.2, 0.5, 1.0],
        "beta": [0.5, 1.0],
    }

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        settings: DerppSettings,
    ) -> None:
        super().__init__(model, train, settings)
        self.balanced = settings.sampling == "ring"

    # --- state

    def load_own_state(self, state: State) -> None:
        """Take over the memory and the recorded logits."""
        super().load_own_state(state)
        self.recorded: dict[int, State] = {
            int(task): dict(entry)
            for task, entry in state.get("recorded", {}).items()
        }
        self._logits = self._mask = torch.zeros(0)

    def own_state(self) -> State:
        """Give the memory and the recorded logits."""
        recorded = {str(task): entry for task, entry in self.recorded.items()}
        return super().own_state() | {"recorded": recorded}

    # --- training

    def begin(self, task: TaskData, round: Round) -> None:
        """Lay out the memory, and beside it what was recorded of it."""
        super().begin(task, round)
        if self.past is None:
            return
        shape = len(self.past), self.head.out_features
        self._logits = torch.zeros(shape, device=self.device)
        self._mask = torch.zeros(shape, dtype=torch.bool, device=self.device)
        start = 0
        # In the order of tasks, as the memory is laid out.
        for number in sorted(self.recorded):
            entry = self.recorded[number]
            rows = slice(start, start + len(entry["logits"]))
            self._logits[rows, entry["columns"]] = entry["logits"]
            self._mask[rows, entry["columns"]] = True
            start = rows.stop

    def gradient(self, batch: Batch) -> tuple[float, int]:
        """Gradients of Eq. (1)."""
        if self.past is None:
            return super().gradient(batch)
        count = self.settings.memory_batch or self.train.batch_size
        places = self._places(self.past, count)
        dark = _rows(self.past, places)
        labelled = _rows(self.past, self._places(self.past, count))
        x = torch.cat([batch.x, dark.x, labelled.x])
        sizes = [len(batch.y), len(dark), len(labelled)]
        new, old, replayed = torch.split(self.forward(self.images(x)), sizes)
        loss = F.cross_entropy(batch.head.logits(new), batch.y)
        gap = distance(old, self._logits[places], self._mask[places])
        total = (
            loss
            + self.settings.alpha * gap
            + self.settings.beta * labelled.loss(replayed)
        )
        total.backward()  # type: ignore[no-untyped-call]
        return loss.item(), hits(batch.head.logits(new), batch.y)

    def _places(self, stored: Replay, count: int) -> Tensor:
        """Draw places of stored samples, without replacement: int64 [n]."""
        order = torch.randperm(len(stored), generator=self.draws)
        return order[:count].to(stored.y.device)

    # --- the end of a task

    def end_task(self, task: TaskData, round: Round) -> dict[str, float]:
        """Keep a part of the task's samples, and the logits of the model."""
        # Before the task ends, which may train once more and move away from the shared model.
        shared = self.send()
        super().end_task(task, round)
        self.entries.load(shared)
        self.model.eval()
        stored = self.memory.tasks[task.task]
        in_use = torch.tensor(task.head, device=self.device)
        answers = predict(self, self.model, stored.x, _PASS)
        self.recorded[task.task] = {
            "columns": in_use,
            "logits": answers[:, in_use],
        }
        size = sum(entry["logits"].nbytes for entry in self.recorded.values())
        return {"knowledge-bytes": float(self.memory.nbytes + size)}


def _rows(stored: Replay, places: Tensor) -> Replay:
    """Take some of the stored samples, by their places int64 [n]."""
    return Replay(
        stored.x[places],
        stored.y[places],
        stored.head[places],
    )
