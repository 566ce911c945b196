"""The numbers that a round of FedKNOW reports."""

from __future__ import annotations

from dataclasses import dataclass

from fedknow.client.learners.frames.projection import Integration

__all__ = ["RoundCounts"]


@dataclass
class RoundCounts:
    """Sums over the integrated steps of one round.

    Attributes
    ----------
    batches : int
        Batches so far, integrated or not.
    steps : int
        Integrated steps.
    signatures, violated, active : int
        Constraints; those that the gradient violated; those that bind the result.
    pullbacks, pushforwards : int
        Backward passes, and products of the body's Jacobian with a vector.
    """

    batches: int = 0
    steps: int = 0
    signatures: int = 0
    violated: int = 0
    active: int = 0
    pullbacks: int = 0
    pushforwards: int = 0

    def add(self, result: Integration, pullbacks: int) -> None:
        """Count one integrated step.

        Parameters
        ----------
        result : Integration
            Its outcome, with a multiplier for each signature task.
        pullbacks : int
            Backward passes that the current gradient and the choice of tasks took.
        """
        self.steps += 1
        self.signatures += len(result.multipliers)
        self.violated += result.violated
        self.active += int((result.multipliers > 0).sum())
        self.pullbacks += pullbacks + result.built
        self.pushforwards += result.multiplied

    def means(self) -> dict[str, float]:
        """Give the means over the integrated steps, 0 without any."""
        steps = max(1, self.steps)
        return {
            "signature-tasks": self.signatures / steps,
            "violated": self.violated / steps,
            "active": self.active / steps,
            "pullbacks": self.pullbacks / steps,
            "pushforwards": self.pushforwards / steps,
        }
