"""Statistics over clients and tasks: random features, and class sums.

Guan et al., "STSA: Federated Class-Incremental Learning via Spatial-Temporal Statistics
Aggregation", arXiv 2506.01327. Equations are numbered here and not as in the paper. Random
features phi(x) = relu(x R) (``model.random_features``) make a linear classifier stronger. It
is that of :mod:`~fedknow.client.learners.afcl`, over clients (spatial) and tasks (temporal):

    W = (G + gamma I)^-1 P,   G = sum_k X_k'X_k,   P = sum_k X_k'Y_k        (1)

In the light form clients send sums of the features of each class c alone: s_kc over n_kc samples,
in several groups k a client. With K_c groups and N_c samples of a class in all, s_c = sum_k s_kc,

    G = sum_c A_c sum_k s_kc s_kc' / n_kc - B_c s_c s_c'                    (2)
    A_c = (N_c - 1) / (K_c - 1),   B_c = (N_c - K_c) / ((K_c - 1) N_c)      (3)

has the expectation of Eq. (1)'s G if samples fall into groups by chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedknow.client.learners.afcl import Afcl
from fedknow.client.learners.frames.closed_form import ClosedFormSettings
from fedknow.client.learners.frames.learner import (
    Layout,
    LearnerSettings,
    Round,
    Tensors,
)
from fedknow.client.learners.frames.shared import check_classes, check_large
from fedknow.protocols.secure.fixed import SumLayout
from fedknow.protocols.seeds import integer
from fedknow.protocols.texts import counted

__all__ = ["Stsa", "StsaSettings", "class_sums"]


class StsaSettings(ClosedFormSettings):
    """Settings of :class:`Stsa`."""

    light: bool = False
    """Send sums of each class alone, Eq. (2), in place of X'X; the paper's STSA-E."""
    groups: int = Field(5, ge=2, le=10_000)
    """Groups that a client's samples of a class are summed in, where ``light``."""


class Stsa(Afcl):
    """Ridge regression on random features, or on class sums alone (2026).

    Guan et al., arXiv 2506.01327. It is the paper's second stage. Its first stage tunes adapters
    in the first task; here the network is frozen throughout.

    Keeps: which tasks it has summed, and sums not sent yet. Sends: the head, and once a task what
    :class:`~fedknow.client.learners.afcl.Afcl` sends; where ``light``, sums of each class in
    groups, float64 [rows, d], with their classes and counts. Masks (``privacy.secure``) take the
    former alone. Needs: a forward pass over the
    task's samples; without ``light`` what Afcl needs. Valid: every stream, where the model's body
    is frozen.
    """

    Settings = StsaSettings
    settings: StsaSettings
    strategy = "stsa"
    search: ClassVar[dict[str, list[float | str]]] = {
        "ridge": [1.0, 10.0, 100.0, 1000.0]
    }

    def sums(self, features: Tensor, labels: Tensor, round: Round) -> Tensors:
        """Sum what Eq. (1) needs, or Eq. (2)."""
        if not self.settings.light:
            return super().sums(features, labels, round)
        draws = torch.Generator().manual_seed(integer(round.seed, "groups"))
        order = torch.randperm(len(labels), generator=draws).to(labels.device)
        return class_sums(features[order], labels[order], self.settings.groups)

    def shares(self, ended: bool) -> Layout:
        """Say what :meth:`share` may give."""
        if not self.settings.light:
            return super().shares(ended)
        return {
            "sums": ("float64", (-1, self.head.in_features)),
            "classes": ("int64", (-1,)),
            "counts": ("int64", (-1,)),
        }

    @property
    def no_sums(self) -> str:
        """Say that the light form's rows are each client's own."""
        return "set learner.light = false" if self.settings.light else ""

    def sum_layout(self) -> SumLayout:
        """Say how sums are added up; rows of the light form are not."""
        return {} if self.settings.light else super().sum_layout()

    def check_share(self, shared: Mapping[str, np.ndarray]) -> None:
        """Refuse sums that no samples have."""
        if not self.settings.light:
            super().check_share(shared)
            return
        sums, classes, counts = (
            shared["sums"],
            shared["classes"],
            shared["counts"],
        )
        check_large("sums", sums)
        check_large("counts", counts)
        check_classes("classes", classes, self.head.out_features)
        if not len(sums) == len(classes) == len(counts):
            raise ValueError(
                f"{len(sums)} sums of {counted(len(classes), 'class', 'classes')}"
            )
        if counts.min(initial=1) < 1:
            raise ValueError("counts: a sum of no sample")

    @classmethod
    def strategy_options(cls, settings: LearnerSettings) -> dict[str, Any]:
        """Give the strategy's gamma, and which sums come."""
        assert isinstance(settings, StsaSettings)
        return {"ridge": settings.ridge, "light": settings.light}


def class_sums(features: Tensor, labels: Tensor, groups: int) -> Tensors:
    """Sum features of each class in groups: s_kc and n_kc of Eq. (2).

    Parameters
    ----------
    features : Tensor, shape (n, d)
        In an order drawn by chance, which decides who falls into which group.
    labels : Tensor of int64, shape (n,)
        Classes.
    groups : int
        Groups of each class; of classes with fewer samples, one a sample.

    Returns
    -------
    dict
        ``sums`` [rows, d], and for each row its class and its number of samples.
    """
    rows, classes, counts = [], [], []
    for label in torch.unique(labels).tolist():
        members = features[labels == label]
        for part in members.tensor_split(min(groups, len(members))):
            rows.append(part.sum(0))
            classes.append(label)
            counts.append(len(part))
    return {
        "sums": torch.stack(rows),
        "classes": torch.tensor(classes),
        "counts": torch.tensor(counts),
    }
