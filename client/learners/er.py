"""Experience replay, the method that a more elaborate one has to beat.

Chaudhry, Rohrbach, Elhoseiny, Ajanthan, Dokania, Torr and Ranzato, "On Tiny Episodic Memories
in Continual Learning", 2019, arXiv 1902.10486.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from fedknow.client.learners.frames.learner import Batch, hits
from fedknow.client.learners.frames.rehearsal import MemorySettings, Rehearsal
from fedknow.client.learners.frames.settings import ANY_HEAD
from fedknow.protocols.config import TrainConfig

__all__ = ["ExperienceReplay", "ExperienceReplaySettings"]


class ExperienceReplaySettings(MemorySettings):
    """Settings of :class:`ExperienceReplay`."""

    memory_batch: int = Field(0, ge=0, le=1_000_000)
    """Stored samples that join each batch; 0: as many as a batch has, the paper's choice."""
    keep: Literal["ring", "reservoir"] = "ring"
    """``ring``: as many of each class; ``reservoir``: a uniform sample of what the task had."""


class ExperienceReplay(Rehearsal):
    """Train each step on a batch and on stored samples together (2019).

    Algorithm 1: draw B_M uniformly from the memory and step along the gradient of the mean loss
    over B_n and B_M together. Tasks are passed over more than once here, so the memory takes a
    task's samples when the task is over, not as they stream by: a ring buffer then holds a
    random part of each class, a reservoir of the task.

    Keeps: its samples of each task (setting ``memory``). Sends: what ``exchange`` says, nothing
    more. Needs: a forward and backward pass over ``memory_batch`` more samples for each step.
    Valid: any model, task- or class-incremental.
    """

    heads = ANY_HEAD
    Settings = ExperienceReplaySettings
    settings: ExperienceReplaySettings
    search: ClassVar[dict[str, list[Any]]] = {
        "memory": [0.1, 0.25, 0.5],
        "memory_batch": [0, 32],
        "keep": ["ring", "reservoir"],
    }

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        settings: ExperienceReplaySettings,
    ) -> None:
        super().__init__(model, train, settings)
        self.balanced = settings.keep == "ring"

    def gradient(self, batch: Batch) -> tuple[float, int]:
        """Gradients of the mean loss over the batch and stored samples."""
        if self.past is None:
            return super().gradient(batch)
        stored = self.draw(
            self.past, self.settings.memory_batch or self.train.batch_size
        )
        count = len(batch.y)
        joined = self.join(batch, stored)
        z = self.forward(joined.x)
        losses = joined.loss(z, reduction="none")
        # One mean over both, so that a stored sample weighs as much as a new one.
        losses.mean().backward()  # type: ignore[no-untyped-call]
        return losses[:count].mean().item(), hits(
            batch.head.logits(z[:count]), batch.y
        )
