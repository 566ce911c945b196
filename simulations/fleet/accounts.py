"""Accounts of a fleet: how each device and the server spent their virtual time."""

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

    Times are in seconds, ``down`` and ``up`` in bytes; the others count pieces of work. The names
    are those of ``fleet.json`` and of checkpoints.
    """

    computing: float = 0.0
    transfer: float = 0.0
    flops: float = 0.0
    """Operations, as far as work got."""
    down: float = 0.0
    up: float = 0.0
    memory: float = 0.0
    """The most bytes that its work needed at once."""
    asked: int = 0
    answered: int = 0
    late: int = 0
    """Given up because of the deadline, or because enough others came before."""
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
            What became of its job.
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
        seconds_present = partial(self._fleet.presence.between, timing.job.client)
        computing = seconds_present(timing.received, timing.computed)
        account.computing += computing
        account.transfer += seconds_present(
            timing.began, timing.received
        ) + seconds_present(timing.computed, timing.arrived)
        is_computed = timing.computed < timing.ended or timing.complete
        account.flops += (
            flops
            if is_computed
            # Given up half-way: as much as was computed. A job of no seconds has no part.
            else flops * computing / (timing.job.seconds or math.inf)
        )
        if timing.job.lost:
            account.lost += 1
        elif not timing.complete:
            account.late += 1
        else:
            account.up += timing.job.up
            account.answered += not is_failure
            return True
        return False

    # --- the server's time

    @property
    def charged(self) -> float:
        """The moment up to which the server's time is charged."""
        return self._charged

    def charge(self, until: float, communication: float, computing: float) -> None:
        """Charge the server's time up to a moment to the work that it waited for."""
        self._charged = until
        self._communication += communication
        self._computing += computing

    # --- reports

    def elapsed(self, now: float) -> dict[str, float]:
        """Return virtual time so far, and its parts.

        See :class:`fedknow.server.run.events.VirtualTime`.
        Time that was neither communication nor computing was waiting.
        """
        clients = range(len(self.clients))
        waiting = now - self._communication - self._computing
        return {
            "virtual_seconds": now,
            "communication_seconds": self._communication,
            "computing_seconds": self._computing,
            # Sums of floats may come out a little below zero.
            "waiting_seconds": max(0.0, waiting),
            "energy_joules": sum(self._joules(client, now) for client in clients),
        }

    def report(self, now: float) -> dict[str, Any]:
        """Return what each device did, for ``fleet.json``."""
        rows = [self._row(client, now) for client in range(len(self.clients))]
        return self.elapsed(now) | {"clients": rows}

    def _row(self, client: int, now: float) -> dict[str, Any]:
        account = self.clients[client]
        present = self._fleet.presence.until(client, now)
        return (
            {"client": client, "device": self._fleet.names[client]}
            | vars(account)
            | {
                "idle": max(0.0, present - account.computing - account.transfer),
                "away": now - present,
                "utilisation": account.computing / now if now else 0.0,
                "joules": self._joules(client, now),
                "room": self._fleet.profiles[client].room,
            }
        )

    def _joules(self, client: int, now: float) -> float:
        """Return the energy that a device has drawn; NaN where its watts are not known.

        It draws busy watts while it computes, idle watts while it is present besides, and none
        while it is away.
        """
        profile = self._fleet.profiles[client]
        busy = self.clients[client].computing
        if profile.busy is None or profile.idle is None:
            return math.nan
        idle = max(0.0, self._fleet.presence.until(client, now) - busy)
        return profile.busy * busy + profile.idle * idle

    # --- checkpoints

    def state(self) -> dict[str, Any]:
        """Return the accounts for a checkpoint."""
        columns = {
            field.name: [getattr(account, field.name) for account in self.clients]
            for field in fields(Account)
        }
        return {
            "communication": self._communication,
            "computing": self._computing,
            "accounts": columns,
        }

    def restore(self, state: Mapping[str, Any], now: float) -> None:
        """Go back to what :meth:`state` gave at that moment."""
        self._communication = state["communication"]
        self._computing = state["computing"]
        self._charged = now
        columns = state["accounts"]
        self.clients = [
            Account(**{name: columns[name][client] for name in columns})
            for client in range(len(self.clients))
        ]
