"""The way in which a round's work is exchanged for answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flwr.app import Message as FlowerMessage

from fedknow.server.run.context import RunContext

__all__ = ["Exchange", "choose_exchange"]

Exchange = Callable[[Sequence[FlowerMessage]], list[FlowerMessage]]


def choose_exchange(run: RunContext) -> Exchange:
    """Choose how a round's messages are exchanged."""
    if not run.parts.config.privacy.secure:
        return run.strategy_grid.send_and_receive
    # An extra brings the package cryptography, and a run without it does not wait for its import.
    from fedknow.server.run.secure import SecureRounds

    return SecureRounds(run).exchange
