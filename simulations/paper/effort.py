"""Hours of communication and of virtual time, as they are and at the paper's training."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from fedknow.server.reports.groups import Group
from fedknow.server.reports.summary import Array, Summary
from fedknow.simulations.paper.protocol import Variant

__all__ = ["communication_hours", "mean", "virtual_hours"]


def communication_hours(
    group: Group, rate: float, as_in: Variant | None = None
) -> float:
    """Compute how long training keeps the mean client's link busy at ``rate`` kB/s, in hours.

    With ``as_in`` it is for as many rounds and tasks as the paper's. Further rounds bring what
    rounds bring on average. Beside the model they bring what the last round of each task brought,
    as some of that goes to a client once a task.
    """
    return mean(_run_hours(run, rate, as_in) for run in group.runs)


def _run_hours(run: Summary, rate: float, as_in: Variant | None) -> float:
    sent = float(run.bytes_of("train"))
    if as_in is not None:
        ours, papers = as_in.scaled["train.rounds"]
        extra, last = _extra(run)
        usual = (sent - run.bytes_of("train.end_task") - extra) / ours
        tasks = as_in.paper.data.tasks / run.config.data.tasks
        sent = (sent + (papers - ours) * (usual + last)) * tasks
    return sent / run.config.data.clients / (1000 * rate) / 3600


def _extra(run: Summary) -> tuple[float, float]:
    """Count bytes beside the model in all rounds, and in the last round of each task."""
    counts = [
        event["traffic"].get("train.extra", {"down": 0, "up": 0})
        for event in run.rounds
    ]
    totals = [float(count["down"] + count["up"]) for count in counts]
    steps = np.diff(totals, prepend=0.0)
    last = {event["task"]: step for event, step in zip(run.rounds, steps, strict=True)}
    return float(steps.sum()), float(sum(last.values()))


def virtual_hours(run: Summary, as_in: Variant | None = None) -> Array:
    """Compute the virtual hours of each task, float64 [tasks]; one NaN without a fleet.

    With ``as_in`` it is for as many rounds and epochs as the paper's. What is done when a task is
    over is done once, however many rounds it has.
    """
    ends = {
        event["task"]: event for event in run.evaluations if "virtual_seconds" in event
    }
    if not ends:
        return np.array([math.nan])
    last = {event["task"]: event for event in run.rounds}
    moments = [
        event for task, end in ends.items() for event in (last.get(task, end), end)
    ]
    passed = [
        [event["virtual_seconds"], event["computing_seconds"]] for event in moments
    ]
    # [tasks, training or end of the task, all or computing] to [all or computing, part, task]
    spent = np.diff(np.array(passed) / 3600, axis=0, prepend=0.0).reshape(
        len(ends), 2, 2
    )
    total, computing = spent.transpose(2, 1, 0)
    rounds = epochs = 1.0
    if as_in is not None:
        rounds, epochs = (
            papers / ours
            for ours, papers in (
                as_in.scaled["train.rounds"],
                as_in.scaled["train.epochs"],
            )
        )
    training = rounds * (total[0] - computing[0] + epochs * computing[0])
    return np.asarray(training + total[1])


def mean(values: Iterable[float]) -> float:
    """Average numbers."""
    return float(np.mean(list(values)))
