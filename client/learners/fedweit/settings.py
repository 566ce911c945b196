"""Settings of FedWeIT."""

from __future__ import annotations

from pydantic import Field

from fedknow.client.learners.frames.learner import LearnerSettings

__all__ = ["FedWeitSettings"]


class FedWeitSettings(LearnerSettings):
    """Settings of :class:`FedWeit`."""

    sparsity: float = Field(1e-3, ge=0)
    """lambda_1: weight of the L1 norm of the adaptive parameters, and the size below which they
    are dropped."""
    retention: float = Field(100.0, ge=0)
    """lambda_2: weight of what past tasks' parameters have moved."""
    mask_sparsity: float = Field(0.0, ge=0)
    """Weight of the L1 norm of the masks."""
    sent: float = Field(0.7, gt=0, le=1)
    """Fraction of each layer's units, those with the largest mask, whose base weights go to the
    server."""
    mask: float = 3.0
    """Where masks start, before the sigmoid. Adaptive parameters and attention start at 0, so a
    task starts from sigmoid(mask) times the shared base."""
