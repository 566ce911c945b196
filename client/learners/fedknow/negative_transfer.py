"""Integration after aggregation, against negative transfer.

FedKNOW (ICDE 2023), Sec. III-E: the global model may have forgotten what this client's own model
knew. So one epoch is trained with g_a, the gradient at the received model, turned so that it
does not oppose g_b, the gradient at the model that this client last trained. With this one
constraint Eq. (3) has a closed form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from fedknow.client.learners.fedknow.flat import (
    flatten_present,
    free_parameters,
    set_gradients,
    views,
)
from fedknow.client.learners.fedknow.gradients import Student
from fedknow.client.learners.fedknow.settings import FedKnowSettings
from fedknow.client.learners.frames.learner import Batch, widen
from fedknow.client.learners.frames.projection import integrate_one

__all__ = ["NegativeTransferGuard"]

Report = tuple[float, int]
"""Mean loss of a batch, and how many samples were classified rightly."""


class NegativeTransferGuard:
    """Turns gradients of the first epoch after aggregation.

    Parameters
    ----------
    settings : FedKnowSettings
        Whether, and in which epoch.
    student : Student
        The model in training.
    scratch : nn.Module
        A model that holds the one before aggregation from :meth:`begin` on.

    Attributes
    ----------
    is_active : bool
        Whether the epoch under way is the one to guard.
    """

    def __init__(
        self,
        settings: FedKnowSettings,
        student: Student,
        scratch: nn.Module,
    ) -> None:
        self._form = settings.post_aggregation
        self._student = student
        self._scratch = scratch
        self.reset()

    def reset(self) -> None:
        """Start with a client that has not met the model."""
        self.is_active = False
        self._has_model = False
        self._steps = 0
        self._opposed = 0

    def begin(self, has_trained: bool) -> bool:
        """Begin a round.

        Parameters
        ----------
        has_trained : bool
            Whether this client has trained in this task before.

        Returns
        -------
        bool
            Whether the model before aggregation must be put into the scratch model.
        """
        self.reset()
        # Without a round of its own the client has no model to compare with.
        self._has_model = has_trained and self._form != "off"
        return self._has_model

    def begin_epoch(self, epoch: int) -> None:
        """Begin an epoch, from 0."""
        self.is_active = self._has_model and epoch == 0

    @property
    def extra_epochs(self) -> int:
        """Epochs beside those of plain training."""
        return int(self._has_model and self._form == "extra-epoch")

    @property
    def opposed(self) -> float:
        """Share of the steps in which g_a and g_b were at an obtuse angle."""
        # A round without such an epoch has no steps.
        return self._opposed / max(1, self._steps)

    def gradient(
        self, batch: Batch, train_plainly: Callable[[Batch], Report]
    ) -> Report:
        """Leave g_a, turned to agree with g_b, in the body's parameters.

        Parameters
        ----------
        batch : Batch
            Samples of one step.
        train_plainly : callable
            Leaves the plain gradients of a batch in the parameters.
        """
        parameters = free_parameters(self._student.body)
        with self._student.autocast():
            logits = self._scratch(batch.x)
        loss = F.cross_entropy(batch.head.logits(widen(logits)), batch.y)
        scratch_body = cast(nn.Module, self._scratch.body)
        g_b, _ = flatten_present(
            torch.autograd.grad(
                loss, free_parameters(scratch_body), allow_unused=True
            ),
            parameters,
        )
        # After g_b, so that its activations are freed before those of g_a are made.
        report = train_plainly(batch)
        g_a, reached = flatten_present([p.grad for p in parameters], parameters)
        result = integrate_one(g_a, g_b)
        self._steps += 1
        # The very same tensor comes back where there was nothing to turn.
        self._opposed += result is not g_a
        set_gradients(parameters, views(result, parameters), reached)
        return report
