"""Pieces of work on virtual devices: chances, memory and jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fedknow.protocols.config import FleetConfig
from fedknow.protocols.messages import (
    EVALUATE,
    NO_ANSWER,
    OUT_OF_MEMORY,
    TRAIN,
    Message,
    Metrics,
    client_of,
)
from fedknow.protocols.seeds import generator
from fedknow.protocols.work import FLOPS, MEMORY
from fedknow.server.checks.faults import RunError
from fedknow.server.grids.traffic import record_bytes
from fedknow.simulations.fleet.accounts import Account
from fedknow.simulations.fleet.build import Fleet
from fedknow.simulations.fleet.clock import Job

__all__ = ["FleetWave", "Piece", "can_fail", "draw_chances", "make_piece"]

Chance = tuple[tuple[float, float], float, bool]
"""Chances of a client's work.

They are the seconds that its request and its answer are under way, the factor by which it takes
longer, and whether its answer is lost.
"""


@dataclass(frozen=True)
class FleetWave:
    """A wave of pieces that are given out at one moment.

    Attributes
    ----------
    due : float
        The moment from which on answers count no more.
    chances : sequence of Chance
        By client.
    is_sparse : bool
        Whether arrays travel without their zeros.
    sizes : dict of int to int
        Bytes of records, by identity.
    """

    due: float
    chances: Sequence[Chance]
    is_sparse: bool
    sizes: dict[int, int] = field(default_factory=dict)

    def request_bytes(self, message: Message) -> int:
        """Return the bytes of a request."""
        # Records that requests share are weighed once, as encoding takes long.
        for record in message.content.values():
            if id(record) not in self.sizes:
                self.sizes[id(record)] = record_bytes(record, self.is_sparse)
        return sum(self.sizes[id(record)] for record in message.content.values())

    def answer_bytes(self, reply: Message) -> int:
        """Return the bytes of an answer."""
        return sum(
            record_bytes(record, self.is_sparse)
            for record in reply.content.values()
        )


@dataclass(frozen=True)
class Piece:
    """A piece of work whose answer is known.

    Attributes
    ----------
    message, reply : Message
    version : int
        Version of the client's state after it.
    flops : float
        Its operations.
    job : Job
        Decides when the answer arrives.
    """

    message: Message
    reply: Message
    version: int
    flops: float
    job: Job

    def given_up(self) -> tuple[Message, int]:
        """Return the failure in place of an answer that does not come."""
        reason = f"client {self.job.client}: no answer"
        return self.message.fail(NO_ANSWER, reason), self.version


def draw_chances(
    settings: FleetConfig,
    clients: int,
    seed: int,
    wave: int,
) -> list[Chance]:
    """Draw the chances of the work that each client may be given in a wave.

    They are drawn for all clients, so that they do not depend on the choice of clients.
    """
    # Nothing is left to chance, and drawing for thousands of clients takes time.
    if not (settings.jitter or settings.compute_sigma or settings.dropout):
        return [((settings.latency, settings.latency), 1.0, False)] * clients
    draw = generator(seed, "fleet.work", wave)
    # The order of the draws is part of a seed's meaning.
    exponential = draw.standard_exponential((clients, 2))
    delays = settings.latency + settings.jitter * exponential
    slower = np.exp(settings.compute_sigma * draw.standard_normal(clients))
    lost = draw.random(clients) < settings.dropout
    both_delays = map(tuple, delays.tolist())
    return list(zip(both_delays, slower.tolist(), lost.tolist(), strict=True))


def make_piece(
    fleet: Fleet,
    account: Account,
    wave: FleetWave,
    message: Message,
    answer: tuple[Message, int],
) -> Piece:
    """Make a piece of work from the costs that its answer states.

    Work that needs more memory than the device has becomes a failure.

    Parameters
    ----------
    fleet : Fleet
    account : Account
        The account of the client's device.
    wave : FleetWave
    message : Message
        The work.
    answer : tuple of Message and int
        Its answer, and the version of the client's state after it.
    """
    reply, version = answer
    client = client_of(message.node)
    profile = fleet.profiles[client]
    delays, slower, is_lost = wave.chances[client]
    account.asked += 1
    flops = 0.0
    seconds = 0.0
    if reply.failure is None:
        flops = _cost(reply, FLOPS)
        memory = _cost(reply, MEMORY)
        # Also where it does not fit: the report says how much would have been needed.
        account.memory = max(account.memory, memory)
        # Known only after the work was done for real, so its answer is thrown away.
        if memory > profile.memory_limit:
            account.out_of_memory += 1
            # It fails before it computes anything.
            flops = 0.0
            limit = f"{profile.memory_limit / 1e6:,.0f} MB"
            reply = message.fail(
                OUT_OF_MEMORY,
                f"out of memory: {fleet.names[client]} has room for {limit}, "
                f"{message.kind!r} needs {memory / 1e6:,.0f} MB",
            )
        else:
            seconds = flops / profile.speed * slower
    # The request was sent, whatever becomes of the work.
    down = wave.request_bytes(message)
    account.down += down
    job = Job(
        message.id,
        client,
        down,
        seconds,
        wave.answer_bytes(reply),
        delays,
        wave.due,
        is_lost and can_fail(message),
    )
    return Piece(message, reply, version, flops, job)


def can_fail(message: Message) -> bool:
    """Return whether the run can do without an answer.

    Only the answers to messages that a task is over are needed.
    """
    return message.kind in (TRAIN, EVALUATE)


def _cost(reply: Message, name: str) -> float:
    metrics = next(
        (
            record
            for record in reply.content.values()
            if isinstance(record, Metrics)
        ),
        Metrics(),
    )
    value = metrics.get(name)
    if not isinstance(value, int | float):
        client = client_of(reply.node)
        raise RunError(
            f"client {client} does not say what its work cost: "
            f"a fleet needs {name!r} among its metrics"
        )
    return float(value)
