"""Samples of a round and of a step, and their slice of the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Batch",
    "Head",
    "HeadSlice",
    "MaskedHead",
    "Samples",
    "columns",
    "hits",
    "widen",
]


class Head(Protocol):
    """The part of the head that answers to some samples."""

    @property
    def width(self) -> int:
        """Number of columns that its logits have."""
        ...

    def logits(self, z: Tensor) -> Tensor:
        """Take its part of logits over the whole head: float [n, classes]."""
        ...

    def labels(self, y: Tensor) -> Tensor:
        """Turn labels of the whole head, int64 [n], into places among its logits."""
        ...

    def names(self, y: Tensor) -> Tensor:
        """Turn places among its logits back into labels of the whole head."""
        ...

    def columns(self, count: int) -> Tensor:
        """Give the columns in use for so many samples: bool [count, classes]."""
        ...

    def rows(self, index: Tensor) -> Head:
        """Give the part that answers to a batch, by places int64 [b]."""
        ...


class HeadSlice:
    """The columns of the head in use, and where each label stands among them.

    Parameters
    ----------
    classes : sequence of int
        Labels in use, in the order of the slice.
    width : int
        Number of classes of the whole head.
    device : torch.device or str
        Where logits and labels are.
    """

    def __init__(
        self,
        classes: Sequence[int],
        width: int,
        device: torch.device | str = "cpu",
    ) -> None:
        index = torch.tensor(classes, dtype=torch.int64)
        # -1 outside of the slice: cross-entropy refuses such a label, where 0 would be a wrong
        # class.
        position = torch.full((width,), -1, dtype=torch.int64)
        position[index] = torch.arange(len(classes))
        self.index = index.to(device)
        self._position = position.to(device)
        self._is_whole = list(classes) == list(range(width))

    @property
    def width(self) -> int:
        """Number of classes in the slice."""
        return len(self.index)

    def logits(self, z: Tensor) -> Tensor:
        """Slice logits: float [n, width] -> [n, len(classes)].

        Where the head is whole, the result is the very tensor.
        """
        # The whole head needs no copy, which each step would otherwise make.
        return z if self._is_whole else z.index_select(1, self.index)

    def labels(self, y: Tensor) -> Tensor:
        """Labels as positions in the slice: int64 [n] -> int64 [n]."""
        return self._position[y]

    def names(self, y: Tensor) -> Tensor:
        """Positions in the slice as labels: int64 [n] -> int64 [n]."""
        return self.index[y]

    def columns(self, count: int) -> Tensor:
        """Columns of the slice, for each of so many samples: bool [count, width]."""
        mask = columns(
            self.index.tolist(), len(self._position), self.index.device
        )
        return mask.expand(count, -1)

    def rows(self, index: Tensor) -> HeadSlice:
        """Itself: all samples of a task are told from the same classes."""
        return self


class MaskedHead:
    """A slice of the head for each sample, whose other columns are masked.

    Parameters
    ----------
    mask : Tensor
        Columns that a prediction may name, bool [n, classes].
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    @property
    def width(self) -> int:
        """Number of classes of the whole head."""
        return self.mask.shape[1]

    def logits(self, z: Tensor) -> Tensor:
        """Put minus infinity outside of each sample's slice: [n, classes]."""
        # Masked and not cut out, as each sample has other columns.
        return z.masked_fill(~self.mask, -torch.inf)

    def labels(self, y: Tensor) -> Tensor:
        """Labels as they are."""
        return y

    def names(self, y: Tensor) -> Tensor:
        """Labels as they are."""
        return y

    def columns(self, count: int) -> Tensor:
        """Each sample's slice."""
        return self.mask

    def rows(self, index: Tensor) -> MaskedHead:
        """Slices of some of the samples."""
        return MaskedHead(self.mask[index])


@dataclass(eq=False)
class Batch:
    """Samples of one step.

    Attributes
    ----------
    x : Tensor
        Float [b, C, H, W].
    y : Tensor
        Labels, as places in the slice of the head, int64 [b].
    index : Tensor
        The samples' places in the round's training data, int64 [b].
    head : Head
        The slice.
    answer : Tensor or None
        What the model gave; there while the loss is taken.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    head: Head
    answer: Tensor | None = None

    @property
    def outputs(self) -> Tensor:
        """Logits over the whole head, float [b, classes], in the loss alone."""
        if self.answer is None:
            raise RuntimeError(
                "Batch.outputs is there only while Learner.loss runs"
            )
        return widen(self.answer)


@dataclass(frozen=True, eq=False)
class Samples:
    """Training data of one round.

    Attributes
    ----------
    x : Tensor
        Float [n, C, H, W].
    y : Tensor
        Labels, as places in the slice of the head, int64 [n].
    head : Head
        What they are told from.
    """

    x: Tensor
    y: Tensor
    head: Head

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, index: Tensor) -> Batch:
        """Give the samples of one step by their places, int64 [b]."""
        # The same as by brackets, in less time; of images it would lose the memory format.
        y = self.y.index_select(0, index)
        return Batch(self.x[index], y, index, self.head.rows(index))


def columns(
    classes: Sequence[int], width: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Tell which columns of a head belong to a slice: bool [width]."""
    mask = torch.zeros(width, dtype=torch.bool)
    mask[list(classes)] = True
    return mask.to(device)


def hits(z: Tensor, y: Tensor) -> int:
    """Count the logits [n, classes] that are largest at their labels [n]."""
    # By NumPy, whose calls take less time.
    predicted = z.detach().numpy(force=True).argmax(1)
    return int(np.count_nonzero(predicted == y.numpy(force=True)))


def widen(z: Tensor) -> Tensor:
    """Turn bfloat16 into float32, for losses; others stay."""
    return z.float() if z.dtype is torch.bfloat16 else z
