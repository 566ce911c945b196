"""What methods came to on their fleet, as tables: time, energy, memory, and whose device was too small."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedknow.server.reports.groups import Group
from fedknow.server.reports.measures import duration, estimate, size
from fedknow.server.reports.summary import Summary

__all__ = ["Rows", "fleet_parts", "has_room", "side_by_side", "too_small"]


SPEEDS = (
    "Devices are as fast as their profiles say (fedknow list devices NAME), and those of different kinds are from "
    "different sources: ratios between kinds are rough."
)


@dataclass(frozen=True)
class Rows:
    """A table of text, and a sentence about it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    about: str = ""


def side_by_side(groups: Iterable[Group], rooms: Mapping[str, float]) -> Rows:
    """Method by method what its runs took on their fleet, and on which devices it has room; means over seeds.

    Parameters
    ----------
    groups : iterable of Group
        Those without a fleet are left out.
    rooms : mapping
        Bytes that training may take, by device.
    """
    rows = []
    for group in groups:
        runs = [run for run in group.runs if run.fleet]
        if not runs:
            continue

        def mean(key: str, runs: Sequence[Summary] = runs) -> float:
            return estimate(run.elapsed(key) for run in runs).mean

        total, messages, computing = map(mean, ("virtual_seconds", "communication_seconds", "computing_seconds"))
        failed = [sum(client["out_of_memory"] > 0 for client in run.clients) for run in runs]
        needed, joules = group.estimate("client_memory_bytes").mean, mean("energy_joules")
        rows.append(
            [
                group.label,
                duration(total),
                *(f"{part / total if total else 0.0:.0%}" for part in (messages, computing)),
                f"{max(0.0, total - messages - computing) / total if total else 0.0:.0%}",
                "unknown" if math.isnan(joules) else f"{joules / 1e3:,.1f} kJ",
                f"{sum(failed) / len(failed):.3g} of {len(runs[0].clients)}",
                size(needed),
                has_room(needed, rooms),
            ]
        )
    head = ["", "Virtual time", "of it messages", "computing", "waiting", "Energy"]
    return Rows(
        [*head, "Clients out of memory", "Memory needed", "Devices with room for it"],
        rows,
        "Time: until the last task ended, and what the server waited for: messages under way, clients that computed, "
        f"clients to come back, a deadline or the next task. {SPEEDS} Memory: the most that a client's training needed "
        "at once, in tensors; a device has room for what its system and PyTorch's libraries leave (of those that "
        "fedknow list devices shows).",
    )


def fleet_parts(
    groups: Sequence[Group], rooms: Mapping[str, float] | None = None, failed: Sequence[tuple[str, Summary]] = ()
) -> list[tuple[str, Rows]]:
    """Headings and tables about the fleets of some methods; none where there is nothing to tell.

    Parameters
    ----------
    groups : sequence of Group
        One a method.
    rooms : mapping, optional
        Bytes that training may take, by device; none: those of the devices that these runs have.
    failed : sequence of (str, Summary)
        Runs that did not end, by name: whose devices were too small there.
    """
    runs = [run for group in groups for run in group.runs]
    own = {client["device"]: client["room"] for run in runs for client in run.clients}
    several = len(runs) > len(groups)
    named = [
        (f"{group.label}, seed {run.config.seed}" if several else group.label, run)
        for group in groups
        for run in group.runs
    ]
    parts = [
        ("On the fleet", side_by_side(groups, own if rooms is None else rooms)),
        ("Out of memory", too_small([*named, *failed])),
    ]
    return [(heading, rows) for heading, rows in parts if rows.rows]


def has_room(needed: float, rooms: Mapping[str, float]) -> str:
    """Which of the devices have room for so many bytes, in the fewest words."""
    finite = {name: room for name, room in rooms.items() if room < math.inf}
    fit = [name for name, room in finite.items() if room >= needed]
    lack = [name for name in finite if name not in fit]
    if not lack:
        return f"all {len(fit)}"
    return f"all but {', '.join(lack)}" if len(lack) < len(fit) else ", ".join(fit) or "none"


def too_small(runs: Iterable[tuple[str, Summary]]) -> Rows:
    """Client by client of named runs, since when its device has not had the memory, and how much it lacked.

    Parameters
    ----------
    runs : iterable of (str, Summary)
        Whole or not: what is told are the failures on record.
    """
    rows = []
    for name, run in runs:
        first: dict[int, Mapping[str, str]] = {}
        times: dict[int, int] = {}
        for event in run.troubles:
            if event.get("fault") == "out_of_memory":
                first.setdefault(event["client"], event)
                times[event["client"]] = times.get(event["client"], 0) + 1
        rows += [
            [name, str(client), str(int(event["task"]) + 1), str(times[client]), _particulars(event["reason"])]
            for client, event in sorted(first.items())
        ]
    return Rows(
        ["", "Client", "Since task", "Times", "There was, and it needed"],
        rows,
        "Clients whose device lacked the memory: such work is lost, and the run goes on without it.",
    )


def _particulars(reason: str) -> str:
    return reason.partition("out of memory: ")[2] or reason
