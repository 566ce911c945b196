"""Knowledge extractor: the few weights that carry a finished task, stored sparse.

FedKNOW (ICDE 2023), Sec. III-B: after a task, keep the fraction rho of the body's weights that
are largest in magnitude over all layers, W = top_rho(|w|), and fine-tune them on the task with
all others held at zero:

    W_i = argmin_{W : supp(W) in mask_i} E_{(x, y) ~ D_i} CE(f(x; W), y)

Each task's knowledge is extracted from the trained model on its own, whatever earlier tasks
keep. Weight matrices and filters are pruned; biases, normalisation and the task's rows of the
head are a fraction of a percent of a model and are kept whole (a normalisation's scale near one
would otherwise crowd out the filters).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedknow.client.compute.cost import Meter
from fedknow.client.learners.frames.learner import (
    Autocast,
    Batch,
    Diverged,
    HeadSlice,
    State,
    Tensors,
    batches,
    widen,
)

__all__ = ["Knowledge", "extract", "prunable", "top_fraction"]


@dataclass(frozen=True)
class Knowledge:
    """Signature knowledge of one task.

    Attributes
    ----------
    classes : tuple of int
        The task's classes: its slice of the head.
    mask : Tensor
        Which of the p prunable weights are kept, one bit each: uint8 [ceil(p / 8)], most
        significant bit first.
    values : Tensor
        Their values in the order of the flattened model: float32 [n].
    whole : dict
        Parameters and buffers of the body that are not pruned; frozen ones are no knowledge of
        the task's.
    head : tuple of Tensor
        The task's rows of the head: weight float32 [c, features], bias float32 [c].
    """

    classes: tuple[int, ...]
    mask: Tensor
    values: Tensor
    whole: Tensors
    head: tuple[Tensor, Tensor]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        tensors = [self.mask, self.values, *self.head, *self.whole.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def state_dict(self) -> State:
        """As tensors and numbers that can be saved."""
        return {
            "classes": list(self.classes),
            "mask": self.mask,
            "values": self.values,
            "whole": self.whole,
            "head_weight": self.head[0],
            "head_bias": self.head[1],
        }

    @classmethod
    def from_state(cls, state: State) -> Knowledge:
        """The reverse of :meth:`state_dict`."""
        return cls(
            tuple(state["classes"]),
            state["mask"],
            state["values"],
            state["whole"],
            (state["head_weight"], state["head_bias"]),
        )

    def restore_into(self, body: nn.Module) -> None:
        """Make a body the pruned one: kept weights in their places, all other prunable weights zero."""
        flat = self.values.new_zeros(
            sum(weight.numel() for weight in prunable(body).values())
        )
        kept = np.unpackbits(self.mask.cpu().numpy(), count=len(flat)).view(bool)
        flat.masked_scatter_(torch.from_numpy(kept).to(flat.device), self.values)
        state = body.state_dict()
        with torch.no_grad():
            start = 0
            for name, weight in prunable(body).items():
                state[name].copy_(
                    flat[start : start + weight.numel()].view(weight.shape)
                )
                start += weight.numel()
            for name, value in self.whole.items():
                state[name].copy_(value)

    @torch.inference_mode()
    def logits(
        self,
        body: nn.Module,
        x: Tensor,
        batch_size: int,
        autocast: Autocast = nullcontext,
    ) -> Tensor:
        """What the task's knowledge says of samples of any task, in evaluation mode.

        Parameters
        ----------
        body : nn.Module
            A body to work in; its weights are overwritten.
        x : Tensor
            Samples, float [n, C, H, W].
        autocast : callable
            The context of the forward pass
            (:meth:`~fedknow.client.learners.frames.learner.Learner.autocast`).

        Returns
        -------
        Tensor
            Logits of the task's classes, float [n, c].
        """
        self.restore_into(body)
        body.eval()
        with autocast():
            return torch.cat(
                [
                    widen(F.linear(body(part), *self.head))
                    for part in torch.split(x, batch_size)
                ]
            )


def prunable(body: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that compete for a place: matrices and filters to train, by name."""
    return {
        name: p
        for name, p in body.named_parameters()
        if p.dim() > 1 and p.requires_grad
    }


def top_fraction(weights: Sequence[Tensor], rho: float) -> list[Tensor]:
    """Masks of the fraction rho of all entries that are largest in magnitude, over all tensors
    together.

    Exactly ``round(rho * total)`` entries (at least one) are kept; of equal ones those that
    come first.

    Returns
    -------
    list of bool Tensor
        One mask for each tensor, of its shape.
    """
    flat = torch.cat([weight.detach().abs().flatten() for weight in weights])
    count = max(1, round(rho * len(flat)))
    # The count-th largest value, then everything above it and as many equal ones as there is
    # room for.
    threshold = flat.kthvalue(len(flat) - count + 1).values
    above = flat > threshold
    ties = torch.nonzero(flat == threshold).flatten()[: count - int(above.sum())]
    above[ties] = True
    parts = torch.split(above, [weight.numel() for weight in weights])
    return [
        part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)
    ]


def extract(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    classes: Sequence[int],
    *,
    rho: float,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    autocast: Autocast = nullcontext,
    meter: Meter | None = None,
    smallest: int = 1,
) -> Knowledge:
    """Extract a task's knowledge from a trained model.

    Parameters
    ----------
    model : nn.Module
        The trained model (``body`` and ``head``). It is used up: pruned and fine-tuned in place.
    x, y : Tensor
        The task's training samples float [n, C, H, W] and labels int64 [n].
    classes : sequence of int
        The task's classes.
    rho : float
        Fraction of the prunable weights to keep, in (0, 1].
    epochs, batch_size, lr, seed
        Of the fine-tuning, which uses Adam without an L2 term.
    autocast : callable
        The context of its forward passes.
    meter : Meter, optional
        Told what it costs.
    smallest : int
        The fewest samples that the model can be trained on at once
        (:func:`~fedknow.client.learners.frames.batching.smallest_batch`).

    Returns
    -------
    Knowledge
        With every weight outside the mask exactly zero.

    Raises
    ------
    Diverged
        If the loss is not a number.
    """
    body, head = cast(nn.Module, model.body), cast(nn.Linear, model.head)
    weights = list(prunable(body).values())
    masks = top_fraction(weights, rho)
    with torch.no_grad():
        for weight, mask in zip(weights, masks, strict=True):
            weight.mul_(mask)
    columns = HeadSlice(classes, head.out_features, x.device)
    meter = meter or Meter()
    _finetune(
        model,
        weights,
        masks,
        columns,
        x,
        y,
        epochs,
        batch_size,
        lr,
        seed,
        autocast,
        meter,
        smallest,
    )
    chosen = torch.cat([mask.flatten() for mask in masks])
    flat = torch.cat([weight.detach().flatten() for weight in weights])
    learned = {
        name for name, parameter in body.named_parameters() if parameter.requires_grad
    }
    whole = (learned - prunable(body).keys()) | dict(body.named_buffers()).keys()
    index = torch.tensor(classes)
    return Knowledge(
        classes=tuple(classes),
        mask=torch.from_numpy(np.packbits(chosen.cpu().numpy())),
        values=flat[chosen].clone(),
        whole={
            name: value.clone()
            for name, value in body.state_dict().items()
            if name in whole and value.is_floating_point()
        },
        head=(head.weight.detach()[index].clone(), head.bias.detach()[index].clone()),
    )


def _finetune(
    model: nn.Module,
    weights: Sequence[nn.Parameter],
    masks: Sequence[Tensor],
    head: HeadSlice,
    x: Tensor,
    y: Tensor,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    autocast: Autocast,
    meter: Meter,
    smallest: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    # Without an L2 term and with masked gradients Adam leaves pruned weights alone: their
    # moments stay zero. They are masked again all the same, since everything later rests on
    # their being exactly zero.
    free = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(free, lr=lr, fused=True)
    labels = head.labels(y)
    model.train()
    for _ in range(epochs):
        for index in batches(len(labels), batch_size, generator, x.device, smallest):
            with meter.part(("finetune", len(index), len(head.index))):
                meter.add(
                    samples=len(index)
                )  # the model is a copy, which the meter does not watch
                batch = Batch(x[index], labels[index], index, head)
                optimizer.zero_grad(set_to_none=True)
                with autocast():
                    logits = model(batch.x)
                loss: Any = F.cross_entropy(head.logits(widen(logits)), batch.y)
                if not math.isfinite(loss.item()):
                    raise Diverged(
                        f"fine-tuning a task's knowledge gave a loss of {loss.item()}; lower its lr = {lr}"
                    )
                loss.backward()
                for weight, mask in zip(weights, masks, strict=True):
                    if (
                        weight.grad is not None
                    ):  # a weight may take no part in a forward pass
                        weight.grad.mul_(mask)
                optimizer.step()
                with torch.no_grad():
                    for weight, mask in zip(weights, masks, strict=True):
                        weight.mul_(mask)
