"""Tables of a fleet: time, energy, memory, and clients whose device was too small."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedknow.server.reports.blocks import Block, Cell, Section, Table, Text
from fedknow.server.reports.groups import Group
from fedknow.server.reports.measures import (
    Estimate,
    duration,
    energy,
    estimate,
    measure_named,
    size,
)
from fedknow.server.reports.summary import Summary

__all__ = ["fleet_of_run", "fleet_parts", "has_room", "side_by_side", "too_small"]

SPEEDS = (
    "Devices are as fast as their profiles say (fedknow list devices NAME). Profiles of different "
    "kinds come from different sources, so ratios between kinds are rough."
)
SLOWEST = 10
"""Clients that the report of a fleet names."""
COUNTS = ("asked", "answered", "late", "lost", "out_of_memory")
TIMES = ("computing", "transfer", "idle", "away")
COMPARED = (
    "Method",
    "Virtual time",
    "of it messages",
    "computing",
    "waiting",
    "Energy",
    "Clients out of memory",
    "Memory needed",
    "Devices with room for it",
)
DEVICE_COLUMNS = (
    "computing",
    "messages",
    "idle",
    "away",
    "memory needed",
    *(key.replace("_", " ") for key in COUNTS),
    "energy",
)


def side_by_side(groups: Iterable[Group], rooms: Mapping[str, float]) -> Table:
    """Compare what methods took on their fleet, and on which devices they have room.

    Parameters
    ----------
    groups : iterable of Group
        Those without a fleet are left out; numbers are means over seeds.
    rooms : mapping
        Bytes that training may take, by device.
    """
    compared = [group for group in groups if any(run.fleet for run in group.runs)]
    return Table(
        "Time, energy and memory on the fleet",
        COMPARED,
        [_compared(group, rooms) for group in compared],
        "Time: until the last task ended, and what the server waited for: messages under way, "
        "clients that computed, clients to come back, a deadline or the next task. "
        f"{SPEEDS} Memory: the most that a client's training needed at once, in tensors. A device "
        "has room for what its system and PyTorch's libraries leave (of those that fedknow list "
        "devices shows).",
        prose=(len(COMPARED) - 1,),
    )


def _compared(group: Group, rooms: Mapping[str, float]) -> list[Cell | str]:
    runs = [run for run in group.runs if run.fleet]
    means = {
        key: estimate(run.elapsed(key) for run in runs).mean
        for key in ("virtual_seconds", "communication_seconds", "computing_seconds")
    }
    total, messages, computing = means.values()
    waiting = max(0.0, total - messages - computing)
    shares = [part / total if total else 0.0 for part in (messages, computing, waiting)]
    failed = [
        sum(client["out_of_memory"] > 0 for client in run.clients) for run in runs
    ]
    lacking = sum(failed) / len(failed)
    needed = group.estimate("client_memory_bytes").mean
    return [
        group.label,
        Cell(duration(total), total),
        *(Cell(f"{share:.0%}", share) for share in shares),
        _energy(estimate(run.elapsed("energy_joules") for run in runs)),
        Cell(f"{lacking:.3g} of {len(runs[0].clients)}", lacking),
        Cell(size(needed), needed),
        has_room(needed, rooms),
    ]


def _energy(joules: Estimate) -> Cell:
    return Cell(energy(joules.mean) if joules.count else "unknown", joules.mean)


def fleet_parts(
    groups: Sequence[Group],
    rooms: Mapping[str, float] | None = None,
    failed: Sequence[tuple[str, Summary]] = (),
    title: str = "",
) -> list[Section]:
    """Give sections about the fleets of some methods; none where there is nothing to tell.

    Parameters
    ----------
    groups : sequence of Group
        One a method.
    rooms : mapping, optional
        Bytes that training may take, by device; none: those of the devices that these runs have.
    failed : sequence of (str, Summary)
        Runs that did not end, by name: whose devices were too small there.
    title : str
        Put before the captions, to tell the tables of several comparisons apart.
    """
    runs = [run for group in groups for run in group.runs]
    own = {client["device"]: client["room"] for run in runs for client in run.clients}
    several = len(runs) > len(groups)
    named = [
        (f"{group.label}, seed {run.config.seed}" if several else group.label, run)
        for group in groups
        for run in group.runs
    ]
    tables = {
        "On the fleet": side_by_side(groups, own if rooms is None else rooms),
        "Out of memory": too_small([*named, *failed]),
    }
    return [
        Section(heading, [replace(table, caption=f"{title}{table.caption}")])
        for heading, table in tables.items()
        if table.rows
    ]


def has_room(needed: float, rooms: Mapping[str, float]) -> str:
    """Which of the devices have room for so many bytes, in the fewest words."""
    finite = {name: room for name, room in rooms.items() if room < math.inf}
    fit = [name for name, room in finite.items() if room >= needed]
    lack = [name for name in finite if name not in fit]
    if not lack:
        return f"all {len(fit)}"
    return (
        f"all but {', '.join(lack)}"
        if len(lack) < len(fit)
        else ", ".join(fit) or "none"
    )


def too_small(runs: Iterable[tuple[str, Summary]]) -> Table:
    """List the clients of named runs whose device lacked memory, since when, and how much.

    Parameters
    ----------
    runs : iterable of (str, Summary)
        Whole or not: failures on record are what counts.
    """
    rows: list[list[str]] = []
    for name, run in runs:
        first: dict[int, Mapping[str, str]] = {}
        times: dict[int, int] = {}
        for event in run.troubles:
            if event.get("fault") == "out_of_memory":
                first.setdefault(event["client"], event)
                times[event["client"]] = times.get(event["client"], 0) + 1
        for client, event in sorted(first.items()):
            since = str(int(event["task"]) + 1)
            reason = _particulars(event["reason"])
            rows.append([name, str(client), since, str(times[client]), reason])
    return Table(
        "Clients whose device lacked memory",
        ["Method", "Client", "Since task", "Times", "There was, and it needed"],
        rows,
        "Such work is lost, and the run goes on without it.",
        prose=(4,),
    )


def _particulars(reason: str) -> str:
    return reason.partition("out of memory: ")[2] or reason


def fleet_of_run(run: Summary) -> list[Block]:
    """Show a run's fleet device by device, and its slowest clients."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for client in run.clients:
        kinds.setdefault(client["device"], []).append(client)
    total = run.fleet["virtual_seconds"]
    devices = [
        _device_row(f"{name} ({len(clients)})", clients, total)
        for name, clients in kinds.items()
    ]
    slowest = sorted(
        run.clients, key=lambda each: -(each["computing"] + each["transfer"])
    )
    clients = [
        _device_row(f"{client['client']}: {client['device']}", [client], total)
        for client in slowest[:SLOWEST]
    ]
    return [
        Text(_where_time_went(run)),
        Table("Devices by kind", ["Device", *DEVICE_COLUMNS], devices),
        Table("The slowest clients", ["Client", *DEVICE_COLUMNS], clients),
    ]


def _where_time_went(run: Summary) -> str:
    computing, messages, waiting = (
        duration(run.fleet[f"{key}_seconds"])
        for key in ("computing", "communication", "waiting")
    )
    return (
        f"{duration(run.fleet['virtual_seconds'])} of virtual time passed until the last task "
        f"ended. In it the server waited {computing} for clients that computed, {messages} for "
        f"messages under way and {waiting} for clients that were away, a deadline or the next "
        "task. Computing, messages and idle are what devices did while they were there, as shares "
        "of all the time. Away, they draw no energy that is counted. Work that was given up counts "
        f"as far as it had come. {SPEEDS}"
    )


def _device_row(
    name: str, clients: Sequence[Mapping[str, Any]], total: float
) -> list[Cell | str]:
    percent = measure_named("accuracy")
    times = [sum(client[key] for client in clients) / len(clients) for key in TIMES]
    shares = [time / total if total else 0.0 for time in times]
    needed = max(client["memory"] for client in clients)
    joules = [client["joules"] for client in clients]
    spent = math.nan if None in joules else float(sum(joules))
    return [
        name,
        *(Cell(percent.text(share), share) for share in shares),
        Cell(size(needed), needed),
        *(f"{sum(client[key] for client in clients):,}" for key in COUNTS),
        Cell("unknown" if math.isnan(spent) else energy(spent), spent),
    ]
