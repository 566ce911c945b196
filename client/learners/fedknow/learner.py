"""FedKNOW: federated continual learning with signature task knowledge integration.

Luopan, Han, Zhang, Liu, Wang, Chen, ICDE 2023, arXiv 2212.01738. In three parts:

*extract* (Sec. III-B)
    at the end of a task keep its signature knowledge, a pruned and fine-tuned copy of the model
    (:mod:`fedknow.client.learners.fedknow.knowledge`);
*restore* (Sec. III-C)
    for a batch of the current task, the gradient g_i that would keep the model's answers for
    past task i as its knowledge has them, without any stored sample;
*integrate* (Sec. III-D)
    turn the current gradient so that it hurts no signature task: the k past tasks most
    dissimilar to the current one (:mod:`fedknow.client.learners.frames.projection`).

All gradients of a batch belong to one forward pass
(:mod:`fedknow.client.learners.fedknow.linearization`), and which of them the integration needs
is found out before they are computed.

The body is shared, the head is personal by default. What the paper leaves open is a setting
with a documented default.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedknow.client.data.stream import TaskData
from fedknow.client.learners.fedknow.checks import check_model
from fedknow.client.learners.fedknow.flat import (
    flatten,
    flatten_present,
    free_parameters,
    views,
)
from fedknow.client.learners.fedknow.integrator import (
    integrate_lazily,
    integrate_surrogate,
    step_dual,
)
from fedknow.client.learners.fedknow.knowledge import Knowledge, extract
from fedknow.client.learners.fedknow.linearization import Linearization, factorable
from fedknow.client.learners.fedknow.restorer import (
    Restorer,
    restored_cotangent,
    soft_labels,
)
from fedknow.client.learners.fedknow.selection import most_dissimilar
from fedknow.client.learners.fedknow.settings import FedKnowSettings
from fedknow.client.learners.frames.learner import (
    Batch,
    HeadSlice,
    Learner,
    Round,
    State,
    Tensors,
    hits,
    widen,
)
from fedknow.client.learners.frames.projection import (
    Integration,
    integrate,
    integrate_one,
)
from fedknow.protocols.config import TrainConfig
from fedknow.protocols.seeds import generator

log = logging.getLogger(__name__)

__all__ = ["FedKnow"]


class FedKnow(Learner):
    """Signature task knowledge, extracted, restored, integrated (Luopan et al., ICDE 2023).

    The integration is the paper's Eqs. (3) to (5)
    (:mod:`~fedknow.client.learners.frames.projection`), but by default with multipliers of at
    least ``margin``, which the paper does not have. Extraction and restoring are stated without
    the numbers of their equations, which were not at hand.

    Keeps: of each finished task the signature knowledge, a fraction rho of the body's weights
    and its rows of the head; what ``exchange`` does not send; within a task the knowledge's
    answers for the task's samples (constants: they are computed once) and, where a setting
    needs it, the body it last trained. Sends: what ``exchange`` says, nothing more. Needs: no
    stored sample; for each step a backward pass more for each signature task that the gradient
    opposes, and pushforwards to find them; once a task a forward pass of each knowledge over
    its samples, and the fine-tuning. Valid: any model with weight matrices and a bias in its
    head, task- or class-incremental.
    """

    Settings = FedKnowSettings
    settings: FedKnowSettings
    search: ClassVar[dict[str, list[Any]]] = {
        "rho": [0.05, 0.1, 0.2],
        "labels": ["soft", "hard"],
        "temperature": [0.5, 1.0, 2.0, 4.0],
        "finetune_epochs": [0, 3, 10],
        "extract_from": ["local", "global"],
        "wasserstein": ["values", "positions"],
        "k": [3, 10],
        "margin": [0.0, 0.1, 0.5, 1.0, 2.0],
        "exchange": ["body", "all"],
        "post_aggregation": ["off", "first-epoch", "extra-epoch"],
    }

    def __init__(
        self, model: nn.Module, train: TrainConfig, settings: FedKnowSettings
    ) -> None:
        super().__init__(model, train, settings)
        check_model(self.body, self.head, settings)
        self._scratch = copy.deepcopy(
            model
        )  # teachers, extraction and the model before aggregation work in here
        self._parameters = free_parameters(self.body)
        self._memory = torch.empty(0)  # for the gradients of a batch
        self._factored: frozenset[nn.Parameter] | None = (
            None  # what the body allows is not known before it meets data
        )
        self._lazy: bool | None = None

    # --- state
    # ----------------------------------------------------------------------------------------------------

    def load_own_state(self, state: State) -> None:
        """Take over the knowledge of past tasks and what is known of this one."""
        self._knowledge = {
            int(task): Knowledge.from_state(entry)
            for task, entry in state.get("knowledge", {}).items()
        }
        self._answers: dict[int, Tensor] = {
            int(task): answer for task, answer in state.get("answers", {}).items()
        }
        self._answers_task = int(state.get("answers_task", -1))
        self._local: Tensors = dict(state.get("local", {}))
        self._signature: list[int] = list(state.get("signature", []))
        self._multipliers = {
            int(task): float(v) for task, v in state.get("multipliers", {}).items()
        }
        self._candidates: list[int] = []
        self._chosen: list[int] | None = None
        self._revisiting = self._after_aggregation = False
        self._start_counting()

    def _start_counting(self) -> None:
        self._batches = self._steps = self._signatures = self._violated = (
            self._active
        ) = 0
        self._pullbacks = self._pushforwards = self._revisits = self._opposed = 0

    def own_state(self) -> State:
        """Give the knowledge of past tasks and what is known of this one."""
        return {
            "knowledge": {
                str(task): knowledge.state_dict()
                for task, knowledge in self._knowledge.items()
            },
            "answers": {str(task): answer for task, answer in self._answers.items()},
            "answers_task": self._answers_task,
            "local": self._local,
            "signature": self._signature,
            "multipliers": {str(task): v for task, v in self._multipliers.items()},
        }

    # --- training
    # -------------------------------------------------------------------------------------------------

    metered = ("fit", "begin_epoch")

    def fit(self, task: TaskData, round: Round) -> dict[str, float]:
        """One round of local training with integrated gradients."""
        report = super().fit(task, round)
        if (
            self.settings.extract_from == "local"
            or self.settings.post_aggregation != "off"
        ):
            self._local = self.send()
        return report

    @property
    def epochs(self) -> int:
        """Local epochs, and the extra one where a setting asks for it."""
        return self.train.epochs + (
            self._revisiting and self.settings.post_aggregation == "extra-epoch"
        )

    def begin(self, task: TaskData, round: Round) -> None:
        """Restore what past tasks' knowledge says of the samples; keep the model before
        aggregation at hand."""
        super().begin(task, round)
        self._start_counting()
        self._chosen = None
        self._revisiting = bool(self._local) and self.settings.post_aggregation != "off"
        if self._factored is None and self._knowledge:
            with self.meter.free():
                found = factorable(self._scratch_body, self.images(task.train.x[:2]))
            pairs = zip(
                self._parameters, free_parameters(self._scratch_body), strict=True
            )
            self._factored = frozenset(
                parameter for parameter, scratch in pairs if scratch in found
            )
        stale = self._answers_task != task.task or any(
            len(a) != len(task.train.y) for a in self._answers.values()
        )
        if stale:
            self._answers, self._answers_task, self._multipliers = {}, task.task, {}
        self._candidates = (
            []
            if self.settings.integrator == "off"
            else self._draw_candidates(task.task, round)
        )
        if len(self._candidates) <= self.settings.k:
            self._signature = self._candidates
        if missing := [past for past in self._candidates if past not in self._answers]:
            x = self.images(task.train.x)
            self._answers |= {
                past: self._answer(self._knowledge[past], x) for past in missing
            }
        if self._revisiting:
            self._own_model_into_scratch()
            self._scratch.eval()

    def _draw_candidates(self, task: int, round: Round) -> list[int]:
        """Past tasks that a round's signature tasks are chosen from
        (:attr:`FedKnowSettings.candidates`), ascending."""
        past, size = (
            sorted(t for t in self._knowledge if t < task),
            self.settings.k + self.settings.candidates,
        )
        if not self.settings.candidates or len(past) <= size:
            return past
        kept = [t for t in self._signature if t in past]
        others = [t for t in past if t not in kept]
        drawn = generator(round.seed, "candidates").choice(
            others, size - len(kept), replace=False
        )
        return sorted([*kept, *drawn.tolist()])

    def _answer(self, knowledge: Knowledge, x: Tensor) -> Tensor:
        """What a past task's knowledge says of samples: float [n, C, H, W] -> distributions float
        [n, c]."""
        with self.meter.part(("answer", len(x), len(knowledge.classes))):
            return soft_labels(
                knowledge.logits(self._scratch_body, x, 256, self.autocast),
                self.settings,
            )

    def begin_epoch(self, epoch: int) -> None:
        """The first epoch after aggregation guards against negative transfer instead of forgetting."""
        self._after_aggregation = self._revisiting and epoch == 0

    def cost_key(self, count: int, head: HeadSlice) -> Hashable:
        """A step but for what depends on the gradients, which is in parts of its own."""
        key, past = super().cost_key(count, head), self._signature_tasks()
        if self._after_aggregation or not self._integrates(self._batches + 1, past):
            return key, self._after_aggregation
        slices = tuple(len(self._knowledge[task].classes) for task in past)
        return key, slices, self._chosen is None, self._lazy is not False

    def gradient(self, batch: Batch) -> tuple[float, int]:
        """Gradients of one batch: of the head plainly, of the body integrated."""
        if self._after_aggregation:
            return self._gradient_after_aggregation(batch)
        past = self._signature_tasks()
        self._batches += 1
        if not self._integrates(self._batches, past):
            return super().gradient(batch)
        if self.settings.restore_from < 1:
            return self._gradient_restored_from_a_part(batch, past)
        at_body = Linearization(
            self.body, batch.x, self.autocast(), self._factored or frozenset()
        )
        features = at_body.features.requires_grad_()
        with self.autocast():
            logits = widen(self.head(features))
        z = batch.head.logits(logits)
        loss = F.cross_entropy(z, batch.y)
        of_head = free_parameters(self.head)
        own, *gradients = torch.autograd.grad(loss, [features, *of_head])
        for parameter, gradient in zip(of_head, gradients, strict=True):
            parameter.grad = gradient
        restored = self._restored(logits.detach(), batch.index, past)
        if self.settings.integrator == "online" and self._may_be_lazy(
            min(len(past), self.settings.k)
        ):
            result = self._integrated_online(at_body, own, restored, past)
        else:
            result = self._integrated(at_body, own, restored, past)
        self._count(result)
        self._set_body_gradient(at_body.expand(result.gradient), at_body.reached)
        return loss.item(), hits(z, batch.y)

    def _gradient_restored_from_a_part(
        self, batch: Batch, past: list[int]
    ) -> tuple[float, int]:
        """The batch's gradient, integrated with restored gradients of its first samples."""
        report = super().gradient(batch)
        plain, reached = flatten_present(
            [parameter.grad for parameter in self._parameters], self._parameters
        )
        part = math.ceil(self.settings.restore_from * len(batch.y))
        at_part = Linearization(
            self.body, batch.x[:part], self.autocast()
        )  # its own coordinates would not be g's
        with self.autocast(), torch.no_grad():
            logits = widen(self.head(at_part.features))
        restored = self._restored(logits, batch.index[:part], past)
        result = self._integrated(
            at_part, restored.sum(0) @ self.head.weight.detach(), restored, past, plain
        )
        self._count(result)
        self._set_body_gradient(at_part.expand(result.gradient), reached)
        return report

    def _count(self, result: Integration) -> None:
        self._steps += 1
        self._violated += result.violated
        self._active += int((result.multipliers > 0).sum())
        self._pullbacks += 1 + result.built
        self._pushforwards += result.asked

    def _integrates(self, batch: int, past: list[int]) -> bool:
        """Whether the gradient of a round's so-and-so-manieth batch is integrated."""
        return (
            bool(past)
            and self.settings.integrator != "off"
            and batch % self.settings.every == 0
        )

    def _integrated(
        self,
        at_body: Linearization,
        own: Tensor,
        restored: Tensor,
        past: list[int],
        plain: Tensor | None = None,
    ) -> Integration:
        """Integrate the gradients of one batch.

        Parameters
        ----------
        at_body : Linearization
            The body at the batch: g = J^T c.
        own : Tensor
            Gradient of the loss by the features, c, float [n, f].
        restored : Tensor
            Gradients of the restored losses by the logits (:meth:`_restored`).
        past : list of int
            Their tasks.
        plain : Tensor, optional
            g, where it is not J^T c, as ``at_body`` is at a part of the batch; c is the sum of
            the restored ones then.
        """
        s = self.settings
        head, count = self.head.weight.detach(), min(len(past), s.k)
        margin = 0.0 if s.integrator == "sum" else s.margin
        choosing = self._chosen is None and len(past) > s.k
        self._signatures += count
        room = self._room(1 + count, at_body.size)
        g, rows = room[0], room[1:]
        lazily = self._may_be_lazy(count)
        self.meter.add(memory=g.nbytes)
        leant = not choosing and (
            plain is None or lazily
        )  # else g alone is needed first
        towards = (
            own
            if plain is not None or not leant or not margin
            else own + margin * restored.sum(0) @ head
        )
        if plain is None or lazily:
            at_body.pullback(towards, g, forward=lazily)
        able = lazily and self._can_push_forward(at_body, towards, g)
        if plain is not None and leant and margin:
            g.mul_(margin).add_(plain)
        elif plain is not None:
            g.copy_(plain)
        if choosing:
            restored = restored[
                self._choose(at_body, g, restored @ head, past, rows[0])
            ]
        restorer = Restorer(at_body, restored, head, rows, self.meter)
        if margin and not leant:
            g.add_(restorer.combine(np.ones(count)), alpha=margin)
            self._pullbacks += 1
        with self.meter.told():
            if s.integrator == "sum":
                result = Integration(
                    g + restorer.combine(np.ones(count)), np.zeros(count), 0, 1
                )
            elif able and s.integrator == "qp":
                result = integrate_lazily(g, count, restorer.build, restorer.products)
            elif able and s.integrator == "surrogate":
                result = integrate_surrogate(
                    g, restorer.lengths(), restorer.products(g)[0], restorer.combine
                )
            else:
                result = integrate(g, restorer.build(range(count)))
            self.meter.add(result.flops, 2 * g.nbytes)  # g' and what was added to g
        return result

    def _integrated_online(
        self, at_body: Linearization, own: Tensor, restored: Tensor, past: list[int]
    ) -> Integration:
        """Integrate with the multipliers that the task's earlier batches left, and move these; as
        `_integrated`.

        One backward pass, of ``c + sum_i v_i c_i``, gives g', and one pushforward along it
        tells how v moves.
        """
        head, choosing = (
            self.head.weight.detach(),
            self._chosen is None and len(past) > self.settings.k,
        )
        g, *rows = self._room(2, at_body.size)
        if self._lazy is None:
            with self.meter.free():
                at_body.pullback(own, g, forward=True)
            if not self._can_push_forward(at_body, own, g):
                return self._integrated(at_body, own, restored, past)
        if choosing:
            at_body.pullback(own, g)
            places = self._choose(at_body, g, restored @ head, past, rows[0])
            self._pullbacks += 1
            restored, past = restored[places], [past[place] for place in places]
        self._signatures += len(past)
        restorer = Restorer(at_body, restored, head, rows[0][None], self.meter)
        v = np.array([self._multipliers.get(task, 0.0) for task in past])
        turned = restorer.turn(own, v + self.settings.margin, g)
        products, lengths = restorer.products(turned)[0], restorer.lengths(turned)
        self._multipliers |= dict(
            zip(past, step_dual(v, products, lengths).tolist(), strict=True)
        )
        return Integration(turned, v, int((products < 0).sum()), 0, 1)

    def _choose(
        self,
        at_body: Linearization,
        g: Tensor,
        restored: Tensor,
        past: list[int],
        row: Tensor,
    ) -> list[int]:
        """Places, among past tasks, of the signature tasks: those farthest from g. One restored
        gradient at a time."""
        self._pullbacks += len(past)

        def gradient(cotangent: Tensor) -> Tensor:
            with self.meter.part(("candidate", cotangent.shape)):
                return flatten(
                    at_body.expand(at_body.pullback(cotangent, row)), self._parameters
                )

        own = flatten(at_body.expand(g), self._parameters)
        chosen = most_dissimilar(
            own, map(gradient, restored), self.settings.k, self.settings.wasserstein
        )
        self._signature = [past[place] for place in chosen]
        if self.settings.select == "round":
            self._chosen = self._signature
        return chosen

    def _room(self, count: int, size: int) -> Tensor:
        """Memory for so many gradients, float [count, size]; on a processor what is not written to
        takes up none."""
        if self._memory.numel() < count * size:
            with self.meter.free():
                self._memory = self._parameters[0].new_empty(count * size)
        return self._memory[: count * size].view(count, size)

    def _may_be_lazy(self, count: int) -> bool:
        """Whether the gradients an integration needs are to be found out before they are computed."""
        if self.settings.integrator == "qp" and self.settings.path == "full":
            return False
        return (
            self.settings.integrator != "sum" and count > 1 and self._lazy is not False
        )

    def _can_push_forward(self, at_body: Linearization, own: Tensor, g: Tensor) -> bool:
        """Whether the body's operations can be differentiated twice: found out once, by ``<c, J g>
        = <g, g>``.

        A property of the model alone, so clients that share a learner do not influence each other.
        """
        if self._lazy is None:
            with self.meter.free():
                square = torch.dot(g, g).item()
            if not 0 < square < math.inf:
                return True  # nothing can be told from this batch
            try:
                with self.meter.free():
                    product = (own * at_body.pushforward(g)).sum().item()
                fault = f"<c, J g> = {product:g} where <J^T c, g> = {square:g}"
            except RuntimeError as error:
                product, fault = math.nan, str(error).splitlines()[0]
            tolerance = 1e-3 if self.train.precision == "fp32" else 5e-2
            self._lazy = abs(product - square) <= tolerance * square
            if not self._lazy:
                log.warning(
                    "all restored gradients will be computed, as this body's cannot be asked for: %s",
                    fault,
                )
        return self._lazy

    def counts(self) -> dict[str, float]:
        """Means over the integrated steps of the round.

        ``signature-tasks``, ``violated``, ``active``: constraints there were, that ``g + margin
        sum_i g_i`` violated (with ``online``: that g' does), and that bind g'. ``pullbacks``,
        ``pushforwards``: backward passes, and products of the body's Jacobian with a vector
        (about as dear), that a step took. ``opposed``: share of the steps after aggregation in
        which g_a and g_b were at an obtuse angle.
        """
        steps = max(1, self._steps)
        return {
            "signature-tasks": self._signatures / steps,
            "violated": self._violated / steps,
            "active": self._active / steps,
            "pullbacks": self._pullbacks / steps,
            "pushforwards": self._pushforwards / steps,
            "opposed": self._opposed / max(1, self._revisits),
        }

    def _signature_tasks(self) -> list[int]:
        """Past tasks to restore: those chosen for this round, or all candidates where none were
        left out yet."""
        return self._chosen if self._chosen is not None else self._candidates

    def _restored(self, logits: Tensor, index: Tensor, past: list[int]) -> Tensor:
        """Gradients by the logits of what past tasks' knowledge asks of a batch (Sec. III-C).

        Logits float [n, classes], the samples' places in the task int64 [n] -> float [k, n,
        classes].
        """
        at_logits = logits.new_zeros(len(past), *logits.shape)
        for restored, task in zip(at_logits, past, strict=True):
            classes = torch.tensor(self._knowledge[task].classes, device=logits.device)
            answers = self._answers[task][index]
            restored[:, classes] = restored_cotangent(
                logits[:, classes], answers, self.settings.temperature
            )
        return at_logits

    def _set_body_gradient(
        self, parts: Sequence[Tensor], reached: Sequence[bool]
    ) -> None:
        """Leave alone what the batch does not depend on: with a gradient of zeros, weight decay
        would move it."""
        for parameter, part, has_part in zip(
            self._parameters, parts, reached, strict=True
        ):
            parameter.grad = part if has_part else None

    def _gradient_after_aggregation(self, batch: Batch) -> tuple[float, int]:
        """Negative transfer (Sec. III-E): g_a at the received model, turned to agree with g_b at
        the own one."""
        with self.autocast():
            logits = self._scratch(batch.x)
        loss = F.cross_entropy(batch.head.logits(widen(logits)), batch.y)
        g_b, _ = flatten_present(
            torch.autograd.grad(
                loss, free_parameters(self._scratch_body), allow_unused=True
            ),
            self._parameters,
        )
        report = super().gradient(batch)
        g_a, reached = flatten_present(
            [parameter.grad for parameter in self._parameters], self._parameters
        )
        with self.meter.told():
            integrated = integrate_one(g_a, g_b)
            self.meter.add(
                4 * g_a.numel(), 2 * g_a.nbytes
            )  # two products; g' and what was added to g_a
        self._revisits += 1
        self._opposed += integrated is not g_a
        self._set_body_gradient(views(integrated, self._parameters), reached)
        return report

    # --- the end of a task
    # ----------------------------------------------------------------------------------------

    def end_task(self, task: TaskData, round: Round) -> dict[str, float]:
        """Extract the task's signature knowledge; a client never chosen in the task trains first."""
        super().end_task(task, round)
        if self.settings.extract_from == "local":
            self._own_model_into_scratch()
        else:
            self._scratch.load_state_dict(self.model.state_dict())
        self._knowledge[task.task] = extract(
            self._scratch,
            self.images(task.train.x),
            task.train.y,
            task.classes,
            rho=self.settings.rho,
            epochs=self.settings.finetune_epochs,
            batch_size=self.train.batch_size,
            lr=self.settings.finetune_lr,
            seed=round.seed,
            autocast=self.autocast,
            meter=self.meter,
            smallest=self.smallest_batch(task.train.x),
        )
        self._local, self._answers, self._answers_task = {}, {}, -1
        return {
            "knowledge-bytes": float(
                sum(knowledge.nbytes for knowledge in self._knowledge.values())
            )
        }

    def _own_model_into_scratch(self) -> None:
        """The model as this client last trained it: its own body under its head."""
        self._scratch.load_state_dict(self.model.state_dict() | self._local)

    @property
    def _scratch_body(self) -> nn.Module:
        return cast(nn.Module, self._scratch.body)
