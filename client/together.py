"""Training many clients at once, their parameters stacked.

One small model after the other costs mostly the calls, not the arithmetic. Here the parameters
of K clients are tensors ``[K, ...]``, the forward pass is :func:`torch.vmap` over them, and
since optimizers work entry by entry, PyTorch's own step on the stacked tensors is each client's
own step. Every client sees its own batches in its own order. The result is that of
:meth:`~fedknow.client.learners.frames.learner.Learner.fit` up to rounding: a product of stacked
matrices may take its sums in another order.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from fedknow.client.compute.cost import Cost, Meter, module_bytes
from fedknow.client.data.stream import TaskData
from fedknow.client.learners.frames.hooks import Hooks
from fedknow.client.learners.frames.learner import (
    Diverged,
    Learner,
    Round,
    Tensors,
    batches,
    make_optimizer,
    widen,
)
from fedknow.client.learners.frames.round import StepKey, take_step
from fedknow.protocols.config import ConfigError

__all__ = ["FEWEST", "Start", "Trained", "clients_at_once", "fit_together", "price"]

_Moving = dict[str, nn.Parameter]
# Measured by benchmarks/vmap_clients.py, on a processor; nothing was measured on a GPU, which
# no small model fills:
_MOST = 128
"""More clients at once gain nothing,"""
_BYTES = 8 * 2**20
"""and nor do more stacked weights than a processor's cache holds."""
_SMALL = 128 * 1024
"""``auto``: multiply-adds a sample up to which clients at once win; of larger models one client
fills a core."""
FEWEST = 4
"""Fewer clients are trained faster one by one."""
_SHARE = 0.25
"""Of a GPU's free memory, for weights and activations: the rest is for samples, and for whoever
else computes there."""
_DROPOUT = (nn.modules.dropout._DropoutNd,)


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
    # The clients with most steps come first, so that those still at work are always the first rows.
    order = sorted(range(len(starts)), key=lambda i: -len(starts[i].task.train))
    clients = [starts[i] for i in order]
    schedule = _Schedule(learner, clients)
    model, train = learner.model, learner.train
    rows = {
        name: _turned(
            torch.stack([client.parameters[name] for client in clients])
        ).contiguous()
        for name in clients[0].parameters
    }
    moving = {
        name: nn.Parameter(rows[name], p.requires_grad)
        for name, p in learner.trainable.items()
    }
    mu = torch.tensor(
        [client.round.proximal_mu for client in clients], device=schedule.weights.device
    )
    anchors = (
        {name: rows[name].clone() for name in moving if learner.entries.travels(name)}
        if mu.any()
        else {}
    )
    body, head = (
        [moving[name] for name in moving if name.startswith(part)]
        for part in ("body.", "head.")
    )
    optimizer = make_optimizer(train, iter(body), iter(head))
    model.train()
    losses, right = (
        torch.zeros_like(schedule.weights),
        torch.zeros_like(schedule.weights),
    )
    at_work = len(clients)
    for step, count in enumerate(schedule.at_work):
        if count < at_work:
            at_work = count
            moving = _first(rows, moving, optimizer, count)
        x, y, weight, outside = schedule.batch(step)
        optimizer.zero_grad(set_to_none=True)
        with learner.autocast():
            natural = {name: _turned(parameter) for name, parameter in moving.items()}
            logits = torch.vmap(lambda p, x: functional_call(model, p, (x,)))(
                natural, x
            )
        z = widen(logits).masked_fill(outside, -torch.inf)
        loss = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view(
            y.shape
        )
        loss = (loss * weight).sum(1)
        loss.sum().backward()  # type: ignore[no-untyped-call]
        for name, anchor in anchors.items():
            if (gradient := moving[name].grad) is not None:
                gradient.add_(
                    _column(mu[:count], anchor)
                    * (moving[name].detach() - anchor[:count])
                )
        if train.clip_norm:
            _clip(
                [p.grad for p in moving.values() if p.grad is not None], train.clip_norm
            )
        optimizer.step()
        losses[:count, step] = loss.detach()
        right[:count, step] = ((z.detach().argmax(2) == y) & (weight > 0)).sum(1)
    trained = [
        Trained(
            {name: _turned(value)[row] for name, value in rows.items()},
            schedule.report(row, losses[row], right[row]),
        )
        for row in range(len(clients))
    ]
    return [trained[order.index(i)] for i in range(len(order))]


def price(learner: Learner, start: Start) -> Cost:
    """What it costs a client to train by itself, whoever it was trained with.

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
            for index in batches(len(samples), size, torch.Generator(), learner.device):
                key = step_key(len(index), samples.head)
                if not learner.meter.charge(key):
                    with learner.meter.part(key):
                        take_step(learner, samples, index, {}, start.round)
    return learner.meter.cost


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
        size = min(learner.train.batch_size, max(self._sizes))
        self._per_epoch = [-(-n // size) for n in self._sizes]
        steps = learner.epochs * max(self._per_epoch)
        self._index = torch.zeros(len(clients), steps, size, dtype=torch.int64)
        self.weights = torch.zeros(len(clients), steps)
        start = 0
        for row, (client, n) in enumerate(zip(clients, self._sizes, strict=True)):
            generator = torch.Generator().manual_seed(client.round.seed)
            for step, index in enumerate(
                index
                for _ in range(learner.epochs)
                for index in batches(n, size, generator)
            ):
                self._index[row, step, : len(index)] = index
                self.weights[row, step] = len(index)
            self._index[row] += (
                start  # short batches are filled up with the client's own first sample
            )
            start += n
        self.at_work = [int(count) for count in (self.weights > 0).sum(0)]
        self._widths = [int(width) for width in self.weights.amax(0)]
        outside = torch.ones(len(clients), learner.head.out_features, dtype=torch.bool)
        for row, client in enumerate(clients):
            outside[row, list(client.task.head)] = False
        device = learner.device
        self._index, self.weights, self._outside = (
            t.to(device) for t in (self._index, self.weights, outside)
        )
        self._places = torch.arange(size, device=device)
        self._x = learner.images(torch.cat([client.task.train.x for client in clients]))
        self._y = torch.cat([client.task.train.y for client in clients])

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One batch of each client that has one.

        Returns
        -------
        tuple of Tensor
            Samples [k, b, C, H, W]; labels of the whole head int64 [k, b]; weight of each
            sample in its client's mean [k, b], 0 where a shorter batch is filled up; and which
            classes are not in use, bool [k, 1, classes].
        """
        count, width = self.at_work[step], self._widths[step]
        index, samples = (
            self._index[:count, step, :width],
            self.weights[:count, step, None],
        )
        weight = (self._places[:width] < samples) / samples
        return self._x[index], self._y[index], weight, self._outside[:count, None]

    def report(
        self, row: int, losses: Tensor, right: Tensor
    ) -> dict[str, float] | Diverged:
        """Give what a client reports of its round.

        By step: losses float [steps] and numbers of right answers [steps].
        """
        per_epoch, epochs = self._per_epoch[row], self._learner.epochs
        own = losses[: epochs * per_epoch]
        for step in torch.nonzero(~(own < torch.inf)).flatten()[:1].tolist():
            return Diverged.in_epoch(
                own[step].item(), step // per_epoch, self._learner.train
            )
        last = slice((epochs - 1) * per_epoch, epochs * per_epoch)
        weights = self.weights[row, last].double()
        n = self._sizes[row]
        return {
            "loss": float(losses[last].double() @ weights) / n,
            "accuracy": float(right[last].sum()) / n,
            **self._learner.counts(),
        }


def clients_at_once(
    learner: Learner,
    vectorize: Literal["off", "auto", "on"],
    shape: tuple[int, int, int],
) -> int:
    """Tell how many clients :func:`fit_together` is to train at once.

    It is 1 where they are to be trained one by one.

    Parameters
    ----------
    learner : Learner
        Of the clients.
    vectorize : {"off", "auto", "on"}
        ``engine.vectorize``. ``auto``: on a processor where it was measured to win, which is
        for small models; on a GPU wherever it can be done.
    shape : tuple of int
        Of a sample: channels, height, width.

    Raises
    ------
    ConfigError
        If it is ``on`` and cannot be done, and why not.
    """
    if vectorize == "off":
        return 1
    if fault := _fault(learner, shape):
        if vectorize == "auto":
            return 1
        raise ConfigError(
            f"engine.vectorize = 'on': {fault}; set engine.vectorize = 'auto' or 'off'"
        )
    if learner.device.type != "cpu":
        free, _ = torch.get_device_module(learner.device).mem_get_info(learner.device)
        most = min(_MOST, int(_SHARE * free / _step_bytes(learner, shape)))
        return most if most >= FEWEST else 1
    if vectorize == "auto" and _multiply_adds(learner.model, shape) > _SMALL:
        return 1
    size = sum(parameter.numel() for parameter in learner.model.parameters())
    return max(FEWEST, min(_MOST, _BYTES // (4 * size)))


def _fault(learner: Learner, shape: tuple[int, int, int]) -> str | None:
    """What stands against training clients of a learner at once."""
    hooks = (*vars(Hooks), *vars(Learner))
    own = [
        name
        for name in hooks
        if name in learner.overridden and name != "__init__" and _is_hook(name)
    ]
    if own:
        return f"{type(learner).__name__} trains in a way of its own ({', '.join(own)})"
    model = learner.model
    if any(isinstance(module, _DROPOUT) and module.p for module in model.modules()):
        return "the model has dropout, whose masks would be others"
    if odd := sorted(model.state_dict().keys() - dict(model.named_parameters()).keys()):
        return f"the model has buffers or shared parameters ({', '.join(odd[:3])}), as BatchNorm has"
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        return "the model has BatchNorm, which would see the samples that short batches are filled up with"
    parameters = learner.trainable
    stacked = {
        name: parameter.detach().expand(2, *parameter.shape)
        for name, parameter in parameters.items()
    }
    try:
        torch.vmap(lambda p, x: functional_call(model, p, (x,)))(
            stacked, torch.zeros(2, 2, *shape, device=learner.device)
        )
    except Exception as error:  # a user's model may do anything
        return f"torch.vmap cannot take the model: {str(error).strip().splitlines()[0]}"
    return None


def _is_hook(name: str) -> bool:
    """Whether a name of a learner is a method or property.

    Such a name says how the learner trains.
    """
    part = inspect.getattr_static(Learner, name)
    return inspect.isfunction(part) or isinstance(part, property)


def _multiply_adds(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Of one sample's forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *shape))
    return int(counter.get_total_flops()) // 2


def _step_bytes(learner: Learner, shape: tuple[int, int, int]) -> float:
    """Estimate the bytes that a client's step needs at most.

    They are eight times its weights, and twice what its batch leaves for the backward pass. The
    eight are the weights, gradients, an optimizer's two moments, FedProx's anchor, and copies
    of those under way.
    """
    meter = Meter()
    with meter.message(), meter.part():
        learner.model(torch.zeros(2, *shape, device=learner.device))
    return 8 * module_bytes(learner.model) + learner.train.batch_size * meter.cost.peak


def _turned(stacked: Tensor) -> Tensor:
    """Transpose stacked matrices, and back.

    They are kept transposed, as products of stacked matrices leave their gradients.
    """
    return stacked.mT if stacked.dim() == 3 else stacked


def _first(
    rows: Tensors, moving: _Moving, optimizer: torch.optim.Optimizer, count: int
) -> _Moving:
    """Let the optimizer go on with the first clients.

    The rows of those that are done stay as they are.
    """
    fewer = {
        name: nn.Parameter(rows[name][:count], old.requires_grad)
        for name, old in moving.items()
    }
    new: dict[Tensor, nn.Parameter] = {old: fewer[name] for name, old in moving.items()}
    for group in optimizer.param_groups:
        group["params"] = [new[old] for old in group["params"]]
    for old, state in list(optimizer.state.items()):
        del optimizer.state[old]
        # A step counter has no rows: all clients are at the same step.
        optimizer.state[new[old]] = {
            k: v[:count] if isinstance(v, Tensor) and v.dim() else v
            for k, v in state.items()
        }
    return fewer


def _clip(gradients: Sequence[Tensor], most: float) -> None:
    """Scale each client's gradients to a norm of ``most`` at most.

    ``torch.nn.utils.clip_grad_norm_`` does the same.
    """
    norms = torch.stack(
        [gradient.flatten(1).norm(dim=1) for gradient in gradients]
    ).norm(dim=0)
    factor = (most / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(_column(factor, gradient))


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Shape one number a row to multiply rows: [k] -> [k, 1, ...].

    ``like`` has the rows.
    """
    return values.view(-1, *[1] * (like.dim() - 1))
