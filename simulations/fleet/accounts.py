"""Accounts of a fleet: the virtual time of each device and the server."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from fedknow.simulations.fleet.build import Fleet
from fedknow.simulations.fleet.clock import Timing

__all__ = ["Account", "Accounts"]


@dataclass
class Account:
    """Totals of a client's device while it was present.

    Times are in seconds, ``down`` and ``up`` in bytes. The others count pieces of work. The names
    are those of ``fleet.json`` and of checkpoints.

    Attributes
    ----------
    computing, transfer : float
    flops : float
        Operations, as far as work got.
    down, up : float
    memory : float
        The most bytes that its work needed at once.
    asked, answered : int
    late : int
        Given up at the deadline, or because enough other answers had come.
    lost, out_of_memory : int
    """

    computing: float = 0.0
    transfer: float = 0.0
    flops: float = 0.0
    down: float = 0.0
    up: float = 0.0
    memory: float = 0.0
    asked: int = 0
    answered: int = 0
    late: int = 0
    lost: int = 0
    out_of_memory: int = 0


class Accounts:
    """Accounts of all devices, and of the server's time.

    Parameters
    ----------
    fleet : Fleet

    Attributes
    ----------
    clients : list of Account
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.clients = [Account() for _ in fleet.profiles]
        self._communication = 0.0
        self._computing = 0.0
        self._charged = 0.0

    def book(self, timing: Timing, flops: float, is_failure: bool) -> bool:
        """Book the end of a piece of work.

        Parameters
        ----------
        timing : Timing
            The moments of its job.
        flops : float
            Operations of the whole piece.
        is_failure : bool
            Whether its answer is a failure.

        Returns
        -------
        bool
            Whether the answer came.
        """
        account = self.clients[timing.job.client]
        # A device that is away neither computes nor sends.
        seconds_present = partial(self._fleet.presence.between, timing.job.client)
        computing = seconds_present(timing.received, timing.computed)
        request = seconds_present(timing.began, timing.received)
        answer = seconds_present(timing.computed, timing.arrived)
        account.computing += computing
        account.transfer += request + answer
        if timing.computed < timing.ended or timing.is_complete:
            account.flops += flops
        else:
            # Given up half-way: as much as was computed. A job of no seconds has no part.
            account.flops += flops * computing / (timing.job.seconds or math.inf)
        if timing.job.is_lost:
            account.lost += 1
            return False
        if not timing.is_complete:
            account.late += 1
            return False
        account.up += timing.job.up
        account.answered += not is_failure
        return True

    # --- the server's time

    @property
    def charged(self) -> float:
        """The moment up to which the server's time is charged."""
        return self._charged

    def charge(
        self, until: float, communication: float, computing: float
    ) -> None:
        """Charge the server's time up to a moment to the work that it waited for."""
        self._charged = until
        self._communication += communication
        self._computing += computing

    # --- reports

    def elapsed(self, time: float) -> dict[str, float]:
        """Return virtual time so far, and its parts.

        See :class:`fedknow.server.run.events.VirtualTime`. Time that was neither communication
        nor computing was waiting.
        """
        clients = range(len(self.clients))
        waiting = time - self._communication - self._computing
        return {
            "virtual_seconds": time,
            "communication_seconds": self._communication,
            "computing_seconds": self._computing,
            # Sums of floats may come out a little below zero.
            "waiting_seconds": max(0.0, waiting),
            "energy_joules": sum(
                self._joules(client, time) for client in clients
            ),
        }

    def report(self, time: float) -> dict[str, Any]:
        """Return the totals of each device, for ``fleet.json``."""
        rows = [self._row(client, time) for client in range(len(self.clients))]
        return self.elapsed(time) | {"clients": rows}

    def _row(self, client: int, time: float) -> dict[str, Any]:
        account = self.clients[client]
        present = self._fleet.presence.until(client, time)
        return {
            "client": client,
            "device": self._fleet.names[client],
            **vars(account),
            # Sums of floats may come out a little below zero.
            "idle": max(0.0, present - account.computing - account.transfer),
            "away": time - present,
            "utilisation": account.computing / time if time else 0.0,
            "joules": self._joules(client, time),
            "room": self._fleet.profiles[client].memory_limit,
        }

    def _joules(self, client: int, time: float) -> float:
        """Return the energy that a device has drawn; NaN if its watts are unknown.

        It draws busy watts while it computes, idle watts while it is present besides, and none
        while it is away.
        """
        profile = self._fleet.profiles[client]
        busy = self.clients[client].computing
        if profile.busy is None or profile.idle is None:
            return math.nan
        idle = max(0.0, self._fleet.presence.until(client, time) - busy)
        return profile.busy * busy + profile.idle * idle

    # --- checkpoints

    def state(self) -> dict[str, Any]:
        """Return the accounts for a checkpoint."""
        # By column: a name for each number of thousands of clients would take more space.
        columns = {
            field.name: self._column(field.name) for field in fields(Account)
        }
        return {
            "communication": self._communication,
            "computing": self._computing,
            "accounts": columns,
        }

    def _column(self, name: str) -> list[float]:
        return [getattr(account, name) for account in self.clients]

    def restore(self, state: Mapping[str, Any], time: float) -> None:
        """Go back to an earlier :meth:`state`, of that moment."""
        self._communication = state["communication"]
        self._computing = state["computing"]
        self._charged = time
        columns = state["accounts"]
        rows = zip(*columns.values(), strict=True)
        self.clients = [
            Account(**dict(zip(columns, row, strict=True))) for row in rows
        ]
