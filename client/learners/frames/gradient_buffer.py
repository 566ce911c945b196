"""Memory for flat gradients, used again by every batch."""

from __future__ import annotations

import torch
from torch import Tensor

from fedknow.client.compute import cost
from fedknow.client.learners.frames.extra_work import once_for_all

__all__ = ["GradientBuffer"]


class GradientBuffer:
    """Memory for the flat gradients of one batch, used again by every batch.

    A client is charged with the places that it uses, as if they were new.

    Attributes
    ----------
    current : Tensor
        Place of the current gradient, float [size].
    restored : Tensor
        Places of restored gradients, float [count, size].
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self.current = self._memory
        self.restored = self._memory

    def lay_out(self, count: int, size: int, like: Tensor) -> None:
        """Make room for the current gradient and ``count`` restored ones.

        Parameters
        ----------
        count, size : int
            How many restored gradients, and their length.
        like : Tensor
            Of the dtype and device to use.
        """
        entries = (1 + count) * size
        if self._memory.numel() < entries:
            with once_for_all():
                # On a processor, rows that are never written to take up no memory.
                self._memory = like.new_empty(entries)
        rows = self._memory[:entries].view(1 + count, size)
        self.current = rows[0]
        self.restored = rows[1:]

    def use_current(self) -> None:
        """Charge the client with the place of the current gradient."""
        cost.add(memory=self.current.nbytes)

    def use_restored(self, place: int) -> Tensor:
        """Give the place of one restored gradient, float [size]."""
        row = self.restored[place]
        cost.add(memory=row.nbytes)
        return row
