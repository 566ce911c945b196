"""A task's parameters in FedWeIT, and the penalty on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedknow.client.learners.fedweit.settings import FedWeitSettings
from fedknow.client.learners.frames.learner import State, Tensors
from fedknow.client.learners.frames.sparse import pack, packed_bytes, unpack

__all__ = [
    "TaskParameters",
    "cloned",
    "penalty_of",
    "sent_units",
    "sparsity_norm",
    "weighted_sum",
]


@dataclass
class TaskParameters:
    """A client's parameters of one task, by name of the body's parameter.

    Attributes
    ----------
    mask : mapping of str to Tensor
        m, one number a unit, before the sigmoid.
    adaptive : mapping of str to Tensor
        A, of the parameter's shape.
    borrowed : mapping of str to Tensor
        sum_j alpha_j A_j, fixed when the task is over; empty: nothing.
    buffers : mapping of str to Tensor
        The body's running statistics when the task was over.
    """

    mask: Tensors
    adaptive: Tensors
    borrowed: Tensors = field(default_factory=dict)
    buffers: Tensors = field(default_factory=dict)

    @classmethod
    def initial(cls, base: Mapping[str, Tensor], mask: float) -> TaskParameters:
        """Begin a task with equal masks and without adaptive parameters."""
        return cls(
            {name: b.new_full(_unit_shape(b), mask) for name, b in base.items()},
            {
                # At 0 a new task begins as the base alone, and is sparse.
                name: torch.zeros_like(b, requires_grad=False)
                for name, b in base.items()
            },
        )

    def weights(
        self, base: Mapping[str, Tensor], borrowed: Mapping[str, Tensor]
    ) -> Tensors:
        """Compute theta = B * sigmoid(m) + A + the borrowed part (Eq. 2)."""
        weights = {
            name: b * torch.sigmoid(self.mask[name]) + self.adaptive[name]
            for name, b in base.items()
        }
        return {
            name: value + borrowed[name] if borrowed else value
            for name, value in weights.items()
        }

    def distance_moved(
        self,
        name: str,
        base: Tensor,
        base_before: Tensor,
        adaptive_before: Tensor,
    ) -> Tensor:
        """Measure how far a weight of the task has moved, squared (Eq. 3)."""
        moved = (
            (base - base_before) * torch.sigmoid(self.mask[name])
            + self.adaptive[name]
            - adaptive_before
        )
        return moved.square().sum()

    def adaptive_copy(self) -> Tensors:
        """Copy the adaptive parameters."""
        # Copies, as training goes on to change the originals in place.
        return {name: a.clone() for name, a in self.adaptive.items()}

    def drop_small(self, threshold: float) -> None:
        """Set adaptive parameters up to a size to zero: zeros do not travel."""
        is_large = {
            name: a.abs() > threshold for name, a in self.adaptive.items()
        }
        self.adaptive = {
            name: torch.where(is_large[name], a, 0.0)
            for name, a in self.adaptive.items()
        }

    def state_dict(self) -> State:
        """Give all parameters as tensors that can be saved."""
        return {
            "mask": {name: m.detach() for name, m in self.mask.items()},
            "adaptive": pack(self.adaptive),
            "borrowed": pack(self.borrowed),
            "buffers": self.buffers,
        }

    @classmethod
    def from_state(cls, state: State) -> TaskParameters:
        """Restore parameters from :meth:`state_dict`."""
        # Copied, as masks are trained in place and the state is not ours.
        mask = {name: m.clone() for name, m in state["mask"].items()}
        return cls(
            mask,
            unpack(state["adaptive"]),
            unpack(state["borrowed"]),
            dict(state["buffers"]),
        )

    @property
    def nbytes(self) -> int:
        """Size as saved, in bytes."""
        dense = [*self.mask.values(), *self.buffers.values()]
        return (
            sum(value.nbytes for value in dense)
            + packed_bytes(pack(self.adaptive))
            + packed_bytes(pack(self.borrowed))
        )


def weighted_sum(attention: Tensors, lent: Tensors) -> Tensors:
    """Compute sum_c alpha_c A_c of the lending clients c, by name."""
    return {
        name: torch.tensordot(alpha, lent[name], 1)
        for name, alpha in attention.items()
    }


def sparsity_norm(tasks: Iterable[TaskParameters]) -> Tensor:
    """Sum the L1 norms of the tasks' adaptive parameters."""
    adaptive: list[Tensor] = []
    for entry in tasks:
        adaptive += entry.adaptive.values()
    return torch.stack([a.abs().sum() for a in adaptive]).sum()


def _unit_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape one number for each unit: the first dimension, the others 1."""
    return (len(parameter), *(1 for _ in parameter.shape[1:]))


def sent_units(mask: Tensor, fraction: float) -> Tensor:
    """Tell which units are sent: the fraction with the largest mask.

    It is at least one unit. Of equal ones the earlier ones are sent.

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
    is_sent = torch.zeros_like(order, dtype=torch.bool)
    # One unit at least: a loan of nothing could not be attended to.
    is_sent[order[: max(1, math.ceil(fraction * len(order)))]] = True
    return is_sent.view(mask.shape)


def penalty_of(
    current: TaskParameters,
    earlier: Sequence[tuple[TaskParameters, Tensors]],
    base: Mapping[str, Tensor],
    base_then: Mapping[str, Tensor],
    settings: FedWeitSettings,
) -> Tensor:
    """Compute the terms of Eq. (3) besides the loss.

    Parameters
    ----------
    current : TaskParameters
        Those of the task in training.
    earlier : sequence of tuple
        The parameters of each earlier task, and its A when this task began.
    base, base_then : mapping of str to Tensor
        B now, and B' when the last task was over.
    settings : FedWeitSettings

    Returns
    -------
    Tensor
        A scalar.
    """
    tasks = [current, *(entry for entry, _ in earlier)]
    penalty = settings.sparsity * sparsity_norm(tasks)
    if settings.mask_sparsity:
        penalty = penalty + settings.mask_sparsity * sum(
            mask.abs().sum() for mask in current.mask.values()
        )
    for entry, adaptive_then in earlier:
        for name, b in base.items():
            moved = entry.distance_moved(
                name, b, base_then[name], adaptive_then[name]
            )
            penalty = penalty + settings.retention * moved
    return penalty


def cloned(tensors: Mapping[str, Tensor]) -> Tensors:
    """Copy tensors by name."""
    return {name: value.clone() for name, value in tensors.items()}
