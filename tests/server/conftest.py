"""Runs as they lie on disk, made without training."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedknow.protocols.config import read_config
from fedknow.server.run.evaluation import Scores
from fedknow.server.run.folder import RunFolder

TASKS, ROUNDS, CLIENTS = 3, 2, 2
TRAFFIC = {
    "train": {"down": 3_000_000, "up": 2_000_000, "messages": 12},
    "train.end_task": {"down": 500_000, "up": 0, "messages": 6},
    "evaluate": {"down": 7_000_000, "up": 10, "messages": 6},
}


def recorded_run(
    path: Path,
    tree: Mapping[str, Any] | None = None,
    done: int = TASKS,
    lost: float = 0.1,
    shared: bool = True,
    hours: float | None = None,
) -> RunFolder:
    """A run in which 90 of 100 test samples are right when learned, and a task loses ``lost`` with
    each later one."""
    config = read_config(
        {
            "name": "made",
            "data": {"tasks": TASKS, "clients": CLIENTS},
            "train": {"rounds": ROUNDS},
            **(tree or {}),
        }
    )
    run = RunFolder.create(path, config)
    scores = Scores(CLIENTS, TASKS)
    time = 1e9
    versions = {"python": "3.99", "torch": "9.9"}
    start = {
        "clients": CLIENTS,
        "travelling": 60_000,
        "partition": "abc",
        "versions": versions,
    }
    run.append({"event": "start", "time": time, **start})
    for task in range(done):
        for round in range(1, ROUNDS + 1):
            time += 10
            run.append(
                {
                    "event": "round", "time": time, "task": task, "round": round,
                    "server_round": task * ROUNDS + round, "clients": CLIENTS, "loss": 0.5,
                    "accuracy": 0.5,
                    "seconds": 9.0, "traffic": TRAFFIC, "peak_memory_mb": 300.0 + task,
                    "failures": 0,
                }
            )  # fmt: skip
        right = np.full((CLIENTS, TASKS), np.nan)
        right[:, : task + 1] = 100 * (0.9 - lost * np.arange(task, -1, -1))
        nothing = np.full((CLIENTS, TASKS), np.nan)
        total = np.where(np.isnan(right), np.nan, 100.0)
        scores.add_task(
            task,
            {"personal": right, "global": right / 2 if shared else nothing},
            total,
        )
        event = {
            "event": "evaluation",
            "time": time,
            "task": task,
            "round": ROUNDS,
            "accuracy": 0.9,
        }
        if hours is not None:  # of virtual time a task
            elapsed = 3600 * hours * (task + 1)
            event |= {
                "virtual_seconds": elapsed,
                "computing_seconds": elapsed / 2,
            }
        run.append(event | {"seconds": 0.1})
    run.write_accuracy(scores.arrays())
    run.append(
        {"event": "end", "time": time, "seconds": 61.0}
        if done == TASKS
        else {"event": "interrupted", "time": time}
    )
    run.close()
    return RunFolder.open(path)


@pytest.fixture(scope="session")
def make_run() -> Callable[..., RunFolder]:
    return recorded_run
