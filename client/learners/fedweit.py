"""FedWEIT: weights made of shared, own and borrowed parts.

They are a shared base, sparse parameters of each task, and what other clients' tasks lend.

Yoon, Jeong, Lee, Yang and Hwang, "Federated Continual Learning with Weighted Inter-client
Transfer", ICML 2021, arXiv 2003.03196. The client's half; the server's is
:class:`fedknow.strategies.fedweit.FedWeit`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedknow.client.data.stream import TaskData
from fedknow.client.learners.frames.checks import check_free
from fedknow.client.learners.frames.learner import (
    Batch,
    Layout,
    Learner,
    LearnerSettings,
    Predictor,
    Round,
    State,
    Tensors,
    hits,
    make_optimizer,
    widen,
)
from fedknow.client.learners.frames.sparse import pack, packed_bytes, unpack
from fedknow.protocols.config import TrainConfig
from fedknow.protocols.texts import counted

__all__ = ["FedWeit", "FedWeitSettings", "sent_units"]


class FedWeitSettings(LearnerSettings):
    """Settings of :class:`FedWeit`."""

    sparsity: float = Field(1e-3, ge=0)
    """lambda_1: weight of the L1 norm of the adaptive parameters, and the size below which they
    are dropped."""
    retention: float = Field(100.0, ge=0)
    """lambda_2: weight of what past tasks' parameters have moved."""
    mask_sparsity: float = Field(0.0, ge=0)
    """Weight of the L1 norm of the masks."""
    sent: float = Field(0.7, gt=0, le=1)
    """Fraction of each layer's units, those with the largest mask, whose base weights go to the
    server."""
    mask: float = 3.0
    """Where masks start, before the sigmoid. Adaptive parameters and attention start at 0, so a
    task starts from sigmoid(mask) times the shared base."""


@dataclass
class _Task:
    """What a client has of a task: all by name of the body's parameter."""

    mask: Tensors
    """m, one number a unit, before the sigmoid."""
    adaptive: Tensors
    """A, of the parameter's shape."""
    borrowed: Tensors = field(default_factory=dict)
    """sum_j alpha_j A_j, fixed when the task is over; empty: nothing."""
    buffers: Tensors = field(default_factory=dict)
    """The body's running statistics when the task was over."""

    def weights(
        self, base: Mapping[str, Tensor], borrowed: Mapping[str, Tensor]
    ) -> Tensors:
        """theta = B * sigmoid(m) + A + what is borrowed (Eq. 2)."""
        weights = {
            name: b * torch.sigmoid(self.mask[name]) + self.adaptive[name]
            for name, b in base.items()
        }
        return {
            name: value + borrowed[name] if borrowed else value
            for name, value in weights.items()
        }

    def state_dict(self) -> State:
        return {
            "mask": {name: m.detach() for name, m in self.mask.items()},
            "adaptive": pack(self.adaptive),
            "borrowed": pack(self.borrowed),
            "buffers": self.buffers,
        }

    @classmethod
    def from_state(cls, state: State) -> _Task:
        mask = {
            name: m.clone() for name, m in state["mask"].items()
        }  # trained in place, and the state is not ours
        return cls(
            mask,
            unpack(state["adaptive"]),
            unpack(state["borrowed"]),
            dict(state["buffers"]),
        )

    @property
    def nbytes(self) -> int:
        plain = sum(
            value.nbytes for value in (*self.mask.values(), *self.buffers.values())
        )
        return (
            plain
            + packed_bytes(pack(self.adaptive))
            + packed_bytes(pack(self.borrowed))
        )


class FedWeit(Learner):
    """Base, task-adaptive and borrowed parameters (ICML 2021).

    Yoon et al. call it weighted inter-client transfer.

    Every parameter of the body is split, for a client's task t (Eq. 2),

        theta_t = B * sigmoid(m_t) + A_t + sum_c alpha_t,c A_c

    into the shared base B under a mask of units m_t, adaptive parameters A_t, and other
    clients' adaptive parameters A_c weighted by attention. A round minimises over B, m_t,
    alpha_t and all the client's A_1..t (Eq. 3)

        L(theta_t) + lambda_1 (sum_i |A_i| + ...) + lambda_2 sum_{i<t} ||(B - B') sigmoid(m_i) +
        A_i - A'_i||^2

    where B' and A' are those at the end of task t - 1; B' is the global base that the task
    ended with, for every client the same. When a task is over, entries of A below lambda_1 are
    dropped and A_t goes to the server; with a client's first work of the next task come all
    clients' A_t.

    What the paper leaves open is as in the authors' code: A_c are those of the previous task
    alone (the paper sums over all past ones), attention is one number a client and parameter
    tensor, the base of units with a small mask is not sent, and the server averages each weight
    over those who sent it (a plain mean would shrink it). Other than there
    (github.com/wyjeong/FedWeIT),

    - biases are split like weights, A starts at 0 instead of B / 3 and attention at 0 instead
      of at random;
    - masks start at 3, where the gate is 0.95, instead of around 0, where it is 0.5;
    - the A_i of past tasks are trained, as in the paper; there they stay as they were;
    - A_c are those of all other clients; there of the clients that were selected in the last
      round, this one included if it was;
    - small entries of A are dropped for good when the task is over; there only from what is
      sent and when it is scored;
    - B' is the global base, and not the client's own as it last trained it, from before the
      next global one arrives;
    - of units that nobody sent a client gets the global base of before, and does not keep its own;
    - the squared norm is not halved, so lambda_2 = 100 weighs twice what theirs does;
    - weight decay acts on B in every task, not in the first alone;
    - of units with equal masks those that come first are sent, so that their number is as asked.

    The paper's lambda_1 is on the masks too; here that weight is a setting of its own
    (``mask_sparsity``), by default 0, as there.

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
        self._base = {
            name: p for name, p in self.body.named_parameters() if p.requires_grad
        }
        self._buffers = dict(self.body.named_buffers())

    # --- state

    def load_own_state(self, state: State) -> None:
        """Take over the parameters of each task and what others lend."""
        self._tasks = {
            int(task): _Task.from_state(entry)
            for task, entry in state.get("tasks", {}).items()
        }
        self._base_then: Tensors = dict(state.get("base_then", {}))
        self._adaptive_then = {
            int(task): unpack(entry)
            for task, entry in state.get("adaptive_then", {}).items()
        }
        self._others: Tensors = unpack(state.get("others", {}))
        self._attention: Tensors = {
            name: alpha.clone() for name, alpha in state.get("attention", {}).items()
        }
        self._everybody: Tensors = {}
        self._global = False

    def own_state(self) -> State:
        """Give the parameters of each task and what others lend."""
        return {
            "tasks": {
                str(task): entry.state_dict() for task, entry in self._tasks.items()
            },
            "base_then": self._base_then,
            "adaptive_then": {
                str(task): pack(entry) for task, entry in self._adaptive_then.items()
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
        """The base, with zeros for the units with the smallest masks."""
        sent = super().send()
        current = self._tasks.get(self._trained_task)
        for name, mask in current.mask.items() if current else ():
            there = sent_units(mask, self.settings.sent)
            sent[f"body.{name}"] = torch.where(there, sent[f"body.{name}"], 0.0)
        return sent

    def share(self, task: TaskData, round: Round, ended: bool) -> Tensors:
        """When a task is over, its adaptive parameters."""
        return dict(self._tasks[task.task].adaptive) if ended else {}

    def shares(self, ended: bool) -> Layout:
        """The adaptive parameters of a task."""
        return (
            {name: ("float32", tuple(b.shape)) for name, b in self._base.items()}
            if ended
            else {}
        )

    def receive_extra(self, extra: Tensors) -> None:
        """Take all clients' adaptive parameters of the previous task.

        For each name they are one after the other.
        """
        if {n: v.shape[1:] for n, v in extra.items()} != {
            n: b.shape for n, b in self._base.items()
        }:
            raise ValueError(
                f"adaptive parameters of {counted(len(extra), 'tensor')} do not fit the "
                f"model's body"
            )
        self._everybody = extra

    # --- training

    def begin(self, task: TaskData, round: Round) -> None:
        """Set up the task's parameters, and one optimizer for all."""
        if task.task not in self._tasks:
            self._begin_task(task.task)
        if self._everybody:
            clients = len(next(iter(self._everybody.values())))
            others = [client for client in range(clients) if client != round.client]
            self._others = {
                name: everybody[others] for name, everybody in self._everybody.items()
            }
            self._attention = {
                name: b.new_zeros(len(others)) for name, b in self._base.items()
            }
            self._everybody = {}
        self._now = self._tasks[task.task]
        self._past = [
            (self._tasks[past], then) for past, then in self._adaptive_then.items()
        ]
        # Past tasks' parameters and attention have no L2 term: it would pull them from what
        # they hold.
        decayed = [*self._now.mask.values(), *self._now.adaptive.values()]
        plain = [
            *self._attention.values(),
            *(a for entry, _ in self._past for a in entry.adaptive.values()),
        ]
        self._own = [tensor.requires_grad_() for tensor in (*decayed, *plain)]
        self.optimizer = make_optimizer(
            self.train,
            iter([*self._base.values(), *decayed]),
            iter([*self.head.parameters(), *plain]),
        )

    def _begin_task(self, task: int) -> None:
        self._tasks[task] = _Task(
            {
                name: b.new_full(_unit_shape(b), self.settings.mask)
                for name, b in self._base.items()
            },
            {
                name: torch.zeros_like(b, requires_grad=False)
                for name, b in self._base.items()
            },
        )
        self._adaptive_then = {
            past: {name: a.clone() for name, a in entry.adaptive.items()}
            for past, entry in self._tasks.items()
            if past < task
        }

    def gradient(self, batch: Batch) -> tuple[float, int]:
        """Gradients of Eq. (3)."""
        weights = self._now.weights(self._base, self._borrow())
        reached: set[str] = set()
        for name, weight in weights.items():
            weight.register_hook(partial(_note, reached, name))  # type: ignore[no-untyped-call]
        with self.autocast():
            features = functional_call(self.body, weights, (batch.x,))
            logits = self.head(features)
        z = batch.head.logits(widen(logits))
        loss = F.cross_entropy(z, batch.y)
        (loss + self._penalty()).backward()  # type: ignore[no-untyped-call]
        for name in (
            self._base.keys() - reached
        ):  # with the penalty's zeros, weight decay would move it
            self._base[name].grad = None
        return loss.item(), hits(z, batch.y)

    def _borrow(self) -> Tensors:
        """sum_c alpha_c A_c."""
        return {
            name: torch.tensordot(alpha, self._others[name], 1)
            for name, alpha in self._attention.items()
        }

    def _penalty(self) -> Tensor:
        """The terms of Eq. (3) besides the loss."""
        adaptive = [
            a
            for entry in (self._now, *(entry for entry, _ in self._past))
            for a in entry.adaptive.values()
        ]
        penalty = (
            self.settings.sparsity
            * torch.stack([a.abs().sum() for a in adaptive]).sum()
        )
        if self.settings.mask_sparsity:
            penalty = penalty + self.settings.mask_sparsity * sum(
                m.abs().sum() for m in self._now.mask.values()
            )
        for entry, then in self._past:
            for name, b in self._base.items():
                moved = (
                    (b - self._base_then[name]) * torch.sigmoid(entry.mask[name])
                    + entry.adaptive[name]
                    - then[name]
                )
                penalty = penalty + self.settings.retention * moved.square().sum()
        return penalty

    def step(self) -> None:
        """One step of everything that is trained."""
        if self.train.clip_norm:
            nn.utils.clip_grad_norm_(self._own, self.train.clip_norm)
        super().step()

    def release(self) -> None:
        """Let only what a round has set up be trained."""
        for tensor in self._own:
            tensor.requires_grad_(False)

    def counts(self) -> dict[str, float]:
        """``adaptive``: share of the task's adaptive parameters above lambda_1."""
        adaptive = torch.cat(
            [a.detach().flatten() for a in self._now.adaptive.values()]
        )
        return {
            "adaptive": float((adaptive.abs() > self.settings.sparsity).float().mean())
        }

    def end_task(self, task: TaskData, round: Round) -> dict[str, float]:
        """Drop small adaptive parameters, fix what was borrowed.

        The state that must be retained is noted.
        """
        shared = (
            super().send()
        )  # all of it: what is withheld from the server belongs to B' too
        super().end_task(task, round)
        self.entries.load(
            shared
        )  # a client that had to train first: its B' is the shared base like everybody's
        done = self._tasks[task.task]
        done.borrowed = self._borrow()
        done.buffers = {name: value.clone() for name, value in self._buffers.items()}
        for entry in self._tasks.values():
            large = {
                name: a.abs() > self.settings.sparsity
                for name, a in entry.adaptive.items()
            }
            entry.adaptive = {
                name: torch.where(large[name], a, 0.0)
                for name, a in entry.adaptive.items()
            }
        self._base_then = {name: shared[f"body.{name}"] for name in self._base}
        self._others, self._attention, self._adaptive_then = {}, {}, {}
        then = sum(b.nbytes for b in self._base_then.values())
        return {
            "knowledge-bytes": float(
                then + sum(entry.nbytes for entry in self._tasks.values())
            )
        }

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
        now = self._borrow() if task == max(self._tasks) else {}
        return entry.weights(self._base, entry.borrowed or now) | entry.buffers


def _note(reached: set[str], name: str, gradient: Tensor) -> None:
    """Note that a parameter takes part in the loss."""
    reached.add(name)


def _unit_shape(parameter: Tensor) -> tuple[int, ...]:
    """One number for each unit: the first dimension, the others 1."""
    return (len(parameter), *(1 for _ in parameter.shape[1:]))


def sent_units(mask: Tensor, fraction: float) -> Tensor:
    """Tell which units are sent: the fraction with the largest mask.

    It is at least one unit; of equal ones those that come first.

    Parameters
    ----------
    mask : Tensor
        One number a unit, float [units, 1, ...].
    fraction : float
        In (0, 1].

    Returns
    -------
    Tensor
        Bool, of the mask's shape.
    """
    # Stable, so that equal masks give the same units on every machine.
    order = mask.detach().flatten().argsort(descending=True, stable=True)
    there = torch.zeros_like(order, dtype=torch.bool)
    there[order[: max(1, math.ceil(fraction * len(order)))]] = True
    return there.view(mask.shape)
