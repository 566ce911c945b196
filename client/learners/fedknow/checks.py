"""Models that FedKNOW cannot train."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedknow.client.learners.fedknow.knowledge import prunable
from fedknow.client.learners.fedknow.settings import FedKnowSettings
from fedknow.protocols.config import ConfigError

__all__ = ["check_model"]


def check_model(
    body: nn.Module, head: nn.Linear, settings: FedKnowSettings
) -> None:
    """Refuse a user's model that this method cannot work with.

    Raises
    ------
    ConfigError
        Saying what the model must have.
    """
    fault = None
    if not prunable(body):
        fault = "its body has no weight matrices to train, of which it would keep a fraction"
    elif head.bias is None:
        fault = "its head needs a bias"
    elif settings.restore_from < 1 and any(
        isinstance(m, _BatchNorm) for m in body.modules()
    ):
        fault = (
            "learner.restore_from < 1 would move its BatchNorm statistics twice a "
            "batch; set it to 1"
        )
    elif settings.restore_from < 1 and settings.integrator == "online":
        fault = (
            "learner.integrator = 'online' turns g by one backward pass of the whole "
            "batch; set restore_from to 1"
        )
    if fault:
        raise ConfigError(
            f"learner.name = {settings.learner!r} cannot train this model: {fault}"
        )
