"""Options of a wave, which is work that is given out together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedknow.protocols.messages import TRAIN, Message

__all__ = ["WaveOptions"]


@dataclass(frozen=True)
class WaveOptions:
    """An experiment's wishes for a wave; given to a grid with the work.

    Attributes
    ----------
    inspect : callable, optional
        Sees each answer, and returns it or a failure in its place. After a failure the client
        goes back to its state before the work.
    on_missed : callable, optional
        Called with the work that was not answered in time, if there is any.
    on_lost_state : callable, optional
        Called with a client and a reason when the client begins anew because its state is lost.
        Without it, such work has failed.
    is_sparse : bool
        Whether arrays travel without their zeros (a learner's ``sparse``).
    is_averaged : bool
        Whether clients' trained parameters may be averaged on the way (``engine.running_mean``).
    is_measurement : bool
        Whether the wave is our own scoring, which takes no virtual time.
    enough : int
        Good answers with which the wave is over; 0: it waits for all.
    label : str, optional
        The kind under which traffic is counted; by default each message's own.
    record_labels : mapping
        Kinds under which single records of the answers are counted, by the records' names.
    """

    inspect: Callable[[Message], Message] | None = None
    on_missed: Callable[[Sequence[Message]], None] | None = None
    on_lost_state: Callable[[int, str], None] | None = None
    is_sparse: bool = False
    is_averaged: bool = False
    is_measurement: bool = False
    enough: int = 0
    label: str | None = None
    record_labels: Mapping[str, str] = field(default_factory=dict)

    def averages(self, work: Sequence[Message]) -> bool:
        """Return whether the answers to this work become one mean."""
        # Ends of tasks and scores are read client by client.
        return self.is_averaged and all(message.kind == TRAIN for message in work)
