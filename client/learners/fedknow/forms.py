"""Lighter forms of a task's knowledge than the paper's.

The paper keeps the largest weights of the body, as float32
(:class:`~fedknow.client.learners.fedknow.knowledge.Magnitude`). The forms here are no part of it:

- ``int8``: the same weights, a byte each, at one scale a layer;
- ``filters``: whole rows of a layer, those least like the others, so that no place of a single
  weight is stored;
- ``low-rank``: a product of two thin matrices for each layer, with as much of its energy as asked
  for.

Biases, normalisation and the head's rows are stored as they are in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedknow.client.learners.fedknow.finetuning import (
    Shaped,
    prune,
)
from fedknow.client.learners.fedknow.knowledge import (
    Form,
    Knowledge,
    Magnitude,
    Remainder,
    pack,
    unpack,
)
from fedknow.client.learners.fedknow.settings import (
    FedKnowSettings,
)
from fedknow.client.learners.frames.learner import State

__all__ = [
    "FilterKnowledge",
    "Filters",
    "Int8",
    "Int8Knowledge",
    "LowRank",
    "LowRankKnowledge",
    "distinct_filters",
    "form_of",
    "rank_for",
    "read_knowledge",
]

_LEVELS = 127
"""The largest magnitude of a byte."""


def form_of(settings: FedKnowSettings) -> Form:
    """Make the form that the settings ask for."""
    if settings.extractor == "int8":
        return Int8(settings.rho)
    if settings.extractor == "filters":
        return Filters(settings.rho)
    if settings.extractor == "low-rank":
        return LowRank(settings.energy)
    return Magnitude(settings.rho)


def read_knowledge(state: State) -> Knowledge:
    """Make knowledge of any form from the result of its ``state_dict``."""
    kinds: dict[str, type[Knowledge]] = {
        "int8": Int8Knowledge,
        "filters": FilterKnowledge,
        "low-rank": LowRankKnowledge,
    }
    return kinds.get(state.get("form", ""), Knowledge).from_state(state)


# --- int8


@dataclass(frozen=True)
class Int8Knowledge(Knowledge):
    """Largest weights, a byte each.

    Attributes
    ----------
    values : Tensor
        Int8 [n]: weights over their layer's scale.
    scales : Tensor
        One of each layer, float32.
    """

    scales: Tensor

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return super().nbytes + self.scales.nbytes

    def state_dict(self) -> State:
        """Give it as tensors that can be saved."""
        return super().state_dict() | {
            "form": "int8",
            "scales": self.scales,
        }

    @classmethod
    def from_state(cls, state: State) -> Int8Knowledge:
        """Make it from the result of :meth:`state_dict`."""
        return cls(
            **vars(Knowledge.from_state(state)),
            scales=state["scales"],
        )

    def flat(self, weights: Sequence[Tensor]) -> Tensor:
        """Give all prunable weights in a row, float32 [p]."""
        sizes = torch.tensor([weight.numel() for weight in weights])
        is_kept = unpack(self.mask, int(sizes.sum())).to(self.scales.device)
        scales = self.scales.repeat_interleave(sizes.to(self.scales.device))
        flat = torch.zeros_like(scales)
        flat[is_kept] = self.values.float() * scales[is_kept]
        return flat


@dataclass(frozen=True)
class Int8(Magnitude):
    """The largest weights, rounded once they are fine-tuned.

    Each layer has 255 levels. A rounded weight differs by at most half of its layer's scale,
    which is the largest magnitude over 127.
    """

    def store(
        self,
        weights: Sequence[nn.Parameter],
        shaped: Shaped,
        remainder: Remainder,
    ) -> Int8Knowledge:
        """Store places, bytes and scales."""
        parts, scales = [], []
        for weight, mask in shaped.pruned:
            values = weight.detach()[mask]
            largest = values.abs().max() if len(values) else values.new_zeros(())
            # A layer of zeros has no scale, and needs none.
            scale = torch.where(largest > 0, largest / _LEVELS, 1.0)
            parts.append((values / scale).round().to(torch.int8))
            scales.append(scale)
        is_kept = torch.cat([mask.flatten() for _, mask in shaped.pruned])
        return Int8Knowledge(
            **vars(remainder())
            | {
                "mask": pack(is_kept),
                "values": torch.cat(parts),
            },
            scales=torch.stack(scales),
        )


# --- filters


@dataclass(frozen=True)
class FilterKnowledge(Knowledge):
    """Whole rows of layers.

    Attributes
    ----------
    mask : Tensor
        Which rows of all layers are kept, one bit each: uint8.
    values : Tensor
        Their weights, row by row: float32 [n].
    """

    def state_dict(self) -> State:
        """Give it as tensors that can be saved."""
        return super().state_dict() | {"form": "filters"}

    def flat(self, weights: Sequence[Tensor]) -> Tensor:
        """Give all prunable weights in a row, float32 [p]."""
        rows = unpack(self.mask, sum(map(len, weights)))
        widths = [weight[0].numel() for weight in weights]
        counts = torch.tensor([len(weight) for weight in weights])
        # Each row's bit stands for as many weights as its layer's inputs.
        repeats = torch.tensor(widths).repeat_interleave(counts)
        is_kept = rows.repeat_interleave(repeats).to(self.values.device)
        flat = self.values.new_zeros(len(is_kept))
        return flat.masked_scatter_(is_kept, self.values)


@dataclass(frozen=True)
class Filters:
    """Of each layer the rows that are least like its other ones.

    By distance, as in He, Liu, Wang, Hu and Yang, "Filter Pruning via Geometric Median for Deep
    Convolutional Neural Networks Acceleration", CVPR 2019, arXiv 1811.00250. A row near to many
    others can be spared, as they do what it does.

    Attributes
    ----------
    rho : float
        Fraction of a layer's rows to keep; one at least.
    """

    rho: float

    def shape(self, weights: Sequence[nn.Parameter]) -> Shaped:
        """Set the other rows to zero."""
        pruned = []
        for weight in weights:
            rows = distinct_filters(weight.detach().flatten(1), self.rho)
            view = (-1, *[1] * (weight.dim() - 1))
            pruned.append((weight, rows.view(view).expand_as(weight)))
        prune(pruned)
        return Shaped(pruned)

    def store(
        self,
        weights: Sequence[nn.Parameter],
        shaped: Shaped,
        remainder: Remainder,
    ) -> FilterKnowledge:
        """Store a bit a row, and the rows."""
        rows = [mask.flatten(1)[:, 0] for _, mask in shaped.pruned]
        values = [
            weight.detach().flatten(1)[chosen].flatten()
            for weight, chosen in zip(weights, rows, strict=True)
        ]
        stored = {
            "mask": pack(torch.cat(rows)),
            "values": torch.cat(values),
        }
        return FilterKnowledge(**vars(remainder()) | stored)


def distinct_filters(rows: Tensor, rho: float) -> Tensor:
    """Choose the rows with the largest sum of distances to all others.

    Parameters
    ----------
    rows : Tensor
        Float [n, d].
    rho : float
        Fraction to choose; one at least.

    Returns
    -------
    Tensor
        Bool [n].
    """
    distances = torch.cdist(rows, rows).sum(1)
    count = max(1, round(rho * len(rows)))
    # Stable, so that equal rows give the same choice on every machine.
    order = distances.argsort(descending=True, stable=True)
    chosen = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    chosen[order[:count]] = True
    return chosen


# --- low rank


@dataclass(frozen=True)
class LowRankKnowledge(Knowledge):
    """A product of thin matrices for each layer.

    Attributes
    ----------
    values : Tensor
        Of each layer its left and its right factor, or all of its weights where these are fewer:
        float32 [n].
    ranks : Tensor
        Ranks of the layers; 0: all weights are stored. Int16.
    """

    ranks: Tensor

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return super().nbytes + self.ranks.nbytes

    def state_dict(self) -> State:
        """Give it as tensors that can be saved."""
        return super().state_dict() | {
            "form": "low-rank",
            "ranks": self.ranks,
        }

    @classmethod
    def from_state(cls, state: State) -> LowRankKnowledge:
        """Make it from the result of :meth:`state_dict`."""
        return cls(
            **vars(Knowledge.from_state(state)),
            ranks=state["ranks"],
        )

    def flat(self, weights: Sequence[Tensor]) -> Tensor:
        """Give all prunable weights in a row, float32 [p]."""
        parts, start = [], 0
        for weight, rank in zip(weights, self.ranks.tolist(), strict=True):
            outputs, inputs = len(weight), weight[0].numel()
            size = rank * (outputs + inputs) if rank else outputs * inputs
            stored = self.values[start : start + size]
            start += size
            if rank:
                tall, wide = torch.split(stored, [rank * outputs, rank * inputs])
                product = tall.view(outputs, rank) @ wide.view(rank, inputs)
                stored = product.flatten()
            parts.append(stored)
        return torch.cat(parts)


@dataclass(frozen=True)
class LowRank:
    """The singular directions that hold a share of each layer's energy.

    Energy is the sum of squared weights. Fine-tuning leaves the matrices alone, and trains biases,
    normalisation and the head around them.

    Attributes
    ----------
    energy : float
        The share, in (0, 1].
    """

    energy: float

    def shape(self, weights: Sequence[nn.Parameter]) -> Shaped:
        """Bring each matrix to the rank that is needed."""
        with torch.no_grad():
            for weight in weights:
                rank = rank_for(weight, self.energy)
                if rank:
                    tall, wide = _factors(weight, rank)
                    weight.copy_((tall @ wide).view(weight.shape))
        return Shaped(held=list(weights))

    def store(
        self,
        weights: Sequence[nn.Parameter],
        shaped: Shaped,
        remainder: Remainder,
    ) -> LowRankKnowledge:
        """Store two factors a layer, or its weights where these are fewer."""
        parts, ranks = [], []
        for weight in weights:
            # The matrix has this rank by now, and no more energy is to be lost.
            rank = rank_for(weight, 1.0)
            pair = _factors(weight, rank) if rank else (weight.detach(),)
            parts += [part.flatten() for part in pair]
            ranks.append(rank)
        stored = {"values": torch.cat(parts)}
        return LowRankKnowledge(
            **vars(remainder()) | stored,
            ranks=torch.tensor(ranks, dtype=torch.int16),
        )


def rank_for(weight: Tensor, energy: float) -> int:
    """Give the least rank that holds a share of a layer's energy.

    Parameters
    ----------
    weight : Tensor
        Taken as a matrix [out, d].
    energy : float
        The share; 1 leaves out rounding errors alone.

    Returns
    -------
    int
        From 1; 0 where two factors would have as many numbers as the matrix.
    """
    matrix = weight.detach().flatten(1).double()
    squares = torch.linalg.svdvals(matrix).square()
    total = squares.sum()
    # float32 tells no more than 7 digits of a weight, so 14 of its square.
    is_left = total - squares.cumsum(0) > max(1 - energy, 1e-12) * total
    rank = min(int(is_left.sum()) + 1, len(squares))
    is_smaller = rank * sum(matrix.shape) < matrix.numel()
    return rank if is_smaller else 0


def _factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factor a layer's matrix: float32 [out, rank] and [rank, d]."""
    matrix = weight.detach().flatten(1).double()
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]).float(), v[:rank].float()
