"""Re-Fed: each client replays the samples that matter most.

They matter to the client itself and to everybody.

Li, Li, Wang, Li, Zhong and Zhang, "Towards Efficient Replay in Federated Incremental Learning",
CVPR 2024, arXiv 2403.05890. When a task is over, a client scores all samples it has, cached
ones and the task's, and caches the best. A *personalized informative model* v starts at the
global model w and takes s steps towards the client's own samples,

    v_p = v_{p-1} - eta (grad sum_i l(v_{p-1}; x_i) + q(lambda) (v_{p-1} - w)),
    q(lambda) = (1 - lambda) / (2 lambda)

(Eq. 3): lambda near 0 keeps it global, near 1 lets it become local. The score of a sample is
how hard it pulls on the way, early steps, at which v is still global, counting more (Eqs. 4 and
5):

    I(x) = sum_{p=1}^{s} 1/p |grad l(v_{p-1}; x)|

How sure this is. Equations and roles are known from public summaries of the paper. They differ
on whether Eq. 4 takes the gradient's norm or its square; here it is the norm, and the square
may rank samples otherwise. Not known is where v starts for the next task (here: at the then
global model, so that no further model is kept) and the value of s. The sum in Eq. 3 is taken as
a mean, so that eta does not depend on the number of samples.

Training is on the union of the task's samples and the cached ones (Eq. 6): each is seen once an
epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from fedknow.client.data.stream import TaskData
from fedknow.client.learners.frames.extra_work import each
from fedknow.client.learners.frames.learner import (
    Learner,
    Round,
    Samples,
    State,
)
from fedknow.client.learners.frames.rehearsal import (
    MemorySettings,
    Replay,
    Stored,
)
from fedknow.client.learners.joint import UnionTraining
from fedknow.protocols.config import TrainConfig
from fedknow.protocols.seeds import integer

__all__ = ["ReFed", "ReFedSettings"]


class ReFedSettings(MemorySettings):
    """Settings of :class:`ReFed`."""

    balance: float = Field(0.5, gt=0, lt=1)
    """lambda: how far the informative model follows the client's own samples."""
    pim_steps: int = Field(3, ge=1, le=10_000)
    """s: steps of the informative model, each a pass over all samples."""
    pim_lr: float = Field(1e-2, gt=0)
    """eta: its learning rate."""


class ReFed(UnionTraining):
    """Replay of the samples that pull most on a model (CVPR 2024).

    Li et al.; the model is between global and local.

    Keeps: samples (setting ``memory``: that share of all samples seen, which the paper gives
    as a number M), chosen afresh from all of them after each task, so that of some tasks and
    classes none may be left. Sends: what ``exchange`` says, nothing more; the paper averages
    everything, ``exchange = "all"``. Needs: training on the cached samples besides, and when a
    task is over s forward and backward passes for each sample. Valid: any model, task- or
    class-incremental.
    """

    Settings = ReFedSettings
    settings: ReFedSettings
    search: ClassVar[Mapping[str, Sequence[float | str]]] = {
        "memory": [0.1, 0.25, 0.5],
        "balance": [0.1, 0.5, 0.9],
        "pim_lr": [1e-3, 1e-2, 1e-1],
    }

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        settings: ReFedSettings,
    ) -> None:
        super().__init__(model, train, settings)
        self._parameters = self.trainable

    # --- state

    def load_own_state(self, state: State) -> None:
        """Take over the memory and how many samples it may hold."""
        super().load_own_state(state)
        # Before the floor was introduced, states counted the samples seen.
        older = round(self.settings.memory * state.get("seen", 0))
        self._budget = int(state.get("budget", older))

    def own_state(self) -> State:
        """Give the memory and how many samples it may hold."""
        return super().own_state() | {"budget": self._budget}

    def training_data(self, task: TaskData, round: Round) -> Samples:
        """Give the task's samples and the cached ones (Eq. 6)."""
        union = self.union(task)
        return self.sample(union, len(union), round)

    # --- the end of a task

    def end_task(self, task: TaskData, round: Round) -> dict[str, float]:
        """Cache the most important of all samples."""
        # The model that everybody has, as end_task may train a client that has missed the task.
        shared = self.send()
        Learner.end_task(
            self, task, round
        )  # not Rehearsal's: samples are not drawn
        self.entries.load(shared)
        # All samples for the moment: which ones stay is decided among old and new together.
        count = len(task.train)
        self.memory.store(task, count, integer(round.seed, "memory"))
        everything = self.memory.all(task, self.head.out_features)
        # M: what each task may add, so that the budget grows as the other methods' does.
        self._budget += self.settings.count(task.train.x, task.train.y)
        # Stable, so that equal scores give the same samples on every machine.
        best = self.importance(everything).argsort(descending=True, stable=True)[
            : self._budget
        ]
        self._cache(
            torch.zeros_like(everything.y, dtype=torch.bool).index_fill(
                0, best, True
            )
        )
        return {"knowledge-bytes": float(self.memory.nbytes)}

    def importance(self, samples: Replay) -> Tensor:
        """Take I(x) of each sample (Eqs. 3 to 5): float [n].

        Here w is the model as it is, in evaluation mode.
        """
        self.model.eval()
        w = {name: p.detach() for name, p in self._parameters.items()}
        v = {name: p.clone().requires_grad_() for name, p in w.items()}
        q = (1 - self.settings.balance) / (2 * self.settings.balance)
        images, score = (
            self.images(samples.x),
            torch.zeros(len(samples), device=self.device),
        )
        for step in range(1, self.settings.pim_steps + 1):
            pull = {name: q * (v[name].detach() - w[name]) for name in v}
            for i in each(range(len(samples)), "importance"):
                row = slice(i, i + 1)
                one = Replay(
                    images[row],
                    samples.y[row],
                    samples.head[row],
                )
                loss = one.loss(functional_call(self.model, v, (one.x,)))
                parts = torch.autograd.grad(
                    loss,
                    list(v.values()),
                    allow_unused=True,
                    materialize_grads=True,
                )
                score[i] += (
                    torch.stack([part.norm() for part in parts]).norm() / step
                )
                for name, part in zip(pull, parts, strict=True):
                    pull[name].add_(part, alpha=1 / len(samples))
            v = {
                name: (
                    v[name].detach() - self.settings.pim_lr * pull[name]
                ).requires_grad_()
                for name in v
            }
        return score

    def _cache(self, chosen: Tensor) -> None:
        """Keep the chosen ones of the memory's samples: bool [n].

        They are in the order of tasks.
        """
        tasks = sorted(self.memory.tasks.items())
        for (task, stored), is_chosen in zip(
            tasks,
            torch.split(chosen, [len(s.y) for _, s in tasks]),
            strict=True,
        ):
            self.memory.tasks[task] = Stored(
                stored.classes,
                stored.x[is_chosen],
                stored.y[is_chosen],
            )
            if not is_chosen.any():
                del self.memory.tasks[task]
