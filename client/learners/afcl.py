"""Analytic federated continual learning: a classifier in closed form.

Tang et al., "AFCL: Analytic Federated Continual Learning for Spatio-Temporal Invariance of Non-IID
Data", 2025, arXiv 2505.12245. Equations are numbered here and not as in the paper. With X the
frozen network's features of all samples of all clients and tasks, one a row, and Y their labels
one-hot,

    W = argmin |Y - X W|^2 + gamma |W|^2                                    (1)
      = (X'X + gamma I)^-1 X'Y                                              (2)
      = (sum_k X_k'X_k + gamma I)^-1 sum_k X_k'Y_k                          (3)

over any parts k that the samples fall into. So any split over clients and tasks, in any order,
gives the solution of all samples in one place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedknow.client.learners.frames.closed_form import (
    ClosedForm,
    factor,
    triangle,
)
from fedknow.client.learners.frames.learner import Layout, Round, Tensors
from fedknow.client.learners.frames.shared import check_large
from fedknow.protocols.secure.fixed import SumLayout, Summand
from fedknow.protocols.texts import counted

__all__ = ["Afcl"]

SQUARES = 1e10
"""Sum of the squares of a client's features in a task, at most, as a multiple of the ridge. Of a
thousand such sums the solution still has right digits."""

BITS = 32
"""Under masks X'X is rounded to multiples of gamma 2^-32, and X'Y to those of sqrt(gamma) 2^-32:
scaled features with gamma scaled alike round alike."""
_REMEDY = "raise learner.ridge, ask fewer clients a round (strategy.fraction)"


class Afcl(ClosedForm):
    """Ridge regression on frozen features, solved on the server (2025).

    Tang et al., arXiv 2505.12245. The paper has clients send their own solutions, which the
    server merges one after the other; here they send the sums of Eq. (3), which come to the same.

    Keeps: which tasks it has summed, and sums not sent yet. Sends: the head, and once a task
    X'Y, float64 [d, classes], and X'X as its upper half, float64 [d (d + 1) / 2], or as a factor
    [n, d] where n samples take less. Under masks (``privacy.secure``) it is always the upper half,
    and the server learns sums over clients alone. Needs: a forward pass over the task's samples,
    2 n d (d + c) operations and room for [d, d]. Valid: every stream, where the model's body is
    frozen.
    """

    strategy = "afcl"
    search: ClassVar[dict[str, list[float | str]]] = {
        "ridge": [1.0, 10.0, 100.0, 1000.0]
    }

    def sums(self, features: Tensor, labels: Tensor, round: Round) -> Tensors:
        """Sum X'X and X'Y, the parts of Eq. (3)."""
        width = features.shape[1]
        targets = F.one_hot(labels, self.head.out_features).double()
        empty = features.new_zeros(0)
        # A factor has n d numbers, half of the matrix d (d + 1) / 2.
        is_low_rank = 2 * len(features) < width + 1
        return {
            "moment": features.T @ targets,
            "factor": factor(features) if is_low_rank else empty.view(0, width),
            "gram": empty if is_low_rank else triangle(features.T @ features),
        }

    def shares(self, ended: bool) -> Layout:
        """Say what :meth:`share` may give."""
        width, classes = self.head.in_features, self.head.out_features
        return {
            "moment": ("float64", (width, classes)),
            "factor": ("float64", (-1, width)),
            "gram": ("float64", (-1,)),
        }

    def sum_layout(self) -> SumLayout:
        """Say how sums are added up under masks: X'Y, and the upper half of X'X."""
        width, classes = self.head.in_features, self.head.out_features
        # gamma is between this power of two and the next.
        exponent = math.frexp(self.settings.ridge)[1] - 1
        return {
            "moment": Summand(
                (width, classes), math.ldexp(1, exponent // 2 - BITS), _REMEDY
            ),
            # A sum has no factor with fewer rows than the matrix.
            "factor": Summand((0, width), 1.0),
            "gram": Summand(
                (width * (width + 1) // 2,),
                math.ldexp(1, exponent - BITS),
                _REMEDY,
            ),
        }

    def as_sums(self, shared: Tensors) -> Tensors:
        """Lay sums out in full: a factor R becomes R'R, and nothing zeros."""
        sums = {
            name: torch.zeros(summand.shape, dtype=torch.float64)
            for name, summand in self.sum_layout().items()
        }
        if not shared:
            return sums
        if len(rows := shared["factor"]):
            return {
                **sums,
                "moment": shared["moment"],
                "gram": triangle(rows.T @ rows),
            }
        return {**shared, "factor": sums["factor"]}

    def check_share(self, shared: Mapping[str, np.ndarray]) -> None:
        """Refuse sums that no samples have, or that outweigh all others."""
        check_large("moment", shared["moment"])
        check_large("factor", shared["factor"])
        squares = float(np.square(shared["factor"]).sum())
        if shared["gram"].size:
            # Rounding alone may make it indefinite, by far less than this.
            squares = self._check_gram(shared["gram"], 1, 1e-12)
        self._check_squares(squares, 1)

    def check_sum(self, total: Mapping[str, np.ndarray], clients: int) -> None:
        """Refuse a sum that no samples of so many clients have."""
        check_large("moment", total["moment"], clients)
        unit = self.sum_layout()["gram"].unit
        # Each client rounds each number by half a unit at most.
        rounding = clients * self.head.in_features * unit
        squares = self._check_gram(total["gram"], clients, rounding)
        self._check_squares(squares, clients)

    def _check_gram(self, half: np.ndarray, clients: int, slack: float) -> float:
        """Refuse an upper half that is of no X'X; give the sum of squares."""
        width = self.head.in_features
        if half.size != width * (width + 1) // 2:
            raise ValueError(
                f"gram: {counted(half.size, 'number')} for {width} rows"
            )
        check_large("gram", half, clients)
        matrix = torch.zeros(width, width, dtype=torch.float64)
        rows, columns = torch.triu_indices(width, width)
        matrix[rows, columns] = matrix[columns, rows] = torch.tensor(half)
        squares: float = matrix.trace().item()
        matrix.diagonal().add_(1e-9 * abs(squares) + slack)
        if torch.linalg.cholesky_ex(matrix).info.item():
            raise ValueError("gram: below 0 in a direction, as no squares are")
        return squares

    def _check_squares(self, squares: float, clients: int) -> None:
        if squares > SQUARES * clients * self.settings.ridge:
            raise ValueError(
                f"squares add up to {squares:.1e}, and learner.ridge = "
                f"{self.settings.ridge:g} bears {SQUARES:.0e} times itself of one client; raise it"
            )
