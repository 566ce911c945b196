"""Hours of communication and of virtual time."""

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
    """Compute how long training keeps the mean client's link busy.

    Further rounds of the paper bring the average bytes of a round. Besides, they bring the
    bytes beside the model of the last round of each task, as some of these go to a client once
    a task.

    Parameters
    ----------
    group : Group
        The runs of one method.
    rate : float
        The link's, in kB/s.
    as_in : Variant, optional
        Compute it for as many rounds and tasks as the paper's.

    Returns
    -------
    float
        Hours, the mean over seeds.
    """
    return mean(_run_hours(run, rate, as_in) for run in group.runs)


def _run_hours(run: Summary, rate: float, as_in: Variant | None) -> float:
    traffic = float(run.bytes_of("train"))
    if as_in is not None:
        rounds = as_in.scaled["train.rounds"]
        extra, last_extra = _extra_bytes(run)
        # A round's bytes, without those that are sent once a task.
        usual = traffic - run.bytes_of("train.end_task") - extra
        usual /= rounds.measured
        missing_rounds = rounds.published - rounds.measured
        tasks = as_in.paper.data.tasks / run.config.data.tasks
        traffic = (traffic + missing_rounds * (usual + last_extra)) * tasks
    return traffic / run.config.data.clients / (1000 * rate) / 3600


def _extra_bytes(run: Summary) -> tuple[float, float]:
    """Count bytes beside the model: in all rounds, and in last rounds."""
    totals = []
    for event in run.rounds:
        count = event["traffic"].get("train.extra", {"down": 0, "up": 0})
        totals.append(float(count["down"] + count["up"]))
    # Events count from the beginning of the run.
    steps = np.diff(totals, prepend=0.0)
    # Later rounds of a task replace earlier ones.
    last_steps = {
        event["task"]: step for event, step in zip(run.rounds, steps, strict=True)
    }
    return float(steps.sum()), float(sum(last_steps.values()))


def virtual_hours(run: Summary, as_in: Variant | None = None) -> Array:
    """Compute the virtual hours of each task.

    Parameters
    ----------
    run : Summary
    as_in : Variant, optional
        Compute it for as many rounds and epochs as the paper's. Work at the end of a task is
        done once, however many rounds the task has.

    Returns
    -------
    float64 [tasks]
        One NaN without a fleet.
    """
    ends = {
        event["task"]: event
        for event in run.evaluations
        if "virtual_seconds" in event
    }
    if not ends:
        return np.array([math.nan])
    last_rounds = {event["task"]: event for event in run.rounds}
    seconds = []
    for task, end in ends.items():
        for event in (last_rounds.get(task, end), end):
            seconds.append(
                [
                    event["virtual_seconds"],
                    event["computing_seconds"],
                ]
            )
    # The clock goes on from task to task, so differences are the hours of each part.
    hours = np.diff(np.array(seconds) / 3600, axis=0, prepend=0.0)
    # [tasks, training or end of the task, all or computing] to [all or computing, part, task]
    total, computing = hours.reshape(len(ends), 2, 2).transpose(2, 1, 0)
    rounds = epochs = 1.0
    if as_in is not None:
        rounds = as_in.scaled["train.rounds"].factor
        epochs = as_in.scaled["train.epochs"].factor
    # Messages and waiting come once a round, computing once an epoch.
    training = rounds * (total[0] - computing[0] + epochs * computing[0])
    return np.asarray(training + total[1])


def mean(values: Iterable[float]) -> float:
    """Average numbers."""
    return float(np.mean(list(values)))
