"""Faults of clients' answers, and the errors that end a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from fedknow.protocols.errors import FedknowError
from fedknow.protocols.messages import OUT_OF_MEMORY, STATE_LOST

__all__ = [
    "ClientFailure",
    "ClientLost",
    "Fault",
    "NothingAggregatedError",
    "RunError",
    "Unusable",
    "fault_of",
]


class RunError(FedknowError, RuntimeError):
    """A run that cannot go on; the text says who failed, when and why.

    What was earned until then is kept.
    """


class NothingAggregatedError(RunError):
    """A run whose strategy never aggregated.

    Resumed, it would end in the same way.
    """

    is_resumable = False


class ClientLost(RunError):
    """A run that ended because a client has lost its state.

    It cannot be resumed until that is mended.
    """

    is_resumable = False


class Fault(StrEnum):
    """The ways in which a reply can be of no use."""

    FAILED = "the client failed"
    OUT_OF_MEMORY = "the client's device lacks memory"
    STATE_LOST = "the client's state is lost"
    NOT_FINITE = "not finite"
    NAMES = "other names"
    SHAPE = "another shape"
    DTYPE = "another dtype"
    NORM = "an absurd norm"
    METRICS = "unusable metrics"
    VALUES = "impossible values"


_FAULTS = {OUT_OF_MEMORY: Fault.OUT_OF_MEMORY, STATE_LOST: Fault.STATE_LOST}
"""Faults by the codes of clients' failures."""


def fault_of(code: int) -> Fault:
    """Return the fault that a failure's code stands for."""
    # Flower and later versions may have codes that are not known here.
    return _FAULTS.get(code, Fault.FAILED)


@dataclass(frozen=True)
class ClientFailure:
    """A reply that cannot be used.

    Attributes
    ----------
    fault : Fault
    client, task, round : int
        Whose reply, and when; the client counts from 0.
    kind : str
        Kind of the message.
    tensor : str
        Name of the tensor or metric at fault, where it is one.
    reason : str
        A sentence with the particulars.
    """

    fault: Fault
    client: int
    task: int
    round: int
    kind: str
    tensor: str
    reason: str

    def __str__(self) -> str:
        return (
            f"client {self.client}, task {self.task + 1}, round {self.round} "
            f"({self.kind}): {self.reason}"
        )

    def event(self) -> dict[str, Any]:
        """Return the failure as the payload of an event."""
        return asdict(self) | {
            "fault": self.fault.name.lower(),
            "reason": str(self),
        }


class Unusable(Exception):
    """A record that cannot be used: its fault, and the entry at fault."""

    def __init__(self, fault: Fault, tensor: str, reason: str) -> None:
        super().__init__(reason)
        self.fault = fault
        self.tensor = tensor
