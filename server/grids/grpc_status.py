"""How a run with real clients stands, for people and their tools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedknow.protocols.messages import client_of
from fedknow.server.grids.grpc_assignments import Assignments
from fedknow.server.grids.grpc_gate import Gate

__all__ = ["describe_run"]


def describe_run(
    assignments: Assignments,
    gate: Gate,
    run: str,
    refusals: Mapping[str, int],
) -> dict[str, Any]:
    """Describe a run's state.

    Parameters
    ----------
    assignments : Assignments
        The clients, and their work.
    gate : Gate
        Lets clients in.
    run : str
        The run's id.
    refusals : mapping
        Refused streams and answers, by code.

    Returns
    -------
    dict
        ``run``; ``seconds`` since the start; ``work``: task, round and kind of the work
        under way; ``clients``: how many belong to the experiment; ``connected``;
        ``waiting_for``: clients that have work; ``bytes_in`` and ``bytes_out`` of messages,
        so far; ``refusals``: by code; ``dropped``: answers by why (``duplicate``: answered
        before; ``late``: of no work that is going on); ``left_out``: pieces of work given
        up at a deadline; ``ejected``: clients that the operator took out; ``doors``: calls
        that were turned away before they said hello
        (:class:`~fedknow.server.grids.grpc_doors.Doors`); ``refused``: answers that could be
        read but not used (NaN, other shapes, absurd norms); ``each``: by client ``connected``,
        ``since`` (seconds since 1970), ``joined`` (times), ``bytes_in`` and ``bytes_out``.
    """
    counts = assignments.counts
    roster = assignments.roster
    peers = list(roster.peers.values())
    busy = [peer for peer in peers if peer.work is not None]
    joined = [peer for peer in peers if peer.joined]
    return {
        "run": run,
        "work": assignments.progress,
        "clients": len(peers),
        "connected": len(roster.connected()),
        "waiting_for": [client_of(peer.node) for peer in busy],
        "bytes_in": sum(peer.received for peer in peers),
        "bytes_out": sum(peer.sent for peer in peers),
        "refusals": dict(refusals),
        "dropped": {kind: counts[kind] for kind in ("duplicate", "late")},
        "left_out": counts["left_out"],
        "ejected": sorted(gate.membership.ejected),
        "doors": dict(gate.doors.counts),
        "refused": counts["refused"],
        "each": {str(client_of(peer.node)): peer.describe() for peer in joined},
    }
