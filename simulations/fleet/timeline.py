"""The timeline of a fleet: work under way in virtual time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedknow.protocols.config import FleetConfig
from fedknow.protocols.messages import Message, client_of
from fedknow.protocols.texts import counted
from fedknow.server.checks.faults import RunError
from fedknow.simulations.fleet.accounts import Accounts
from fedknow.simulations.fleet.availability import Always
from fedknow.simulations.fleet.build import Fleet
from fedknow.simulations.fleet.clock import Clock, Timing
from fedknow.simulations.fleet.pieces import (
    FleetWave,
    Piece,
    can_fail,
    draw_chances,
    make_piece,
)

__all__ = ["Timeline"]

CHANGES_OF_PRESENCE = 100_000
"""Changes of presence for which the server waits for enough clients at once."""


class Timeline:
    """Pieces of work under way on the devices of a fleet.

    Parameters
    ----------
    fleet : Fleet
    settings : FleetConfig
    seed : int

    Attributes
    ----------
    clock : Clock
    accounts : Accounts
    waves : int
        Waves so far. Their numbers seed their chances.
    """

    def __init__(self, fleet: Fleet, settings: FleetConfig, seed: int) -> None:
        self.clock = Clock(fleet.links, fleet.presence)
        self.accounts = Accounts(fleet)
        self.waves = 0
        self._fleet = fleet
        self._settings = settings
        self._seed = seed
        self._at_work: dict[str, Piece] = {}

    # --- pieces of work

    def open_wave(
        self,
        work: Sequence[Message],
        timeout: float | None,
        is_sparse: bool,
    ) -> FleetWave:
        """Begin a wave at this moment, and draw its chances.

        Parameters
        ----------
        work : sequence of Message
        timeout : float or None
            Virtual seconds; ``fleet.deadline`` counts too.
        is_sparse : bool
            Whether arrays travel without their zeros.
        """
        self.waves += 1
        clients = len(self._fleet.profiles)
        chances = draw_chances(self._settings, clients, self._seed, self.waves)
        return FleetWave(self._due(work, timeout), chances, is_sparse)

    def _due(self, work: Sequence[Message], timeout: float | None) -> float:
        """Return until when answers to a wave count."""
        # No deadline where the run cannot do without an answer.
        deadline = self._settings.deadline if all(map(can_fail, work)) else 0.0
        seconds = min(
            deadline or math.inf, math.inf if timeout is None else timeout
        )
        return self.clock.time + seconds

    def make_piece(
        self,
        message: Message,
        answer: tuple[Message, int],
        wave: FleetWave,
    ) -> Piece:
        """Make a piece of work of a message and its answer."""
        account = self.accounts.clients[client_of(message.node)]
        return make_piece(self._fleet, account, wave, message, answer)

    def give(self, piece: Piece) -> None:
        """Give a piece out, now."""
        self._at_work[piece.job.id] = piece
        self.clock.give(piece.job)

    def close(self, timing: Timing) -> tuple[Piece, bool]:
        """Book the end of a piece of work.

        Returns
        -------
        Piece
        bool
            Whether its answer came.
        """
        piece = self._at_work.pop(timing.job.id)
        is_failure = piece.reply.failure is not None
        return piece, self.accounts.book(timing, piece.flops, is_failure)

    def drop(self, ids: Iterable[str]) -> None:
        """Give pieces up, now."""
        # Sorted: the clock depends on the order in which work is given up.
        for timing in self.clock.drop(sorted(ids)):
            self.close(timing)

    def charge(self, timing: Timing) -> None:
        """Charge the time since the last such moment.

        It went into the work whose end the server waited for.
        """
        shares = self.clock.shares(timing, self.accounts.charged)
        self.accounts.charge(self.clock.time, *shares)

    # --- presence

    def present(self) -> Sequence[int]:
        """Return the clients that are present now, ascending."""
        presence = self._fleet.presence
        clients = range(len(self._fleet.profiles))
        # With thousands of clients, asking each of them takes time.
        if isinstance(presence, Always):
            return clients
        time = self.clock.time
        return [client for client in clients if presence.is_present(client, time)]

    def gather(self, quorum: int, until: float) -> None:
        """Let time pass until enough clients are present, or are at work.

        Parameters
        ----------
        quorum : int
            Number of clients that are enough.
        until : float
            The moment at which to stop.

        Raises
        ------
        RunError
            If there never seem to be enough at once.
        """
        # Bounded, as a trace may never have that many clients at once.
        for _ in range(CHANGES_OF_PRESENCE):
            present = self.present()
            if len(present) >= quorum or self.clock.time >= until:
                return
            # Clients at work answer, and their answers let the clock go on.
            if not self.clock.is_idle:
                return
            self._wait_for_return(present, until)
        hours = self.clock.time / 3600
        raise RunError(
            f"fleet.availability: {counted(quorum, 'client')} wanted at once, which never were "
            f"there in {hours:.1f} h of virtual time"
        )

    def _wait_for_return(self, present: Iterable[int], until: float) -> None:
        """Let time pass until an absent client is back."""
        presence = self._fleet.presence
        time = self.clock.time
        absent = set(range(len(self._fleet.profiles))) - set(present)
        returns = [presence.completion(client, time, 0.0) for client in absent]
        self.clock.wait(min(until, *returns))

    # --- checkpoints

    def state(self) -> dict[str, Any]:
        """Return the clock and the accounts for a checkpoint.

        Work under way is not in it, as there is none between rounds.
        """
        return {
            "now": self.clock.time,
            "waves": self.waves,
            **self.accounts.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to an earlier :meth:`state`."""
        self.clock = Clock(self._fleet.links, self._fleet.presence, state["now"])
        self.waves = state["waves"]
        self.accounts.restore(state, self.clock.time)
