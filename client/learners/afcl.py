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

from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from fedknow.client.learners.frames.closed_form import (
    ClosedForm,
    factor,
    triangle,
)
from fedknow.client.learners.frames.learner import Layout, Round, Tensors

__all__ = ["Afcl"]


class Afcl(ClosedForm):
    """Ridge regression on frozen features, solved on the server (2025).

    Tang et al., arXiv 2505.12245. The paper has clients send their own solutions, which the
    server merges one after the other; here they send the sums of Eq. (3), which come to the same.

    Keeps: which tasks it has summed, and sums not sent yet. Sends: the head, and once a task
    X'Y, float64 [d, classes], and X'X as its upper half, float64 [d (d + 1) / 2], or as a factor
    [n, d] where n samples take less. Needs: a forward pass over the task's samples, 2 n d (d +
    c) operations and room for [d, d]. Valid: every stream, where the model's body is frozen.
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
