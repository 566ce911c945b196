"""Models that FedKNOW cannot train."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedknow.client.learners.fedknow.knowledge import prunable
from fedknow.client.learners.fedknow.settings import FedKnowSettings
from fedknow.protocols.config import ConfigError

__all__ = ["check_model", "no_weights"]


def check_model(
    body: nn.Module, head: nn.Linear, settings: FedKnowSettings
) -> None:
    """Refuse a user's model that this method cannot work with.

    Raises
    ------
    ConfigError
        Saying what the model must have.
    """
    fault = no_weights(body) or _fault(body, head, settings)
    if fault:
        raise ConfigError(
            f"learner.name = {settings.learner!r} cannot train this model: {fault}"
        )


def _fault(body: nn.Module, head: nn.Linear, settings: FedKnowSettings) -> str:
    if head.bias is None:
        return "its head needs a bias"
    if settings.restore_from == 1:
        return ""
    if any(isinstance(m, _BatchNorm) for m in body.modules()):
        return (
            "learner.restore_from < 1 would move its BatchNorm statistics twice a "
            "batch; set it to 1"
        )
    if settings.integrator == "online":
        return (
            "learner.integrator = 'online' turns g by one backward pass of the whole "
            "batch; set restore_from to 1"
        )
    return ""


def no_weights(body: nn.Module) -> str:
    """Say what a body lacks, of which knowledge is a fraction; else ``""``."""
    if prunable(body):
        return ""
    fault = "its body has no weight matrices to train, of which it would keep a fraction"
    # Frozen by model.train: the remedy is a setting and not another model.
    if any(not parameter.requires_grad for parameter in body.parameters()):
        fault += (
            "; with a frozen body, set model.neck = 256 or model.train = 'last:1'"
        )
    return fault
