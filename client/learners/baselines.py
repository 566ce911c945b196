"""The plain learners that others are measured against."""

from __future__ import annotations

from pydantic import Field

from fedknow.client.data.stream import TaskData
from fedknow.client.learners.base import Learner, LearnerSettings, Round

__all__ = ["FedPer", "FedRep", "FedRepSettings", "Finetune", "Local"]


class Finetune(Learner):
    """Train on the current task, share everything: a FedAvg client (McMahan et al., AISTATS 2017).

    Keeps nothing. With one client or no others it is plain fine-tuning, the lower bound of continual learning.
    """


class Local(Learner):
    """Train on the current task, share nothing: what a client reaches without the others.

    Keeps its whole model.
    """

    exchange = "none"


class FedPer(Learner):
    """Shared body, personal head, trained together (Arivazhagan et al., 2019, arXiv 1912.00818).

    Keeps the head.
    """

    exchange = "body"


class FedRepSettings(LearnerSettings):
    """Settings of :class:`FedRep`."""

    head_epochs: int = Field(0, ge=0)
    """Local epochs that train the head before the body is trained; 0: half of them, at least one."""


class FedRep(Learner):
    """Shared body, personal head, trained in turn (Collins et al., ICML 2021, Algorithm 1).

    The first epochs of a round train the head on the frozen body, the others the body under the frozen head. Keeps
    the head. A round of one epoch has no room for both; it trains the head in one epoch and the body in another.
    """

    exchange = "body"
    Settings = FedRepSettings
    settings: FedRepSettings

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
        self.head.requires_grad_(on_head)
        self.body.requires_grad_(not on_head)

    def fit(self, task: TaskData, round: Round) -> dict[str, float]:
        """One round, see :class:`FedRep`."""
        try:
            return super().fit(task, round)
        finally:
            self.model.requires_grad_(True)
