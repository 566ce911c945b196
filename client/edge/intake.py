"""What a client takes in from its server, and what it does not let out.

A server announces how large a message is. The client takes a message that fits the model which
both have agreed on, and no more than its owner allows. In texts for the server the client's
folders are called by the options that named them.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedknow.client.host import Answerer
from fedknow.protocols.config import (
    MOST_CLIENTS,
    ConfigError,
    ExperimentConfig,
)
from fedknow.protocols.messages import client_of
from fedknow.protocols.texts import counted
from fedknow.protocols.wire import Limits

__all__ = ["check_names", "message_limits", "read_toml", "without_folders"]

LONGEST_FENCE = 64
"""Bytes of a stream's secret; ours have half of it."""
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


def check_names(run: str, node: int, fence: bytes) -> None:
    """Refuse a run, a client or a fence that no server of ours names.

    They become files and their content, which the client must be able to read again.

    Raises
    ------
    ConfigError
        Saying which of them.
    """
    if re.fullmatch("[A-Za-z0-9._-]{0,64}", run) is None:
        raise ConfigError(
            f"the server names its run {run!r:.80}, which is no name of a run"
        )
    if not 0 <= client_of(node) < MOST_CLIENTS:
        raise ConfigError(
            f"the server calls this client node {node}, which no experiment has"
        )
    if len(fence) > LONGEST_FENCE:
        raise ConfigError(
            f"the server sends a fence of {counted(len(fence), 'byte')}; "
            f"{LONGEST_FENCE} are the most"
        )


def read_toml(text: str) -> dict[str, Any]:
    """Read the configuration that a server sends.

    Raises
    ------
    ConfigError
        If it is no TOML, or more than can be read.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        reason = "lists or tables nested too deeply"
    # TOML's own errors are of this kind, and Python's about integers of thousands of digits.
    except ValueError as error:
        reason = str(error)
    raise ConfigError(f"the server's configuration is not valid TOML: {reason}")
