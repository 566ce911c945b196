"""Tables of a fleet: time, energy, memory, devices that were too small."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
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

__all__ = [
    "clients_by_device",
    "fleet_of_run",
    "fleet_parts",
    "has_room",
    "side_by_side",
    "too_small",
]

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


def side_by_side(
    groups: Iterable[Group], memory_limits: Mapping[str, float]
) -> Table:
    """Compare the time, energy and memory of methods on their fleet.

    Parameters
    ----------
    groups : iterable of Group
        Those without a fleet are left out; numbers are means over seeds.
    memory_limits : mapping
        Bytes that training may take, by device.
    """
    # A comparison may hold runs without a fleet, which have no time to compare.
    compared = [group for group in groups if _fleet_runs(group)]
    return Table(
        "Time, energy and memory on the fleet",
        COMPARED,
        [_compared(group, memory_limits) for group in compared],
        "Time: until the last task ended, and what the server waited for: messages under way, "
        "clients that computed, clients to come back, a deadline or the next task. "
        f"{SPEEDS} Memory: the most that a client's training needed at once, in tensors. A device "
        "has room for what its system and PyTorch's libraries leave (of those that fedknow list "
        "devices shows).",
        prose=(len(COMPARED) - 1,),
    )


def _fleet_runs(group: Group) -> list[Summary]:
    return [run for run in group.runs if run.fleet]


def _compared(
    group: Group, memory_limits: Mapping[str, float]
) -> list[Cell | str]:
    runs = _fleet_runs(group)

    def over_seeds(key: str) -> Estimate:
        return estimate(run.elapsed(key) for run in runs)

    total = over_seeds("virtual_seconds").mean
    messages = over_seeds("communication_seconds").mean
    computing = over_seeds("computing_seconds").mean
    # Means of runs need not add up to the last digit.
    waiting = max(0.0, total - messages - computing)
    shares = [
        part / total if total else 0.0 for part in (messages, computing, waiting)
    ]
    # Clients and not events: one that fails in each round fails once.
    failures = sum(map(_out_of_memory, runs)) / len(runs)
    memory = group.estimate("client_memory_bytes").mean
    return [
        group.label,
        Cell(duration(total), total),
        *(Cell(f"{share:.0%}", share) for share in shares),
        _energy(over_seeds("energy_joules")),
        Cell(f"{failures:.3g} of {len(runs[0].clients)}", failures),
        Cell(size(memory), memory),
        has_room(memory, memory_limits),
    ]


def _out_of_memory(run: Summary) -> int:
    """Count the clients that lacked memory at least once."""
    return sum(client["out_of_memory"] > 0 for client in run.clients)


def _energy(joules: Estimate) -> Cell:
    # Not every profile has a power; without one the sum is not known.
    return Cell(energy(joules.mean) if joules.count else "unknown", joules.mean)


def fleet_parts(
    groups: Sequence[Group],
    memory_limits: Mapping[str, float] | None = None,
    failed: Sequence[tuple[str, Summary]] = (),
    title: str = "",
) -> list[Section]:
    """Give sections about the fleets of some methods, as far as they have any.

    Parameters
    ----------
    groups : sequence of Group
        One a method.
    memory_limits : mapping, optional
        Bytes that training may take, by device; none: those of the devices that these runs have.
    failed : sequence of (str, Summary)
        Runs that did not end, by name. Their clients whose devices were too small are listed.
    title : str
        Put before the captions, to tell the tables of several comparisons apart.
    """
    # Without the catalogue of devices, those of the runs say what there is.
    if memory_limits is None:
        memory_limits = _limits_of(groups)
    tables = {
        "On the fleet": side_by_side(groups, memory_limits),
        "Out of memory": too_small([*_named_runs(groups), *failed]),
    }
    return [
        Section(heading, [replace(table, caption=f"{title}{table.caption}")])
        for heading, table in tables.items()
        if table.rows
    ]


def _limits_of(groups: Iterable[Group]) -> dict[str, float]:
    """Collect the bytes that training may take on the runs' own devices."""
    memory_limits = {}
    for run in chain.from_iterable(group.runs for group in groups):
        for client in run.clients:
            memory_limits[client["device"]] = client["room"]
    return memory_limits


def _named_runs(groups: Sequence[Group]) -> list[tuple[str, Summary]]:
    """Name runs by their method, and by their seed where a method has several."""
    # With one seed each the number would only be noise.
    has_seeds = any(len(group.runs) > 1 for group in groups)
    named = []
    for group in groups:
        for run in group.runs:
            seed = f", seed {run.config.seed}" if has_seeds else ""
            named.append((f"{group.label}{seed}", run))
    return named


def has_room(memory: float, memory_limits: Mapping[str, float]) -> str:
    """Name the devices that have room for so many bytes, in the fewest words."""
    # A device without a limit has room for anything and says nothing about a method.
    finite = {
        name: limit for name, limit in memory_limits.items() if limit < math.inf
    }
    large = [name for name, limit in finite.items() if limit >= memory]
    small = [name for name in finite if name not in large]
    if not small:
        return f"all {len(large)}"
    # Whichever list is shorter is named, as a report has dozens of devices.
    if len(small) < len(large):
        return f"all but {', '.join(small)}"
    return ", ".join(large) or "none"


def too_small(runs: Iterable[tuple[str, Summary]]) -> Table:
    """List the clients of named runs whose device lacked memory.

    Parameters
    ----------
    runs : iterable of (str, Summary)
        Complete or not: failures on record count.
    """
    rows: list[list[str]] = []
    for name, run in runs:
        failures: dict[int, list[Mapping[str, Any]]] = {}
        for event in run.troubles:
            if event.get("fault") == "out_of_memory":
                failures.setdefault(event["client"], []).append(event)
        for client, events in sorted(failures.items()):
            # Users count tasks from 1.
            since = str(int(events[0]["task"]) + 1)
            reason = _particulars(events[0]["reason"])
            rows.append([name, str(client), since, str(len(events)), reason])
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
    kinds = clients_by_device(run)
    total = run.fleet["virtual_seconds"]
    devices = [
        _device_row(f"{name} ({len(clients)})", clients, total)
        for name, clients in kinds.items()
    ]
    # By work and messages, as idle time only says that others were slower.
    slowest = sorted(run.clients, key=_busy_seconds, reverse=True)
    clients = [
        _device_row(f"{client['client']}: {client['device']}", [client], total)
        for client in slowest[:SLOWEST]
    ]
    return [
        Text(_where_time_went(run)),
        Table("Devices by kind", ["Device", *DEVICE_COLUMNS], devices),
        Table("The slowest clients", ["Client", *DEVICE_COLUMNS], clients),
    ]


def clients_by_device(run: Summary) -> dict[str, list[Mapping[str, Any]]]:
    """Group the accounts of clients by the kind of their device."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for client in run.clients:
        kinds.setdefault(client["device"], []).append(client)
    return kinds


def _busy_seconds(client: Mapping[str, Any]) -> float:
    return float(client["computing"] + client["transfer"])


def _where_time_went(run: Summary) -> str:
    fleet = run.fleet
    computing = duration(fleet["computing_seconds"])
    messages = duration(fleet["communication_seconds"])
    waiting = duration(fleet["waiting_seconds"])
    return (
        f"{duration(fleet['virtual_seconds'])} of virtual time passed until the last task "
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

    def add_up(key: str) -> Any:
        return sum(client[key] for client in clients)

    times = [add_up(key) / len(clients) for key in TIMES]
    shares = [time / total if total else 0.0 for time in times]
    # The most and not the mean: the largest need decides whether a device will do.
    memory = max(client["memory"] for client in clients)
    # A device whose profile has no power figures makes the sum unknown.
    is_known = all(client["joules"] is not None for client in clients)
    joules = float(add_up("joules")) if is_known else math.nan
    return [
        name,
        *(Cell(percent.text(share), share) for share in shares),
        Cell(size(memory), memory),
        *(f"{add_up(key):,}" for key in COUNTS),
        Cell("unknown" if math.isnan(joules) else energy(joules), joules),
    ]
