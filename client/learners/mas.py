"""Memory aware synapses: importance from the model's answers.

Parameters matter as far as the model's answers depend on them.

Aljundi, Babiloni, Elhoseiny, Rohrbach and Tuytelaars, "Memory Aware Synapses: Learning what
(not) to forget", ECCV 2018, arXiv 1711.09601.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from fedknow.client.data.stream import TaskData
from fedknow.client.learners.frames.consolidation import (
    Consolidation,
    ConsolidationSettings,
)
from fedknow.client.learners.frames.extra_work import each
from fedknow.client.learners.frames.learner import HeadSlice, Round, Tensors

__all__ = ["Mas", "MasSettings"]


class MasSettings(ConsolidationSettings):
    """Settings of :class:`Mas`."""

    strength: float = Field(0.1, ge=0)
    """lambda; the paper has 1 throughout."""


class Mas(Consolidation):
    """A penalty by how much answers depend on a parameter (ECCV 2018).

    With F(x) the logits of the task's slice of the head, N samples and the sum over all past tasks,

        (2)  Omega_j = 1/N sum_x |d ||F(x)||^2 / d w_j|
        (3)  L(w) + lambda sum_j Omega_j (w_j - w*_j)^2

    around the latest model w*. Labels are not needed. The paper's per-sample gradients are
    taken as such, not those of batches; the norm is the squared one of its Section 4.1, for
    models with several outputs.

    Keeps: importance and anchor, two models. Sends: what ``exchange`` says, nothing more.
    Needs: no stored sample; at the end of a task a forward and backward pass for each sample of
    it. Valid: any model, task- or class-incremental.
    """

    Settings = MasSettings
    settings: MasSettings
    search: ClassVar[dict[str, list[Any]]] = {
        "strength": [0.001, 0.01, 0.1, 1.0, 10.0],
        "anchor": ["global", "local"],
    }

    @property
    def strength(self) -> float:
        """Lambda."""
        return self.settings.strength

    def measure(self, task: TaskData, round: Round) -> Tensors:
        """Omega of one task, Eq. (2), in evaluation mode and full precision."""
        head = HeadSlice(task.head, self.head.out_features, self.device)
        omega = {
            name: torch.zeros_like(p) for name, p in self._parameters.items()
        }
        for x in each(self.images(task.train.x), "omega", head.width):
            # Sample by sample, as signs of gradients would cancel in a batch.
            squared_norm = head.logits(self.model(x[None])).square().sum()
            for name, g in self.gradients(squared_norm).items():
                omega[name].add_(g.abs(), alpha=1 / len(task.train))
        return omega
