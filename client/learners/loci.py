"""Loci: knowledge of a task, mixed with that of tasks like it.

Luopan, Han, Zhang, Zuo, Liu, Wang and Chen, "Loci: Federated Continual Learning of Heterogeneous
Tasks at Edge", IEEE TPDS 36(4), 2025, by the authors of FedKNOW. No model is averaged over all
clients. Beside its own model w, of all its tasks, a client trains a knowledge model v of the
current one. The server mixes v with those v_j of other clients and past tasks that answer most
alike. With C the task's classes, z the logits of w, u those of v, both in C, and probes x,

    L(w) = CE(z, y) + lambda CE(z / T, softmax(u / T)),   lambda = accuracy of the received v  (1)
    d(v, v_j) = mean over x of -sum_{c in C} softmax(u_j(x))_c log softmax(u(x))_c             (2)
    v <- mean of v and its k nearest v_j, each weight over those that hold it                  (3)

When a task ends, the share rho of v's largest weights is kept and fine-tuned. That is the task's
knowledge. It goes to the server, as a candidate for Eq. (3) in all later rounds. It stays with
the client too: g_i, the gradient that keeps w's answers to task i as its knowledge has them
(cross-entropy at T, as in Eq. 1), bounds later steps by FedKNOW's Eq. (3) to (5).

How sure this is. Of the paper the abstract was at hand, and of its program
(github.com/LINC-BIT/Loci at e800867) the knowledge model, Eq. (1), Eq. (2), k = 4, 5 probes, four
past candidates for each client, rho = 0.05, T = 2 and ten epochs of fine-tuning by Adam at 0.0005.
Equations are numbered here. In these points this module differs from that program:

- v has w's architecture; theirs is a small one, as clients' own models may differ there;
- v takes a step with each of w's, by the settings of ``train``; theirs takes ten epochs before w's
  in some files and none in others, and ten more when a task ends;
- the first round of a task has lambda 0, as nothing was received; theirs weighs the untrained v;
- probes are noise; theirs are training samples, which a server here does not have. They are
  noise there too, for data that the program does not know;
- heads are told by classes: where v_j has none of a class of C, the row is v's. There the tasks
  that stand at one place in two clients' orders share rows;
- a client's own v is always one of the k + 1 in Eq. (3), which is a plain mean. Theirs aligns units
  by optimal transport, and halves with each model in turn, pruned weights counting as zeros.
  Here all v start from the same weights, so that units correspond;
- past tasks bound w by FedKNOW's projection, with knowledge of v. There w may run any continual
  method, of which FedKNOW is one; its index of past knowledge, a tree in their figure, is not in
  the program, and not here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.fedknow.checks import no_weights
from fedknow.client.learners.fedknow.flat import (
    flatten_present,
    free_parameters,
    set_gradients,
    views,
)
from fedknow.client.learners.fedknow.knowledge import (
    FineTuning,
    Knowledge,
    extract,
)
from fedknow.client.learners.frames.exchange import Entries
from fedknow.client.learners.frames.learner import (
    Batch,
    Diverged,
    HeadSlice,
    Layout,
    Learner,
    LearnerSettings,
    Round,
    State,
    Tensors,
    hits,
    make_optimizer,
    widen,
)
from fedknow.client.learners.frames.optimizers import drop_gradients
from fedknow.client.learners.frames.projection import integrate, integrated
from fedknow.client.learners.frames.shared import check_classes
from fedknow.protocols.config import ConfigError, TrainConfig

__all__ = ["CLASSES", "Loci", "LociSettings", "only_rows"]

CLASSES = ".classes"
"""Name of the task's classes among the model's entries; no entry's name begins with a dot."""
_PASS = 256
"""Samples of one forward pass without gradients."""


class LociSettings(LearnerSettings):
    """Settings of :class:`Loci`."""

    peers: int = Field(3, ge=0, le=10_000)
    """k: others' knowledge that a client's own is mixed with. The authors mix 4, the own one among
    them."""
    candidates: int = Field(4, ge=0, le=10_000)
    """Knowledge of past tasks that is looked at in a round, for each client in it."""
    probes: int = Field(5, ge=1, le=10_000)
    """Samples of noise on which answers are compared."""
    temperature: float = Field(2.0, gt=0)
    """T of the answers that the model is held to."""
    rho: float = Field(0.05, gt=0, le=1)
    """Fraction of the body's weights that a past task's knowledge keeps."""
    finetune_epochs: int = Field(10, ge=0, le=10_000)
    """Epochs of fine-tuning the weights that are kept."""
    finetune_lr: float = Field(5e-4, gt=0, le=1)
    """Adam's learning rate in fine-tuning."""


def soft(logits: Tensor, temperature: float) -> Tensor:
    """Soften answers: softmax(logits / T), float [n, c]."""
    return (logits / temperature).softmax(1)


def only_rows(entries: Mapping[str, Tensor], classes: Sequence[int]) -> Tensors:
    """Set the head's rows of other classes to zero, which is to hold none."""
    reduced: Tensors = {}
    for name, value in entries.items():
        if name.startswith("head."):
            index = torch.tensor(classes, device=value.device)
            rows = torch.zeros_like(value)
            rows[index] = value[index]
            value = rows
        reduced[name] = value
    return reduced


class Loci(Learner):
    """Task knowledge mixed among like tasks, no global model (TPDS 2025).

    Luopan et al. call it task-grained aggregation. :mod:`fedknow.client.learners.loci` has the
    equations, and where it differs from the authors' program.

    Keeps: w; v within a task; of each past task rho of a body and the task's rows of the head.
    Sends: after each round v without other tasks' rows, once a task its knowledge, whose zeros do
    not travel. Gets: v as the server mixed it, from a task's second round on. Needs: no stored
    sample; two forward and backward passes a step, and a backward pass for each past task; once a
    round a forward pass of each knowledge over the samples; once a task the fine-tuning. Valid:
    task-incremental; models with weight matrices and a bias in the head. The server sees each
    client's v, so that secure aggregation and noise on updates are refused. Scored as the purely
    global model it is the mean of all w.
    """

    exchange = "none"
    Settings = LociSettings
    settings: LociSettings
    scenarios = ("task-incremental",)
    strategy = "loci"
    sparse = True
    search: ClassVar[dict[str, list[Any]]] = {
        "peers": [1, 3, 7],
        "temperature": [1.0, 2.0, 4.0],
        "rho": [0.05, 0.1, 0.2],
    }

    def __init__(
        self, model: nn.Module, train: TrainConfig, settings: LociSettings
    ) -> None:
        super().__init__(model, train, settings)
        _check_model(self.body, self.head)
        self._parameters = free_parameters(self.body)
        # v, and for a moment the knowledge of past tasks.
        self._second = copy.deepcopy(model)
        self._v_body = cast(nn.Module, self._second.body)
        self._v_head = cast(nn.Linear, self._second.head)
        self._v = Entries(self._second, "none")

    @classmethod
    def strategy_options(cls, settings: LearnerSettings) -> dict[str, Any]:
        """Say how the server chooses and mixes."""
        assert isinstance(settings, LociSettings)
        names = ("peers", "candidates", "probes")
        return {name: getattr(settings, name) for name in names}

    # --- state

    def load_own_state(self, state: State) -> None:
        """Take over v, and the knowledge of past tasks."""
        self._past = {
            int(task): Knowledge.from_state(entry)
            for task, entry in state.get("past", {}).items()
        }
        self._v.load(self._v.fresh | state.get("v", {}))
        self._is_begun = "v" in state
        self._received: Tensors = {}
        self._answers: list[tuple[Tensor, Tensor]] = []
        self._weight = 0.0
        self._steps = self._violated = 0

    def own_state(self) -> State:
        """Give v while its task lasts, and the knowledge of past tasks."""
        state: State = {
            "past": {
                str(task): part.state_dict() for task, part in self._past.items()
            }
        }
        if self._is_begun:
            state["v"] = self._v.local_parameters()
        return state

    # --- what travels

    def receive_extra(self, extra: Tensors) -> None:
        """Take v as the server mixed it.

        Raises
        ------
        ValueError
            If it is a model of another kind.
        """
        expected = {name: self._v[name].shape for name in self._v.names}
        if {name: value.shape for name, value in extra.items()} != expected:
            raise ValueError(
                f"task knowledge with {', '.join(list(extra)[:5])} does not fit the model"
            )
        self._received = extra

    def shares(self, ended: bool) -> Layout:
        """Describe v, after a round or pruned, and the task's classes."""
        layout: Layout = {CLASSES: ("int64", (-1,))}
        for name in self._v.names:
            value = self._v[name]
            dtype = str(value.dtype).removeprefix("torch.")
            layout[name] = dtype, tuple(value.shape)
        return layout

    def share(self, task: TaskData, round: Round, ended: bool) -> Tensors:
        """Give v; pruned, once its task is over."""
        shared = only_rows(self._v.local_parameters(), task.classes)
        return shared | {CLASSES: torch.tensor(task.classes)}

    def check_share(self, shared: Mapping[str, np.ndarray]) -> None:
        """Refuse classes that are not there, twice there, or none."""
        classes = shared[CLASSES]
        check_classes(CLASSES, classes, self.head.out_features)
        if not classes.size or len(np.unique(classes)) < len(classes):
            raise ValueError("no class is named, or one twice")

    # --- training

    def begin(self, task: TaskData, round: Round) -> None:
        """Have past knowledge answer, then take v as received, own or new."""
        super().begin(task, round)
        last_v = self._v.local_parameters() if self._is_begun else self._v.fresh
        x = self.images(task.train.x)
        # In v's place, which is free for a moment: a third model would take memory.
        self._answers = [
            self._answer(self._past[t], x) for t in sorted(self._past)
        ]
        self._v.load(self._received or last_v)
        # An untrained v knows nothing of others.
        self._weight = self._accuracy(x, task) if self._received else 0.0
        self._is_begun, self._received = True, {}
        self._steps = self._violated = 0
        self._second.train()
        self._v_optimizer = make_optimizer(
            self.train, self._v_body.parameters(), self._v_head.parameters()
        )

    def _answer(self, knowledge: Knowledge, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take a past task's classes, and what its knowledge answers in them."""
        logits = knowledge.logits(self._v_body, x, _PASS, self.autocast)
        index = torch.tensor(knowledge.classes, device=x.device)
        return index, soft(logits, self.settings.temperature)

    @torch.no_grad()
    def _accuracy(self, x: Tensor, task: TaskData) -> float:
        """Take lambda of Eq. (1), the accuracy of v on the task's samples."""
        self._second.eval()
        head = HeadSlice(task.head, self.head.out_features, self.device)
        right = 0
        for part, y in zip(
            torch.split(x, _PASS), torch.split(task.train.y, _PASS), strict=True
        ):
            with self.autocast():
                z = head.logits(widen(self._second(part)))
            right += hits(z, head.labels(y))
        return right / len(x)

    def gradient(self, batch: Batch) -> tuple[float, int]:
        """Leave v's gradient, and Eq. (1)'s, turned where it hurts past tasks."""
        answers = self._knowledge_gradient(batch)
        with self.autocast():
            logits = widen(self.model(batch.x))
        z = batch.head.logits(logits)
        loss = objective = F.cross_entropy(z, batch.y)
        if self._weight:
            distilled = self._distance(z, answers)
            objective = loss + self._weight * distilled
        # Before the objective's own pass, which frees the graph.
        restored = [
            self._past_gradient(logits[:, index], target[batch.index])
            for index, target in self._answers
        ]
        objective.backward()  # type: ignore[no-untyped-call]
        if restored:
            self._turn(torch.stack(restored))
        return loss.item(), hits(z, batch.y)

    def _knowledge_gradient(self, batch: Batch) -> Tensor:
        """Leave v's gradient; gives its answers, softened."""
        drop_gradients(self._v_optimizer)
        with self.autocast():
            u = batch.head.logits(widen(self._second(batch.x)))
        loss = F.cross_entropy(u, batch.y)
        # The round's own check sees w's loss alone.
        if not math.isfinite(loss.item()):
            raise Diverged(
                f"the knowledge model's loss is {loss.item()}; lower "
                f"train.lr = {self.train.lr} or set train.clip_norm"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        return soft(u.detach(), self.settings.temperature)

    def _distance(self, z: Tensor, target: Tensor) -> Tensor:
        """Take the cross-entropy at T, a mean over samples, of float [n, c]."""
        return F.cross_entropy(z / self.settings.temperature, target)

    def _past_gradient(self, z: Tensor, target: Tensor) -> Tensor:
        """Take g_i of a past task, float [p]."""
        parts = torch.autograd.grad(
            self._distance(z, target),
            self._parameters,
            retain_graph=True,
            allow_unused=True,
        )
        return flatten_present(parts, self._parameters)[0]

    def _turn(self, restored: Tensor) -> None:
        """Turn the body's gradient to hurt no past task (FedKNOW's Eq. 3)."""
        # The head's is left alone: its rows belong to one task each.
        g, reached = flatten_present(
            [p.grad for p in self._parameters], self._parameters
        )
        # G^T v, and g'.
        result = integrated(lambda: integrate(g, restored), vectors=2)
        self._steps += 1
        self._violated += result.violated
        parts = views(result.gradient, self._parameters)
        set_gradients(self._parameters, parts, reached)

    def step(self) -> None:
        """Move w and v."""
        super().step()
        if self.train.clip_norm:
            nn.utils.clip_grad_norm_(
                self._second.parameters(), self.train.clip_norm
            )
        self._v_optimizer.step()

    def counts(self) -> dict[str, float]:
        """``trust``: lambda; ``violated``: past tasks that a step would hurt."""
        return {
            "trust": self._weight,
            "violated": self._violated / max(1, self._steps),
        }

    def end_task(self, task: TaskData, round: Round) -> dict[str, float]:
        """Prune and fine-tune v, which is the task's knowledge."""
        super().end_task(task, round)
        tuning = FineTuning(
            self.settings.finetune_epochs,
            self.train.batch_size,
            self.settings.finetune_lr,
            round.seed,
            self.smallest_batch(task.train.x),
            self.autocast,
        )
        samples = Split(self.images(task.train.x), task.train.y)
        self._past[task.task] = extract(
            self._second, samples, task.classes, self.settings.rho, tuning
        )
        # The next task's v begins anew, and this one only has to be sent.
        self._is_begun = False
        size = sum(part.nbytes for part in self._past.values())
        return {"knowledge-bytes": float(size)}


def _check_model(body: nn.Module, head: nn.Linear) -> None:
    """Refuse a model of which no knowledge can be extracted.

    Raises
    ------
    ConfigError
        Saying what it lacks.
    """
    fault = no_weights(body)
    if not fault and head.bias is None:
        fault = "its head needs a bias"
    if fault:
        raise ConfigError(
            f"learner.name = 'loci' cannot train this model: {fault}; choose another model, or "
            "another learner, for example 'local'"
        )
