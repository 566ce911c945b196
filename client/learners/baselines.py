"""The plain learners that others are measured against."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedknow.client.learners.frames.checks import check_free
from fedknow.client.learners.frames.learner import Learner, LearnerSettings
from fedknow.client.learners.frames.settings import ANY_HEAD
from fedknow.protocols.config import ConfigError, TrainConfig

__all__ = [
    "FedPer",
    "FedProx",
    "FedProxSettings",
    "FedRep",
    "FedRepSettings",
    "Finetune",
    "Local",
]


class Finetune(Learner):
    """Train on the current task, share everything: a FedAvg client.

    McMahan et al., AISTATS 2017, Algorithm 1.

    With one client or no others it is plain fine-tuning, the lower bound of continual learning.

    Keeps: nothing. Sends: the model. Needs: a forward and backward pass a step, the least there
    is. Valid: any model, task- or class-incremental.
    """

    heads = ANY_HEAD


class Local(Learner):
    """Train on the current task, share nothing.

    It shows what a client reaches without the others.

    Keeps: its whole model. Sends: nothing. Needs: what :class:`Finetune` needs. Valid: any
    model, task- or class-incremental.
    """

    heads = ANY_HEAD
    exchange = "none"


class FedPer(Learner):
    """Shared body, personal head, trained together (2019).

    Arivazhagan et al., arXiv 1912.00818.

    The personal layers are the head, one linear layer; the paper also tries more.

    Keeps: the head. Sends: the body. Needs: what :class:`Finetune` needs. Valid: any model,
    task- or class-incremental.
    """

    heads = ANY_HEAD
    exchange = "body"


class FedRepSettings(LearnerSettings):
    """Settings of :class:`FedRep`."""

    head_epochs: int = Field(0, ge=0, le=10_000)
    """Local epochs that train the head before the body is trained; 0: half of them, at least
    one."""


class FedRep(Learner):
    """Shared body, personal head, trained in turn (ICML 2021).

    Collins et al., Algorithm 1.

    The first epochs of a round train the head on the frozen body, the others the body under the
    frozen head. Where a round has one epoch there is no room for both: it trains the head in
    one and the body in another.

    Keeps: the head. Sends: the body. Needs: less than :class:`Finetune`, for the head's epochs
    have no backward pass through the body; a forward pass more where a round has one epoch.
    Valid: any model, task- or class-incremental.

    Raises
    ------
    ConfigError
        If ``head_epochs`` leaves no epoch for the body, or body or head is frozen as a whole.
    """

    heads = ANY_HEAD
    exchange = "body"
    Settings = FedRepSettings
    settings: FedRepSettings
    search: ClassVar[dict[str, list[Any]]] = {"head_epochs": [0, 1]}

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        settings: FedRepSettings,
    ) -> None:
        super().__init__(model, train, settings)
        # With one epoch a head epoch is still allowed: `epochs` then adds one for the body.
        if settings.head_epochs >= max(2, train.epochs):
            raise ConfigError(
                f"learner.head_epochs = {settings.head_epochs} leaves none of "
                f"train.epochs = {train.epochs} for the "
                "body; lower it, or 0 for half of them"
            )
        for part in ("body", "head"):
            check_free(model, "fedrep", part, "trains body and head in turn")

    @property
    def head_epochs(self) -> int:
        """Epochs that train the head."""
        return self.settings.head_epochs or max(1, self.train.epochs // 2)

    @property
    def epochs(self) -> int:
        """Head epochs and body epochs; at least one of the latter."""
        return max(self.train.epochs, self.head_epochs + 1)

    def begin_epoch(self, epoch: int) -> None:
        """Switch from head to body when the head has had its epochs."""
        on_head = epoch < self.head_epochs
        # What the user froze is not among these, and stays frozen.
        for name, parameter in self.trainable.items():
            parameter.requires_grad_(name.startswith("head.") is on_head)
        # The running statistics of a frozen body stand still too.
        for module in self.body.modules():
            if isinstance(module, _BatchNorm):
                module.train(not on_head)

    def release(self) -> None:
        """Let body and head both be trained again."""
        for parameter in self.trainable.values():
            parameter.requires_grad_(True)


class FedProxSettings(LearnerSettings):
    """Settings of :class:`FedProx`."""

    proximal_mu: float = Field(0.01, ge=0)
    """mu, the weight of the pull towards the global model."""


class FedProx(Learner):
    """FedAvg whose clients are pulled towards the global model (MLSys 2020).

    The pull is mu / 2 ||w - w_G||^2 (Li et al., Eq. 2).

    Flower's strategy tells clients mu; the term itself is in :meth:`Learner.fit`. The paper's
    inexact solver is local training for ``train.epochs``, as in its experiments.

    Keeps: nothing; within a round a copy of the model it began with. Sends: the model. Needs:
    what :class:`Finetune` needs. Valid: any model, task- or class-incremental.
    """

    heads = ANY_HEAD
    Settings = FedProxSettings
    strategy = "fedprox"
    search: ClassVar[dict[str, list[Any]]] = {
        "proximal_mu": [0.001, 0.01, 0.1, 1.0]
    }

    @classmethod
    def strategy_options(cls, settings: LearnerSettings) -> dict[str, Any]:
        """Return the strategy's mu."""
        return settings.model_dump()
