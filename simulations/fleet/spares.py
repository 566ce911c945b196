"""Spare clients for a wave, in case some do not answer (``over_commit``)."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

from flwr.app import Message as FlowerMessage
from flwr.app import MessageType

from fedknow.protocols.config import ConfigError

__all__ = ["is_over_committed", "spare_messages"]


def is_over_committed(sent: Sequence[FlowerMessage], factor: float) -> bool:
    """Return whether a wave is sent to more clients than chosen.

    Only training is, as all scores count.

    Parameters
    ----------
    sent : sequence of flwr.app.Message
        A strategy's messages.
    factor : float
        ``fleet.over_commit``.
    """
    if factor <= 1 or not sent:
        return False
    kinds = {message.metadata.message_type for message in sent}
    return kinds == {MessageType.TRAIN}


def spare_messages(
    sent: Sequence[FlowerMessage],
    present: Iterable[int],
    factor: float,
    draw: random.Random,
) -> list[FlowerMessage]:
    """Make messages to further present clients, drawn at random.

    Parameters
    ----------
    sent : sequence of flwr.app.Message
        A strategy's messages, one at least.
    present : iterable of int
        Nodes of all present clients.
    factor : float
        ``fleet.over_commit``.
    draw : random.Random

    Raises
    ------
    ConfigError
        If a strategy does not send all clients the same.
    """
    content = sent[0].content
    if any(message.content is not content for message in sent):
        raise ConfigError(
            f"fleet.over_commit = {factor:g} needs a strategy that sends all clients the same; "
            "set it to 1"
        )
    chosen = {message.metadata.dst_node_id for message in sent}
    # Sorted, as the order of a set is not the same in each process.
    spare = sorted(set(present) - chosen)
    count = min(math.ceil(len(sent) * factor) - len(sent), len(spare))
    return [
        FlowerMessage(content, node, MessageType.TRAIN)
        for node in sorted(draw.sample(spare, count))
    ]
