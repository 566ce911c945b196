"""A network in two parts: shared by clients, or kept by one."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

__all__ = ["Body", "Shape", "SplitModel"]

Shape = tuple[int, ...]
"""Shape of a sample: of an image channels, height and width."""

Body = tuple[nn.Module, int]
"""A body and the number of features it ends in."""


class SplitModel(nn.Module):
    """Features, then logits: ``head(body(x))``.

    Parameters
    ----------
    body : nn.Module
        Samples ``[n, ...]`` to features ``[n, f]``.
    head : nn.Linear
        Features to logits ``[n, classes]``.

    Examples
    --------
    >>> import fedknow, torch
    >>> model = fedknow.SplitModel(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    >>> model(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, body: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.body = body
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits ``[n, classes]`` of samples ``[n, ...]``."""
        return cast(Tensor, self.head(self.body(x)))
