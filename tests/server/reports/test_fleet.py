"""What a comparison says of fleets: time and its parts, energy, memory, and whose device was too
small."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedknow.protocols.config import read_config
from fedknow.server.reports.fleet import fleet_parts, has_room
from fedknow.server.reports.groups import group
from fedknow.server.reports.page import write_report
from fedknow.server.reports.summary import summarise
from fedknow.server.run.folder import RunFolder

MEMORY_LIMITS = {
    "infinite": math.inf,
    "board": 2.5e9,
    "pi": 1.5e9,
    "phone": 0.5e9,
}


def client(
    number: int, device: str, memory: float, out_of_memory: int = 0
) -> dict[str, Any]:
    numbers = {
        "computing": 1.0,
        "transfer": 2.0,
        "idle": 3.0,
        "joules": 5.0,
        "asked": 4,
        "answered": 4,
        "late": 0,
    }
    here = {
        "client": number,
        "device": device,
        "memory": memory,
        "out_of_memory": out_of_memory,
    }
    return {**numbers, **here, "lost": 0, "room": MEMORY_LIMITS[device]}


def run(
    path: Path, learner: str, memory: float, troubles: int = 0, seed: int = 0
) -> RunFolder:
    """100 virtual seconds, 60 of messages and 30 of computing; client 1 is too small ``troubles``
    times."""
    config = read_config(
        {
            "name": "made",
            "seed": seed,
            "data": {"tasks": 2, "clients": 2},
            "learner": learner,
        }
    )
    folder = RunFolder.create(path, config)
    folder.append({"event": "start", "time": 0.0, "clients": 2})
    for round in range(troubles):
        reason = (
            f"client 1, task 2, round {round + 1} (train): out of memory: pi has room "
            f"for 1,500 MB, 'train' needs"
        )
        fault = {
            "fault": "out_of_memory",
            "client": 1,
            "task": 1,
            "round": round + 1,
            "kind": "train",
            "tensor": "",
        }
        folder.append(
            {
                "event": "failure",
                "time": 1.0,
                **fault,
                "reason": f"{reason} {memory / 1e6:,.0f} MB",
            }
        )
    elapsed = {
        "virtual_seconds": 100.0,
        "communication_seconds": 60.0,
        "computing_seconds": 30.0,
    }
    folder.append(
        {
            "event": "round",
            "time": 2.0,
            "task": 1,
            "round": 1,
            "server_round": 2,
            "peak_memory_mb": 1.0,
        }
        | elapsed
        | {"energy_joules": 10.0}
    )
    clients = [client(0, "board", memory), client(1, "pi", memory, troubles)]
    folder.write_fleet({**elapsed, "energy_joules": 10.0, "clients": clients})
    folder.append({"event": "end", "time": 3.0, "seconds": 3.0})
    folder.close()
    return RunFolder.open(path)


def parts(
    *runs: RunFolder, memory_limits: Mapping[str, float] | None = MEMORY_LIMITS
) -> dict[str, Any]:
    sections = fleet_parts(group(map(summarise, runs)), memory_limits)
    return {section.heading: section.blocks[0] for section in sections}


def test_methods_side_by_side(tmp_path) -> None:
    tables = parts(
        run(tmp_path / "a", "fedavg", 68e6),
        run(tmp_path / "b", "gem", 2e9, troubles=3),
    )
    assert tables["On the fleet"].texts() == [
        [
            "fedavg",
            "1 min 40 s",
            "60%",
            "30%",
            "10%",
            "10.0 J",
            "0 of 2",
            "68.0 MB",
            "all 3",
        ],
        [
            "gem",
            "1 min 40 s",
            "60%",
            "30%",
            "10%",
            "10.0 J",
            "1 of 2",
            "2.0 GB",
            "board",
        ],
    ]
    assert tables["Out of memory"].texts() == [
        ["gem", "1", "2", "3", "pi has room for 1,500 MB, 'train' needs 2,000 MB"]
    ]


def test_seeds_are_told_apart_and_averaged(tmp_path) -> None:
    tables = parts(
        run(tmp_path / "a", "gem", 2e9, 1),
        run(tmp_path / "b", "gem", 1e9, 0, seed=1),
        memory_limits=None,
    )
    (row,) = tables["On the fleet"].texts()
    assert row[-3:] == ["0.5 of 2", "1.5 GB", "all 2"]  # of its own devices
    assert [row[0] for row in tables["Out of memory"].texts()] == ["gem, seed 0"]


def test_fleets_of_runs_that_did_not_tell_time_away_from_idle(tmp_path) -> None:
    fleet = summarise(run(tmp_path / "a", "gem", 1e9)).fleet
    assert fleet["waiting_seconds"] == 10.0
    assert [client["away"] for client in fleet["clients"]] == [0.0, 0.0]


def test_without_a_fleet_there_is_nothing_to_tell(tmp_path) -> None:
    config = read_config({"name": "made", "data": {"tasks": 2, "clients": 2}})
    RunFolder.create(tmp_path / "a", config).close()
    assert parts(RunFolder.open(tmp_path / "a")) == {}


@pytest.mark.parametrize(
    ("needed", "text"),
    [
        (0.4e9, "all 3"),
        (0.5e9, "all 3"),
        (1e9, "all but phone"),
        (2e9, "board"),
        (3e9, "none"),
    ],
)
def test_has_room(needed: float, text: str) -> None:
    assert has_room(needed, MEMORY_LIMITS) == text


def test_on_the_page(tmp_path) -> None:
    runs = [
        run(tmp_path / "a", "fedavg", 68e6),
        run(tmp_path / "b", "gem", 2e9, troubles=3),
    ]
    page = write_report(runs, tmp_path, memory_limits=MEMORY_LIMITS).read_text()
    assert all(
        text in page
        for text in (
            "On the fleet",
            "Devices with room for it",
            '<td class="prose">board</td>',
            "Out of memory",
        )
    )
    assert summarise(runs[1]).measures()["client_memory_bytes"] == 2e9
