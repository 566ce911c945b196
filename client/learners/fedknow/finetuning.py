"""Fine-tuning of the weights that a task's knowledge keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedknow.client.data.stream import Split
from fedknow.client.learners.frames.extra_work import extra_steps
from fedknow.client.learners.frames.learner import (
    Autocast,
    Batch,
    Diverged,
    HeadSlice,
    batches,
    widen,
)
from fedknow.client.learners.frames.optimizers import drop_gradients

__all__ = ["FineTuning", "Pruned", "Shaped", "finetune", "prune"]


@dataclass(frozen=True)
class FineTuning:
    """How pruned weights are trained, by Adam without an L2 term.

    Attributes
    ----------
    epochs, batch_size, lr, seed
        As in any training.
    smallest : int
        The fewest samples that the model can be trained on at once
        (:func:`~fedknow.client.learners.frames.batching.smallest_batch`).
    autocast : callable
        Makes the context of a forward pass.
    """

    epochs: int
    batch_size: int
    lr: float
    seed: int
    smallest: int = 1
    autocast: Autocast = nullcontext


Pruned = Sequence[tuple[nn.Parameter, Tensor]]
"""Weights, and masks of their shapes: which entries are kept."""


@dataclass(frozen=True, eq=False)
class Shaped:
    """Weights brought to the form in which they are stored.

    Attributes
    ----------
    pruned : sequence of (Parameter, Tensor)
        Weights that are trained on, and masks of the entries that may be other than zero.
    held : sequence of Parameter
        Weights that stay as they are.
    """

    pruned: Pruned = ()
    held: Sequence[nn.Parameter] = ()


def prune(pruned: Pruned) -> None:
    """Set all entries outside the masks to zero."""
    with torch.no_grad():
        for weight, mask in pruned:
            weight.mul_(mask)


def finetune(
    model: nn.Module,
    shaped: Shaped,
    samples: Split,
    columns: HeadSlice,
    tuning: FineTuning,
) -> None:
    """Train the model on its task, with the pruned weights held at zero."""
    device = samples.x.device
    generator = torch.Generator().manual_seed(tuning.seed)
    # For dropout, which draws from the global generator.
    torch.manual_seed(tuning.seed)
    held = set(map(id, shaped.held))
    free = [
        parameter
        for parameter in model.parameters()
        if parameter.requires_grad and id(parameter) not in held
    ]
    optimizer = torch.optim.Adam(free, lr=tuning.lr, fused=True)
    labels = columns.labels(samples.y)
    model.train()
    for _ in range(tuning.epochs):
        indices = batches(
            len(labels), tuning.batch_size, generator, device, tuning.smallest
        )
        width = len(columns.index)
        for index in extra_steps(indices, "finetune", width, is_learning=True):
            batch = Batch(samples.x[index], labels[index], index, columns)
            drop_gradients(optimizer)
            _backward(model, batch, tuning)
            for weight, mask in shaped.pruned:
                # A weight may take no part in a forward pass.
                if weight.grad is not None:
                    weight.grad.mul_(mask)
            for weight in shaped.held:
                # No optimizer frees it.
                weight.grad = None
            optimizer.step()
            # With masked gradients and no L2 term Adam leaves pruned weights alone. They
            # are pruned again all the same, as all else rests on their being exactly zero.
            # Before fine-tuning, so that the weights that are left learn to do without the
            # others.
            prune(shaped.pruned)


def _backward(model: nn.Module, batch: Batch, tuning: FineTuning) -> None:
    """Leave the gradients of the loss in the parameters."""
    with tuning.autocast():
        logits = model(batch.x)
    loss: Any = F.cross_entropy(batch.head.logits(widen(logits)), batch.y)
    # Knowledge that holds a NaN would spoil each later step of every task.
    if not math.isfinite(loss.item()):
        raise Diverged(
            f"fine-tuning a task's knowledge gave a loss of {loss.item()}; "
            f"lower its lr = {tuning.lr}"
        )
    loss.backward()
