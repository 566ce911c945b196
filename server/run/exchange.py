"""How work is exchanged for answers: in a round, and at a task's end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flwr.app import Message as FlowerMessage

from fedknow.protocols.messages import Message
from fedknow.server.run.context import RunContext

__all__ = ["Ending", "Exchange", "choose_ending", "choose_exchange"]

Exchange = Callable[[Sequence[FlowerMessage]], list[FlowerMessage]]
Ending = Callable[[Sequence[Message]], list[Message]]


def choose_exchange(run: RunContext) -> Exchange:
    """Choose how a round's messages are exchanged."""
    if not run.parts.config.privacy.secure:
        return run.strategy_grid.send_and_receive
    # An extra brings the package cryptography, and a run without it does not wait for its import.
    from fedknow.server.run.secure import SecureRounds

    return SecureRounds(run).exchange


def choose_ending(run: RunContext) -> Ending:
    """Choose how clients are told that a task is over; gives their answers."""
    parts = run.parts
    if not (parts.config.privacy.secure and parts.learner.sum_layout()):
        return lambda work: run.grid.exchange(work, run.options)
    from fedknow.server.run.secure import SecureRounds

    return SecureRounds(run).end
