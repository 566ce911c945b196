"""Training many clients at once, their parameters stacked.

One small model after the other costs mostly the calls, not the arithmetic. Here the parameters
of K clients are tensors ``[K, ...]``, the forward pass is :func:`torch.vmap` over them, and
since optimizers work entry by entry, PyTorch's own step on the stacked tensors is each client's
own step. Every client sees its own batches in its own order. The result is that of
:meth:`~fedknow.client.learners.frames.learner.Learner.fit` up to rounding: a product of stacked
matrices may take its sums in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedknow.client.compute.cost import Cost
from fedknow.client.data.stream import TaskData
from fedknow.client.learners.frames.learner import (
    Diverged,
    Learner,
    Round,
    Tensors,
    batches,
    make_optimizer,
    widen,
)
from fedknow.client.learners.frames.optimizers import drop_gradients
from fedknow.client.learners.frames.round import StepKey, take_step

__all__ = ["Start", "Trained", "fit_together", "price"]

_Moving = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Start:
    """The start of one client: all parameters by name, task and round.

    Clients that train together have one learner, and so one learning rate, batch size and
    number of epochs.
    """

    parameters: Tensors
    task: TaskData
    round: Round


@dataclass(frozen=True)
class Trained:
    """The result: parameters, and what :meth:`Learner.fit` reports or raises."""

    parameters: Tensors
    report: dict[str, float] | BaseException


def fit_together(learner: Learner, starts: Sequence[Start]) -> list[Trained]:
    """One round of plain local training of several clients.

    Parameters
    ----------
    learner : Learner
        Whose model and settings all clients share; its own parameters are not touched.
    starts : sequence of Start
        The clients.

    Returns
    -------
    list of Trained
        In the order given. A client that diverges does not disturb the others.
    """
    # The clients with most steps come first, so that those still at work are always the
    # first rows.
    order = sorted(range(len(starts)), key=lambda i: -len(starts[i].task.train))
    clients = [starts[i] for i in order]
    schedule = _Schedule(learner, clients)
    stack = _Stack(learner, clients)
    learner.model.train()
    losses = torch.zeros_like(schedule.weights)
    right = torch.zeros_like(schedule.weights)
    for step, count in enumerate(schedule.at_work):
        stack.truncate(count)
        batch = schedule.batch(step)
        loss, hits = stack.train(batch)
        losses[:count, step] = loss
        right[:count, step] = hits
    trained = [
        Trained(
            stack.parameters(row), schedule.report(row, losses[row], right[row])
        )
        for row in range(len(clients))
    ]
    # Back in the order in which the clients came.
    return [trained[order.index(i)] for i in range(len(order))]


def price(learner: Learner, start: Start) -> Cost:
    """Count what it costs a client to train by itself.

    Of steps of a kind not counted yet one is made, so the learner's parameters are nobody's
    afterwards.
    """
    size = learner.train.batch_size
    samples = learner.training_data(start.task, start.round)
    samples = replace(samples, x=learner.images(samples.x))
    with learner.meter.message():
        learner.begin(start.task, start.round)
        step_key = StepKey(learner, start.round.proximal_mu > 0)
        for _ in range(learner.epochs):
            for index in batches(
                len(samples), size, torch.Generator(), learner.device
            ):
                key = step_key(len(index), samples.head)
                if not learner.meter.charge(key):
                    with learner.meter.part(key):
                        take_step(learner, samples, index, {}, start.round)
    return learner.meter.cost


class _Batch(NamedTuple):
    """One batch of each client that has one: k clients, b samples each.

    Attributes
    ----------
    x : Tensor [k, b, C, H, W]
        Samples.
    y : int64 [k, b]
        Labels of the whole head.
    weight : float [k, b]
        Weight of each sample in its client's mean; 0 where a shorter batch is filled up.
    unused : bool [k, 1, classes]
        The classes that are not in use.
    """

    x: Tensor
    y: Tensor
    weight: Tensor
    unused: Tensor


class _Stack:
    """The parameters of clients in rows, and the optimizer that moves them."""

    def __init__(self, learner: Learner, clients: Sequence[Start]) -> None:
        self._learner = learner
        self._rows: Tensors = {}
        for name in clients[0].parameters:
            stacked = torch.stack([client.parameters[name] for client in clients])
            self._rows[name] = _transposed(stacked).contiguous()
        self._moving: _Moving = {
            # Parameters share memory with the rows, so that steps write into them.
            name: nn.Parameter(self._rows[name], p.requires_grad)
            for name, p in learner.trainable.items()
        }
        self._mu = torch.tensor(
            [client.round.proximal_mu for client in clients],
            device=learner.device,
        )
        self._anchors: Tensors = {}
        if self._mu.any():
            # Clones, as the steps write to the rows themselves.
            self._anchors = {
                name: self._rows[name].clone()
                for name in self._moving
                if learner.entries.travels(name)
            }
        body = [
            self._moving[name]
            for name in self._moving
            if name.startswith("body.")
        ]
        head = [
            self._moving[name]
            for name in self._moving
            if name.startswith("head.")
        ]
        self._optimizer = make_optimizer(learner.train, iter(body), iter(head))
        self._count = len(clients)

    def truncate(self, count: int) -> None:
        """Go on with the first clients; the others are done."""
        if count < self._count:
            self._moving = _truncated(
                self._rows, self._moving, self._optimizer, count
            )
            self._count = count

    def parameters(self, row: int) -> Tensors:
        """Give the parameters of one client."""
        return {
            name: _transposed(value)[row] for name, value in self._rows.items()
        }

    def train(self, batch: _Batch) -> tuple[Tensor, Tensor]:
        """Make one step of each client at work.

        Returns
        -------
        tuple of Tensor
            Loss, float [k], and number of right answers, int64 [k].
        """
        drop_gradients(self._optimizer)
        # Classes outside a client's head have no share in its softmax, nor a gradient.
        z = widen(self._logits(batch.x)).masked_fill(batch.unused, -torch.inf)
        each = F.cross_entropy(
            z.flatten(0, 1), batch.y.flatten(), reduction="none"
        )
        loss = (each.view(batch.y.shape) * batch.weight).sum(1)
        # A sum and not a mean: each client's gradient must be that of its own loss alone.
        loss.sum().backward()  # type: ignore[no-untyped-call]
        self._pull_to_anchors()
        if self._learner.train.clip_norm:
            gradients = [
                p.grad for p in self._moving.values() if p.grad is not None
            ]
            _clip(gradients, self._learner.train.clip_norm)
        self._optimizer.step()
        is_right = (z.detach().argmax(2) == batch.y) & (batch.weight > 0)
        return loss.detach(), is_right.sum(1)

    def _logits(self, x: Tensor) -> Tensor:
        model = self._learner.model

        def forward(parameters: Tensors, images: Tensor) -> Tensor:
            return cast(Tensor, functional_call(model, parameters, (images,)))

        with self._learner.autocast():
            # Matrices lie transposed, as their gradients come.
            natural = {name: _transposed(p) for name, p in self._moving.items()}
            return torch.vmap(forward)(natural, x)

    def _pull_to_anchors(self) -> None:
        """Add the gradient of FedProx's term, mu (w - w_global)."""
        count = self._count
        for name, anchor in self._anchors.items():
            parameter = self._moving[name]
            if (gradient := parameter.grad) is not None:
                distance = parameter.detach() - anchor[:count]
                gradient.add_(_column(self._mu[:count], anchor) * distance)


class _Schedule:
    """The samples that each client trains on, step by step.

    They are those of its own epochs, in its own order.

    Attributes
    ----------
    at_work : list of int
        How many clients, the first ones, still have a batch in each step.
    weights : float [clients, steps]
        Samples of each batch; 0 where there is none.
    """

    def __init__(self, learner: Learner, clients: Sequence[Start]) -> None:
        self._learner = learner
        self._sizes = [len(client.task.train) for client in clients]
        # Wider batches would be nothing but filling.
        size = min(learner.train.batch_size, max(self._sizes))
        self._per_epoch = [-(-n // size) for n in self._sizes]
        steps = learner.epochs * max(self._per_epoch)
        self._index = torch.zeros(len(clients), steps, size, dtype=torch.int64)
        self.weights = torch.zeros(len(clients), steps)
        offset = 0
        for row, (client, n) in enumerate(zip(clients, self._sizes, strict=True)):
            for step, index in enumerate(self._batches(client, n, size)):
                self._index[row, step, : len(index)] = index
                self.weights[row, step] = len(index)
            # Short batches are filled up with the client's own first sample.
            self._index[row] += offset
            offset += n
        self.at_work = [int(count) for count in (self.weights > 0).sum(0)]
        # A step is as wide as its largest batch, and the rest is not computed.
        self._widths = [int(width) for width in self.weights.amax(0)]
        unused = torch.ones(
            len(clients), learner.head.out_features, dtype=torch.bool
        )
        for row, client in enumerate(clients):
            unused[row, list(client.task.head)] = False
        device = learner.device
        self._index = self._index.to(device)
        self.weights = self.weights.to(device)
        self._outside = unused.to(device)
        self._places = torch.arange(size, device=device)
        self._x = learner.images(
            torch.cat([client.task.train.x for client in clients])
        )
        self._y = torch.cat([client.task.train.y for client in clients])

    def _batches(self, client: Start, n: int, size: int) -> Iterator[Tensor]:
        """Yield the places of a client's batches, over all its epochs."""
        # Seeded as for a client that trains alone, so that batches come in the same order.
        generator = torch.Generator().manual_seed(client.round.seed)
        for _ in range(self._learner.epochs):
            yield from batches(n, size, generator)

    def batch(self, step: int) -> _Batch:
        """Collect one batch of each client that has one."""
        count = self.at_work[step]
        width = self._widths[step]
        index = self._index[:count, step, :width]
        samples = self.weights[:count, step, None]
        # Places that only fill a batch up weigh nothing; the others make the mean over real
        # samples.
        weight = (self._places[:width] < samples) / samples
        return _Batch(
            self._x[index], self._y[index], weight, self._outside[:count, None]
        )

    def report(
        self, row: int, losses: Tensor, right: Tensor
    ) -> dict[str, float] | Diverged:
        """Give what a client reports of its round.

        By step: losses float [steps] and numbers of right answers [steps].
        """
        per_epoch, epochs = self._per_epoch[row], self._learner.epochs
        client_losses = losses[: epochs * per_epoch]
        # Negated, as a comparison with NaN is false.
        for step in (
            torch.nonzero(~(client_losses < torch.inf)).flatten()[:1].tolist()
        ):
            return Diverged.in_epoch(
                client_losses[step].item(), step // per_epoch, self._learner.train
            )
        last_epoch = slice((epochs - 1) * per_epoch, epochs * per_epoch)
        weights = self.weights[row, last_epoch].double()
        n = self._sizes[row]
        return {
            # In double, as the sum of a loop in Python would be.
            "loss": float(losses[last_epoch].double() @ weights) / n,
            "accuracy": float(right[last_epoch].sum()) / n,
            **self._learner.counts(),
        }


def _transposed(stacked: Tensor) -> Tensor:
    """Transpose stacked matrices, and back.

    They are kept transposed, as products of stacked matrices leave their gradients.
    """
    return stacked.mT if stacked.dim() == 3 else stacked


def _truncated(
    rows: Tensors, moving: _Moving, optimizer: torch.optim.Optimizer, count: int
) -> _Moving:
    """Let the optimizer go on with the first clients.

    The rows of those that are done stay as they are.
    """
    remaining = {
        name: nn.Parameter(rows[name][:count], old.requires_grad)
        for name, old in moving.items()
    }
    # Optimizers find their state by the parameter object, so each new one takes over the old
    # one's.
    new: dict[Tensor, nn.Parameter] = {
        old: remaining[name] for name, old in moving.items()
    }
    for group in optimizer.param_groups:
        group["params"] = [new[old] for old in group["params"]]
    for old, state in list(optimizer.state.items()):
        del optimizer.state[old]
        # A step counter has no rows: all clients are at the same step.
        optimizer.state[new[old]] = {
            k: v[:count] if isinstance(v, Tensor) and v.dim() else v
            for k, v in state.items()
        }
    return remaining


def _clip(gradients: Sequence[Tensor], max_norm: float) -> None:
    """Scale each client's gradients to a norm of ``max_norm`` at most.

    ``torch.nn.utils.clip_grad_norm_`` does the same.
    """
    norms = torch.stack(
        [gradient.flatten(1).norm(dim=1) for gradient in gradients]
    ).norm(dim=0)
    # The epsilon of PyTorch's clip_grad_norm_, which clients use one by one.
    factor = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(_column(factor, gradient))


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Shape one number a row to multiply rows: [k] -> [k, 1, ...].

    ``like`` has the rows.
    """
    return values.view(-1, *[1] * (like.dim() - 1))
