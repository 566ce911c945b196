"""What a client takes in from its server, and what it does not let out.

A server announces how large a message is. The client takes a message that fits the model which
both have agreed on, and no more than its owner allows. In texts for the server the client's
folders are called by the options that named them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedknow.client.host import Answerer
from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.wire import Limits

__all__ = ["message_limits", "without_folders"]

_SMALLEST = 16 * 2**20
"""Bytes that any message may have: headers and small models need no bound of their own."""
_SMALLEST_OF_PAIRS = 256 * 2**20
"""The same where the strategy sends more than parameters, such as images."""
_COPIES = 4
"""Models that fit into one message: parameters, what clients keep, and as much to spare."""


def message_limits(
    node: Answerer, config: ExperimentConfig, most_bytes: int
) -> Limits:
    """Say how large a message for a node may be.

    Parameters
    ----------
    node : Answerer
        What answers. One without a learner says nothing about sizes.
    config : ExperimentConfig
        The experiment.
    most_bytes : int
        What the client's owner allows.

    Returns
    -------
    Limits
        Of a message under way, and of its arrays once read.
    """
    learner = getattr(node, "learner", None)
    size = most_bytes
    if learner is not None:
        tensors = [
            *learner.send().values(),
            *learner.local_parameters().values(),
        ]
        model_bytes = sum(tensor.nbytes for tensor in tensors)
        copies = _COPIES
        smallest = _SMALLEST
        if learner.strategy:
            # Such a strategy may send every client's share to each one.
            copies += config.data.clients
            smallest = _SMALLEST_OF_PAIRS
        size = min(most_bytes, max(smallest, copies * model_bytes))
    return Limits(message_bytes=size, decoded_bytes=size)


def without_folders(text: str, folders: Mapping[str, Path | None]) -> str:
    """Put the names of options in place of a client's folders.

    Parameters
    ----------
    text : str
        A text for the server.
    folders : mapping
        Folders by the options that named them.

    Examples
    --------
    >>> without_folders("/home/ada/x/task-000.npz: bad", {"--data": Path("/home/ada/x")})
    '--data/task-000.npz: bad'
    """
    for option, folder in folders.items():
        if folder is None:
            continue
        # A name such as `.` would be found in any sentence.
        for name in (str(folder.absolute()), str(folder)):
            if len(name) > 1:
                text = text.replace(name, option)
    return text
