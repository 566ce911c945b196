"""Knowledge extractor: the few weights that carry a finished task.

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

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedknow.client.data.stream import Split
from fedknow.client.learners.fedknow.finetuning import (
    FineTuning,
    Shaped,
    finetune,
    prune,
)
from fedknow.client.learners.frames.learner import (
    Autocast,
    HeadSlice,
    State,
    Tensors,
    widen,
)

__all__ = [
    "FineTuning",
    "Form",
    "Knowledge",
    "Magnitude",
    "Remainder",
    "extract",
    "pack",
    "prunable",
    "top_fraction",
    "unpack",
]


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
    unpruned : dict
        Parameters and buffers of the body that are not pruned; frozen ones are no knowledge of
        the task's.
    head : tuple of Tensor
        The task's rows of the head: weight float32 [c, features], bias float32 [c].
    """

    classes: tuple[int, ...]
    mask: Tensor
    values: Tensor
    unpruned: Tensors
    head: tuple[Tensor, Tensor]

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        tensors = [self.mask, self.values, *self.head, *self.unpruned.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def state_dict(self) -> State:
        """Give it as tensors and numbers that can be saved."""
        return {
            "classes": list(self.classes),
            # As bits: places as numbers take more memory as soon as rho is above 1/32.
            "mask": self.mask,
            "values": self.values,
            # This key is older than the attribute: saved states hold it.
            "whole": self.unpruned,
            "head_weight": self.head[0],
            "head_bias": self.head[1],
        }

    @classmethod
    def from_state(cls, state: State) -> Knowledge:
        """Make it from the result of :meth:`state_dict`."""
        return cls(
            tuple(state["classes"]),
            state["mask"],
            state["values"],
            state["whole"],
            (state["head_weight"], state["head_bias"]),
        )

    def flat(self, weights: Sequence[Tensor]) -> Tensor:
        """Give all prunable weights in a row, float32 [p].

        Parameters
        ----------
        weights : sequence of Tensor
            For their shapes; their values do not matter.
        """
        # Zeros first: only what was kept is stored.
        flat = self.values.new_zeros(sum(weight.numel() for weight in weights))
        is_kept = unpack(self.mask, len(flat))
        # Values were gathered in the same order, that of the mask's bits.
        return flat.masked_scatter_(is_kept.to(flat.device), self.values)

    def restore_into(self, body: nn.Module) -> None:
        """Make a body the pruned one; weights that are not kept become zero."""
        flat = self.flat(list(prunable(body).values()))
        # Its tensors share memory with the body's parameters and buffers.
        state = body.state_dict()
        with torch.no_grad():
            start = 0
            for name, weight in prunable(body).items():
                state[name].copy_(
                    flat[start : start + weight.numel()].view(weight.shape)
                )
                start += weight.numel()
            for name, value in self.unpruned.items():
                state[name].copy_(value)

    @torch.inference_mode()
    def logits(
        self,
        body: nn.Module,
        x: Tensor,
        batch_size: int,
        autocast: Autocast = nullcontext,
    ) -> Tensor:
        """Compute the pruned model's logits for samples of any task.

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


def unpack(bits: Tensor, count: int) -> Tensor:
    """Turn bits, uint8 [ceil(count / 8)], into bool [count], on the CPU."""
    return torch.from_numpy(
        np.unpackbits(bits.cpu().numpy(), count=count).view(bool)
    )


def pack(is_kept: Tensor) -> Tensor:
    """Turn bool [n] into bits, uint8 [ceil(n / 8)], the highest first."""
    return torch.from_numpy(np.packbits(is_kept.cpu().numpy()))


def prunable(body: nn.Module) -> dict[str, nn.Parameter]:
    """Find the weights that compete for a place, by name.

    These are matrices and filters that are trained.
    """
    return {
        name: p
        for name, p in body.named_parameters()
        # Biases and norms are few and carry much, so that they are kept whole.
        if p.dim() > 1 and p.requires_grad
    }


def top_fraction(weights: Sequence[Tensor], rho: float) -> list[Tensor]:
    """Mask the fraction rho of all entries that are largest in magnitude.

    Exactly ``round(rho * total)`` entries (at least one) are kept; of equal ones those that
    come first.

    Returns
    -------
    list of bool Tensor
        One mask for each tensor, of its shape.
    """
    # All layers compete: a share of each would keep weak weights where none is strong.
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
        part.view(weight.shape)
        for part, weight in zip(parts, weights, strict=True)
    ]


Remainder = Callable[[], Knowledge]
"""Gives the parts of knowledge that are no prunable weights, and none of these."""


class Form(Protocol):
    """How a task's weights are made small, and how they are stored."""

    def shape(self, weights: Sequence[nn.Parameter]) -> Shaped:
        """Bring the prunable weights to the form, in place."""
        ...

    def store(
        self,
        weights: Sequence[nn.Parameter],
        shaped: Shaped,
        remainder: Remainder,
    ) -> Knowledge:
        """Store the weights in the form, as fine-tuning has left them.

        ``shaped`` is what :meth:`shape` gave. ``remainder`` gives the other parts of the knowledge.
        """
        ...


@dataclass(frozen=True)
class Magnitude:
    """The largest weights over all layers; the paper's form.

    Attributes
    ----------
    rho : float
        Fraction of the prunable weights to keep, in (0, 1].
    """

    rho: float

    def shape(self, weights: Sequence[nn.Parameter]) -> Shaped:
        """Set the other weights to zero."""
        masks = top_fraction(weights, self.rho)
        shaped = Shaped(list(zip(weights, masks, strict=True)))
        prune(shaped.pruned)
        return shaped

    def store(
        self,
        weights: Sequence[nn.Parameter],
        shaped: Shaped,
        remainder: Remainder,
    ) -> Knowledge:
        """Store places and values."""
        is_kept = torch.cat([mask.flatten() for _, mask in shaped.pruned])
        flat = torch.cat([weight.detach().flatten() for weight in weights])
        mask, values = pack(is_kept), flat[is_kept].clone()
        return replace(remainder(), mask=mask, values=values)


def extract(
    model: nn.Module,
    samples: Split,
    classes: Sequence[int],
    form: Form | float,
    tuning: FineTuning,
) -> Knowledge:
    """Extract a task's knowledge from a trained model.

    Parameters
    ----------
    model : nn.Module
        The trained model (``body`` and ``head``). It is used up: pruned and fine-tuned in place.
    samples : Split
        The task's training samples float [n, C, H, W] and labels int64 [n].
    classes : sequence of int
        The task's classes.
    form : Form or float
        How to make it small; a number is rho of :class:`Magnitude`.
    tuning : FineTuning
        How to train the weights that are kept.

    Raises
    ------
    Diverged
        If the loss is not a number.
    """
    body = cast(nn.Module, model.body)
    head = cast(nn.Linear, model.head)
    weights = list(prunable(body).values())
    if isinstance(form, float | int):
        form = Magnitude(form)
    shaped = form.shape(weights)
    columns = HeadSlice(classes, head.out_features, samples.x.device)
    finetune(model, shaped, samples, columns, tuning)
    # Made when the weights are stored, as both at once would take more memory.
    return form.store(weights, shaped, lambda: _remainder(body, head, classes))


def _remainder(
    body: nn.Module, head: nn.Linear, classes: Sequence[int]
) -> Knowledge:
    """Copy all but the prunable weights."""
    # The head's other rows belong to other tasks.
    index = torch.tensor(classes)
    nothing = head.weight.new_zeros(0)
    return Knowledge(
        classes=tuple(classes),
        mask=nothing.to(torch.uint8),
        values=nothing,
        unpruned=_unpruned(body),
        head=(
            head.weight.detach()[index].clone(),
            head.bias.detach()[index].clone(),
        ),
    )


def _unpruned(body: nn.Module) -> Tensors:
    """Copy the body's buffers and its parameters that are not prunable."""
    trained = {
        name
        for name, parameter in body.named_parameters()
        if parameter.requires_grad
    }
    names = (trained - prunable(body).keys()) | dict(body.named_buffers()).keys()
    return {
        name: value.clone()
        for name, value in body.state_dict().items()
        # Counters, which are integers, do not change what a body answers.
        if name in names and value.is_floating_point()
    }
