"""A learner of your own: one class, one hook.

Run it with ``python examples/own_learner.py``, or from the command line, in this folder::

    fedknow simulate digits --set learner=own_learner:Smoothed --set learner.amount=0.2
"""

import sys

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

import fedknow


class Settings(fedknow.LearnerSettings):
    """Settings of :class:`Smoothed`."""

    amount: float = Field(0.1, ge=0, lt=1)
    """Share of each label that is spread over all classes."""


class Smoothed(fedknow.Learner):
    """Shared body, personal head, smoothed labels."""

    Settings = Settings
    settings: Settings
    exchange = "body"

    def loss(self, logits: Tensor, batch: object) -> Tensor:
        """Cross-entropy with smoothed labels; logits are float32 [b, classes]."""
        return F.cross_entropy(
            logits, batch.y, label_smoothing=self.settings.amount
        )


if __name__ == "__main__":
    out = sys.argv[1] if len(sys.argv) > 1 else "runs/own-learner"
    print(
        fedknow.compare(
            "digits",
            ["fedrep", Smoothed],
            seeds=1,
            data={"clients": 6, "tasks": 3},
            train={"rounds": 2},
            out=out,
        )
    )
