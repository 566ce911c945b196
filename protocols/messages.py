"""Typed messages between the server and its clients.

A message carries named records. Three kinds of record exist, the same three that Flower has, so
that conversion in either direction loses nothing (:mod:`fedknow.protocols.flower`); arrays are
plain NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

__all__ = [
    "ARRAYS",
    "CLIENT_FAILED",
    "CONFIG",
    "END_TASK",
    "ENVELOPE",
    "EVALUATE",
    "EXTRA",
    "FIRST_NODE",
    "KEPT",
    "METRICS",
    "NO_ANSWER",
    "OUT_OF_MEMORY",
    "STATE_LOST",
    "TRAIN",
    "Arrays",
    "Config",
    "Content",
    "Failure",
    "Mean",
    "Message",
    "Metrics",
    "client_of",
    "nbytes",
    "node_of",
]

TRAIN = "train"
"""One round of local training. Config: ``task``, ``round`` (both from the experiment) and the
strategy's own keys."""
END_TASK = "train.end_task"
"""The task is over: take the final global parameters and keep what the method keeps. Config:
``task``.
"""
EVALUATE = "evaluate"
"""Score the model on tasks ``0..task``. Config: ``task``, ``scoring`` ("personal" or "global"),
``collect``."""

ARRAYS = "arrays"
"""Record that holds the parameters that travel (Flower's default key)."""
KEPT = "kept"
"""Record that holds parameters a client keeps to itself; sent for scoring the purely global model
and nothing else."""
EXTRA = "extra"
"""Record of arrays beside the parameters: what the two halves of a method, learner and strategy,
tell each other."""
ENVELOPE = "fedknow"
"""Record beside all others where a message travels as Flower's: what a client needs to know
besides the work."""
CLIENT_FAILED = 2
"""Failure code of work that a client could not do (Flower's CLIENT_APP_RAISED_EXCEPTION)."""
NO_ANSWER = 4
"""Failure code of work that is given up, as no answer came in time (Flower's
REPLY_MESSAGE_UNAVAILABLE)."""
OUT_OF_MEMORY = 64
"""Failure code of work that a client's device lacks the memory for (Flower has none for it)."""
STATE_LOST = 65
"""Failure code of work on a client whose state is missing or damaged (Flower has none for it)."""
CONFIG = "config"
METRICS = "metrics"

FIRST_NODE = 2
"""Node id of client 0. Ids are stable from run to run; 0 and 1 are Flower's own."""


class Arrays(dict[str, np.ndarray]):
    """Named tensors, in the order of the model's state dict."""


class Mean(Arrays):
    """Mean of several clients' parameters, weighted by their samples.

    It stands in the answer of each of them.

    It never travels between server and clients: workers of a simulation make it
    (:mod:`fedknow.server.grids.running_mean`). Integers (counters) are float64 here, as means
    are not whole.

    Attributes
    ----------
    weight : float
        The samples of all of them.
    clients : int
        How many they are.
    bytes : int
        Size of the parameters that each of them sent.
    """

    weight = 0.0
    clients = 0
    bytes = 0


class Metrics(dict[str, int | float | list[int] | list[float]]):
    """Named numbers or lists of numbers."""


class Config(
    dict[
        str,
        bool
        | int
        | float
        | str
        | bytes
        | list[bool]
        | list[int]
        | list[float]
        | list[str]
        | list[bytes],
    ]
):
    """Named settings: scalars, text, bytes, or lists of one of these."""


Record = Arrays | Metrics | Config
Content = dict[str, Record]


@dataclass(frozen=True)
class Failure:
    """Why a client could not answer.

    A code (Flower's ``ErrorCode``), and a sentence a person can act on.
    """

    code: int
    reason: str


@dataclass(frozen=True)
class Message:
    """One piece of work for a client, or its answer.

    Attributes
    ----------
    kind : str
        :data:`TRAIN`, :data:`END_TASK`, :data:`EVALUATE`, or another Flower message type.
    node : int
        Node id of the client: the receiver of work, the sender of an answer.
    id : str
        Unique within a run; an answer carries the id of the work in ``reply_to``.
    group : str
        The round, as Flower counts it.
    content : dict
        Records by name; empty where ``failure`` is set.
    """

    kind: str
    node: int
    id: str
    reply_to: str = ""
    group: str = ""
    content: Mapping[str, Record] = field(default_factory=dict)
    failure: Failure | None = None

    def reply(self, content: Mapping[str, Record]) -> Message:
        """Return the answer to this message."""
        # The id follows from the work's, so that the same work gives the same answer, byte
        # for byte.
        return Message(
            self.kind, self.node, f"{self.id}:reply", self.id, self.group, content
        )

    def fail(self, code: int, reason: str) -> Message:
        """Return the answer that says why there is none."""
        return Message(
            self.kind,
            self.node,
            f"{self.id}:reply",
            self.id,
            self.group,
            {},
            Failure(code, reason),
        )

    def config(self) -> Config:
        """Return the first :class:`Config` record (empty if there is none)."""
        # By type and not by name: in Flower a strategy may choose the names.
        return next(
            (
                record
                for record in self.content.values()
                if isinstance(record, Config)
            ),
            Config(),
        )

    def arrays(self) -> Arrays:
        """Return the first :class:`Arrays` record (empty if there is none)."""
        return next(
            (
                record
                for record in self.content.values()
                if isinstance(record, Arrays)
            ),
            Arrays(),
        )


def node_of(client: int) -> int:
    """Node id of a client (clients count from 0)."""
    # Flower keeps 0 and 1 for itself.
    return client + FIRST_NODE


def client_of(node: int) -> int:
    """Client number of a node id."""
    return node - FIRST_NODE


def nbytes(content: Mapping[str, Record]) -> int:
    """Count a message's payload in bytes.

    These are its tensors, and 8 bytes for each number beside them.
    """
    total = 0
    for record in content.values():
        for value in record.values():
            if isinstance(value, np.ndarray | bytes | str):
                total += (
                    value.nbytes if isinstance(value, np.ndarray) else len(value)
                )
            elif isinstance(value, list):
                total += sum(
                    len(item) if isinstance(item, bytes | str) else 8
                    for item in value
                )
            else:
                # Numbers have 64 bits on the wire.
                total += 8
    return total
