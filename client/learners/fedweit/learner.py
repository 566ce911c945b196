"""The client's half of FedWeIT."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedknow.client.data.stream import TaskData
from fedknow.client.learners.fedweit.parameters import (
    TaskParameters,
    cloned,
    penalty_of,
    sent_units,
    weighted_sum,
)
from fedknow.client.learners.fedweit.settings import FedWeitSettings
from fedknow.client.learners.frames.checks import check_free
from fedknow.client.learners.frames.learner import (
    Batch,
    Layout,
    Learner,
    Predictor,
    Round,
    State,
    Tensors,
    hits,
    make_optimizer,
    widen,
)
from fedknow.client.learners.frames.sparse import pack, unpack
from fedknow.protocols.config import TrainConfig
from fedknow.protocols.texts import counted

__all__ = ["FedWeit"]


class FedWeit(Learner):
    """Base, task-adaptive and borrowed parameters (ICML 2021).

    Yoon et al. call it weighted inter-client transfer.

    :mod:`fedknow.client.learners.fedweit` has the equations, and where the method differs from
    the authors' code.

    Keeps: the head, m and A of each task, what it borrowed, B'; all A_c of the previous task
    while one lasts. Sends: the body without some units, once a task A_t; gets the body, once a
    task all clients' A. Zeros do not travel. Needs: no stored sample; memory of a body for each
    past task and for each other client. Valid: task-incremental, as the task chooses the
    parameters; any model. Scored as the purely global model it is B alone.
    """

    exchange = "body"
    Settings = FedWeitSettings
    settings: FedWeitSettings
    scenarios = ("task-incremental",)
    strategy = "fedweit"
    sparse = True
    search: ClassVar[dict[str, list[Any]]] = {
        "sparsity": [1e-4, 1e-3],
        "retention": [1.0, 10.0, 100.0],
        "sent": [0.3, 0.7, 1.0],
    }

    def __init__(
        self, model: nn.Module, train: TrainConfig, settings: FedWeitSettings
    ) -> None:
        super().__init__(model, train, settings)
        check_free(model, "fedweit", "body", "splits the body's parameters")
        # Without the body's prefix: these names are those of functional_call.
        self._base = {
            name: p for name, p in self.body.named_parameters() if p.requires_grad
        }
        self._buffers = dict(self.body.named_buffers())

    # --- state

    def load_own_state(self, state: State) -> None:
        """Take over the parameters of each task and what others lend."""
        self._tasks = {
            int(task): TaskParameters.from_state(entry)
            for task, entry in state.get("tasks", {}).items()
        }
        self._base_then: Tensors = dict(state.get("base_then", {}))
        self._adaptive_then = {
            int(task): unpack(entry)
            for task, entry in state.get("adaptive_then", {}).items()
        }
        self._others: Tensors = unpack(state.get("others", {}))
        self._attention = cloned(state.get("attention", {}))
        # All clients' parameters are only borrowed from, and not kept.
        self._everybody: Tensors = {}
        self._global = False

    def own_state(self) -> State:
        """Give the parameters of each task and what others lend."""
        return {
            "tasks": {
                str(task): entry.state_dict()
                for task, entry in self._tasks.items()
            },
            "base_then": self._base_then,
            "adaptive_then": {
                str(task): pack(entry)
                for task, entry in self._adaptive_then.items()
            },
            "others": pack(self._others),
            "attention": {
                name: alpha.detach() for name, alpha in self._attention.items()
            },
        }

    def load_local_parameters(self, arrays: Tensors) -> None:
        """Another head, and from now on predict with the shared base alone."""
        super().load_local_parameters(arrays)
        self._global = True

    # --- what travels

    def send(self) -> Tensors:
        """Give the base, with zeros for the units with the smallest masks."""
        sent = super().send()
        current = self._tasks.get(self._trained_task)
        for name, mask in current.mask.items() if current else ():
            is_sent = sent_units(mask, self.settings.sent)
            sent[f"body.{name}"] = torch.where(is_sent, sent[f"body.{name}"], 0.0)
        return sent

    def share(self, task: TaskData, round: Round, ended: bool) -> Tensors:
        """When a task is over, its adaptive parameters."""
        return dict(self._tasks[task.task].adaptive) if ended else {}

    def shares(self, ended: bool) -> Layout:
        """Describe the adaptive parameters of a task."""
        if not ended:
            return {}
        return {
            name: ("float32", tuple(b.shape)) for name, b in self._base.items()
        }

    def receive_extra(self, extra: Tensors) -> None:
        """Take all clients' adaptive parameters of the previous task.

        For each name they are one after the other.
        """
        if {n: v.shape[1:] for n, v in extra.items()} != {
            n: b.shape for n, b in self._base.items()
        }:
            raise ValueError(
                f"adaptive parameters of {counted(len(extra), 'tensor')} "
                "do not fit the model's body"
            )
        self._everybody = extra

    # --- training

    def begin(self, task: TaskData, round: Round) -> None:
        """Set up the task's parameters, and one optimizer for all."""
        if task.task not in self._tasks:
            self._begin_task(task.task)
        if self._everybody:
            self._borrow_from_all_but(round.client)
        self._now = self._tasks[task.task]
        self._past = [
            (self._tasks[number], adaptive)
            for number, adaptive in self._adaptive_then.items()
        ]
        decayed = [*self._now.mask.values(), *self._now.adaptive.values()]
        # No L2 term here: it would pull past parameters and attention from what they hold.
        undecayed = list(self._attention.values())
        for entry, _ in self._past:
            undecayed += entry.adaptive.values()
        # They are no parameters of the model, so that the frame does not know them.
        self._own = [tensor.requires_grad_() for tensor in (*decayed, *undecayed)]
        self.optimizer = make_optimizer(
            self.train,
            iter([*self._base.values(), *decayed]),
            iter([*self.head.parameters(), *undecayed]),
        )

    def _begin_task(self, task: int) -> None:
        self._tasks[task] = TaskParameters.initial(self._base, self.settings.mask)
        self._adaptive_then = {
            number: entry.adaptive_copy()
            for number, entry in self._tasks.items()
            if number < task
        }

    def _borrow_from_all_but(self, client: int) -> None:
        """Take the other clients' adaptive parameters, with attention 0."""
        clients = len(next(iter(self._everybody.values())))
        lenders = [number for number in range(clients) if number != client]
        self._others = {
            name: everybody[lenders]
            for name, everybody in self._everybody.items()
        }
        self._attention = {
            name: b.new_zeros(len(lenders)) for name, b in self._base.items()
        }
        self._everybody = {}

    def gradient(self, batch: Batch) -> tuple[float, int]:
        """Gradients of Eq. (3)."""
        weights = self._now.weights(self._base, self._borrow())
        reached: set[str] = set()
        for name, weight in weights.items():
            # Whether the loss reaches a weight shows only while gradients flow.
            weight.register_hook(partial(_note, reached, name))  # type: ignore[no-untyped-call]
        with self.autocast():
            features = functional_call(self.body, weights, (batch.x,))
            logits = self.head(features)
        z = batch.head.logits(widen(logits))
        loss = F.cross_entropy(z, batch.y)
        (loss + self._penalty()).backward()  # type: ignore[no-untyped-call]
        # With the penalty's zeros as a gradient, weight decay would move these.
        for name in self._base.keys() - reached:
            self._base[name].grad = None
        return loss.item(), hits(z, batch.y)

    def _borrow(self) -> Tensors:
        return weighted_sum(self._attention, self._others)

    def _penalty(self) -> Tensor:
        """Compute the terms of Eq. (3) besides the loss."""
        return penalty_of(
            self._now, self._past, self._base, self._base_then, self.settings
        )

    def step(self) -> None:
        """One step of everything that is trained."""
        if self.train.clip_norm:
            # The frame clips the model's parameters, and not these.
            nn.utils.clip_grad_norm_(self._own, self.train.clip_norm)
        super().step()

    def release(self) -> None:
        """Let only what a round has set up be trained."""
        for tensor in self._own:
            tensor.requires_grad_(False)

    def counts(self) -> dict[str, float]:
        """``adaptive``: share of the task's adaptive parameters above lambda_1."""
        values = self._now.adaptive.values()
        adaptive = torch.cat([a.detach().flatten() for a in values])
        is_large = adaptive.abs() > self.settings.sparsity
        return {"adaptive": float(is_large.float().mean())}

    def end_task(self, task: TaskData, round: Round) -> dict[str, float]:
        """Drop small adaptive parameters, fix what was borrowed, note B'."""
        # All of the base: units that are withheld from the server belong to B' too.
        shared = super().send()
        super().end_task(task, round)
        # A client that had to train first goes back to the shared base, as its B'.
        self.entries.load(shared)
        ended = self._tasks[task.task]
        ended.borrowed = self._borrow()
        ended.buffers = cloned(self._buffers)
        for entry in self._tasks.values():
            entry.drop_small(self.settings.sparsity)
        self._base_then = {name: shared[f"body.{name}"] for name in self._base}
        self._others, self._attention, self._adaptive_then = {}, {}, {}
        base_bytes = sum(b.nbytes for b in self._base_then.values())
        task_bytes = sum(entry.nbytes for entry in self._tasks.values())
        return {"knowledge-bytes": float(base_bytes + task_bytes)}

    # --- scoring

    def predictors(self, count: int) -> Iterator[Predictor]:
        """Each task's own parameters, made when they are asked for."""
        for task in range(count):
            yield partial(self._logits_with, self._weights_of(task))

    def _logits_with(self, weights: Tensors, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(functional_call(self.body, weights, (x,))))

    def _weights_of(self, task: int) -> Tensors:
        """Give theta of a task, and its running statistics.

        They are the base alone where the task has none yet.
        """
        if self._global or task not in self._tasks:
            return dict(self._base)
        entry = self._tasks[task]
        # What earlier tasks borrowed was fixed at their ends.
        borrowed = self._borrow() if task == max(self._tasks) else {}
        weights = entry.weights(self._base, entry.borrowed or borrowed)
        return weights | entry.buffers


def _note(reached: set[str], name: str, gradient: Tensor) -> None:
    """Note that a parameter takes part in the loss."""
    reached.add(name)
