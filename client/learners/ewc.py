"""Elastic weight consolidation: parameters weighted by the Fisher matrix.

The Fisher information says which parameters past tasks need.

EWC: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017,
arXiv 1612.00796. Online EWC: Huszár, "Note on the quadratic penalties in elastic weight
consolidation", PNAS 2018, arXiv 1712.03847; Schwarz et al., "Progress & Compress", ICML 2018,
arXiv 1805.06370.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedknow.client.data.stream import TaskData
from fedknow.client.learners.frames.consolidation import (
    Consolidation,
    ConsolidationSettings,
)
from fedknow.client.learners.frames.extra_work import each
from fedknow.client.learners.frames.learner import HeadSlice, Round, Tensors
from fedknow.protocols.seeds import integer

__all__ = ["Ewc", "EwcSettings", "OnlineEwc", "OnlineEwcSettings"]


class EwcSettings(ConsolidationSettings):
    """Settings of :class:`Ewc`."""

    strength: float = Field(1000.0, ge=0)
    """lambda, the weight of the penalty for past tasks."""
    labels: Literal["sampled", "expected", "data"] = "sampled"
    """Whose labels the Fisher information is taken over: one drawn from the model's own answer to
    each sample; all of them, weighted by that answer (exact, and as many backward passes as the
    slice of the head has classes); or the data's, which is the empirical Fisher information and
    vanishes where the model fits."""


class OnlineEwcSettings(EwcSettings):
    """Settings of :class:`OnlineEwc`."""

    gamma: float = Field(1.0, ge=0, le=1)
    """What is left of past tasks' information each time a task is added; 1 forgets nothing."""


class _Fisher(Consolidation):
    """The diagonal of the Fisher information as importance."""

    Settings = EwcSettings
    settings: EwcSettings
    factor: ClassVar[float] = 0.5

    @property
    def strength(self) -> float:
        """Lambda."""
        return self.settings.strength

    def measure(self, task: TaskData, round: Round) -> Tensors:
        """Measure the Fisher information of each parameter.

        F_j = mean over samples x and expectation over labels c of (d log p(c | x, w) / d
        w_j)^2.

        Each gradient is that of one sample, squared before it is averaged, in evaluation mode
        and full precision.
        """
        head = HeadSlice(task.head, self.head.out_features, self.device)
        draws = torch.Generator().manual_seed(integer(round.seed, "fisher"))
        fisher = {
            name: torch.zeros_like(p) for name, p in self._parameters.items()
        }
        labels = head.labels(task.train.y).tolist()
        samples = zip(self.images(task.train.x), labels, strict=True)
        for x, y in each(samples, "fisher", head.width):
            # Sample by sample: the square of a batch's mean gradient is not the mean of
            # squares.
            log_p = head.logits(self.model(x[None]))[0].log_softmax(0)
            for label, weight in self._labels(log_p.detach().exp(), y, draws):
                for name, g in self.gradients(
                    log_p[label], needs_graph=True
                ).items():
                    fisher[name].addcmul_(g, g, value=weight / len(task.train))
        return fisher

    def _labels(
        self,
        p: Tensor,
        y: int,
        draws: torch.Generator,
    ) -> Iterator[tuple[int, float]]:
        if self.settings.labels == "expected":
            yield from enumerate(p.tolist())
        elif self.settings.labels == "sampled":
            yield int(torch.multinomial(p.cpu(), 1, generator=draws)), 1.0
        else:
            yield y, 1.0


class Ewc(_Fisher):
    """A penalty for each past task, by its Fisher information (PNAS 2017).

    Eq. (3), with one term for each past task k:

        L(w) + sum_k lambda / 2 sum_j F_k,j (w_j - w*_k,j)^2

    The sum of the terms is, up to a constant, one term with F = sum_k F_k around the mean of
    the w*_k weighted by F_k: so two models are kept, however many tasks there are. The paper
    leaves open how F is taken (setting ``labels``) and knows of no other clients (setting
    ``anchor``).

    Keeps: importance and anchor, two models. Sends: what ``exchange`` says, nothing more.
    Needs: no stored sample; at the end of a task a forward and backward pass for each sample of
    it. Valid: any model, task- or class-incremental (where it is known to be weak).
    """

    search: ClassVar[dict[str, list[Any]]] = {
        "strength": [1.0, 10.0, 100.0, 1000.0, 10000.0, 40000.0],
        "anchor": ["global", "local"],
    }

    def merge(
        self, importance: Tensors, anchor: Tensors
    ) -> tuple[Tensors, Tensors]:
        """Give the sum of the penalties as one.

        F = sum_k F_k and w* = sum_k F_k w*_k / F; where F is zero, w* is the new one.
        """
        if not self.importance:
            return importance, anchor
        # Two parabolas add up to one around the weighted mean of their anchors, so that memory
        # does not grow with tasks.
        total = {
            name: self.importance[name] + new for name, new in importance.items()
        }
        # 0 / 0: nobody needs this parameter, so the newest anchor does.
        share = {
            name: (importance[name] / total[name]).nan_to_num(1.0)
            for name in total
        }
        return total, {
            name: self.anchor[name].lerp(anchor[name], share[name])
            for name in total
        }


class OnlineEwc(_Fisher):
    """One penalty, by a running sum of Fisher information (ICML 2018).

        (8)  L(w) + lambda / 2 sum_j F*_j (w_j - w*_j)^2,    w* <- w_t
        (9)  F* <- gamma F* + F_t

    In Eq. (8) the penalty has the weights gamma F* and no lambda; here it is F*, and lambda
    stands for both.

    With gamma = 1 it is Huszár's correction of EWC, whose separate penalties count early tasks
    again and again. Progress & Compress also brings the information of all tasks to one scale,
    which is left out here.

    Keeps: importance and anchor, two models. Sends: what ``exchange`` says, nothing more.
    Needs: what :class:`Ewc` needs. Valid: where :class:`Ewc` is.
    """

    Settings = OnlineEwcSettings
    settings: OnlineEwcSettings
    search: ClassVar[dict[str, list[Any]]] = {
        "strength": [1.0, 10.0, 100.0, 1000.0, 10000.0, 40000.0],
        "gamma": [0.95, 1.0],
    }

    @property
    def decay(self) -> float:
        """Gamma."""
        return self.settings.gamma
