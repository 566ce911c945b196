"""Tables of one run and of methods side by side."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from fedknow.server.reports.blocks import Bullets, Cell, Table
from fedknow.server.reports.groups import Group
from fedknow.server.reports.measures import (
    Measure,
    available_measures,
    measure_named,
    size,
)
from fedknow.server.reports.summary import Scoring, Summary

__all__ = [
    "comparison_tables",
    "people_table",
    "property_table",
    "runs_table",
    "task_table",
    "traffic_table",
    "troubles",
]

TOPICS: Mapping[str, tuple[str, ...]] = {
    "Accuracy": (
        "accuracy",
        "accuracy_median",
        "accuracy_trimmed",
        "accuracy_global",
        "gap",
        "accuracy_held_out",
        "forward_transfer",
    ),
    "Forgetting": (
        "forgetting",
        "forgetting_relative",
        "forgetting_global",
        "backward_transfer",
    ),
    "Traffic and memory": (
        "bytes",
        "bytes_extra",
        "bytes_evaluate",
        "knowledge_bytes",
        "server_bytes",
        "client_memory_bytes",
        "peak_memory_mb",
    ),
    "Time, work and energy": (
        "seconds",
        "virtual_seconds",
        "communication_seconds",
        "samples",
        "flops",
        "energy_joules",
    ),
}
"""Measures by the table they stand in: one table of all would be too wide for any screen."""

MOST_TROUBLES = 200
"""Lines on a page about what failed in one run."""
NUMBERS = re.compile(r"\d[\d.,\s]*")


def task_table(run: Summary) -> Table:
    """Show each task's accuracy when it was learned, now, and the difference."""
    names = ["when learned", "now", "forgotten"]
    head = ["Task", *names]
    scorings = [run.personal]
    # It is not scored where a setting forbids it.
    if run.global_model is not None:
        head += [f"global model: {name}" for name in names]
        scorings.append(run.global_model)
    rows: list[list[Cell | str]] = []
    for task in range(run.tasks):
        row: list[Cell | str] = [str(task + 1)]
        for scoring in scorings:
            row += _task_cells(scoring, task, is_last=task == run.tasks - 1)
        rows.append(row)
    return Table("Accuracy on each task", head, rows)


def _task_cells(scoring: Scoring, task: int, is_last: bool) -> list[str]:
    percent = measure_named("forgetting")
    learned = float(scoring.learned[task])
    current = float(scoring.current[task])
    # The newest task has had no chance to be forgotten.
    lost = "–" if is_last else percent.text(learned - current)
    return [percent.text(learned), percent.text(current), lost]


def people_table(run: Summary) -> Table:
    """Show how well the global model tells each person who is held out."""
    percent = measure_named("accuracy_held_out")
    head = ["Person", "samples", *(f"task {k + 1}" for k in range(run.tasks))]
    rows: list[list[Cell | str]] = []
    for name, sizes, accuracy in zip(
        run.people.names, run.people.weights, run.people.accuracy, strict=True
    ):
        newest = accuracy[: run.tasks, run.tasks - 1].tolist()
        cells = [percent.text(value) for value in newest]
        # Of the tasks so far, as the accuracies are.
        rows.append([name, f"{int(sizes[: run.tasks].sum()):,}", *cells])
    return Table(
        "Accuracy of the global model on people held out, after the newest task",
        head,
        rows,
    )


def traffic_table(traffic: Mapping[str, Mapping[str, int]]) -> Table:
    """Show messages and bytes by kind of message."""
    rows: list[list[Cell | str]] = [
        [
            kind,
            f"{count['messages']:,}",
            Cell(size(count["down"]), count["down"]),
            Cell(size(count["up"]), count["up"]),
        ]
        for kind, count in sorted(traffic.items())
    ]
    return Table("Messages by kind", ["Kind", "Messages", "Down", "Up"], rows)


def property_table(
    caption: str, names: tuple[str, str], pairs: Mapping[str, object]
) -> Table:
    """Show names and what belongs to them, such as reasons."""
    rows = [[key, str(value)] for key, value in pairs.items()]
    return Table(caption, names, rows, prose=(1,))


def comparison_tables(groups: Sequence[Group]) -> list[Table]:
    """Show methods side by side, a table for each topic that has numbers."""
    runs = list(chain.from_iterable(members.runs for members in groups))
    tables = []
    for topic, measures in _shown(runs):
        rows: list[list[Cell | str]] = []
        for members in groups:
            cells = [_estimate_cell(members, measure) for measure in measures]
            rows.append([members.label, str(len(members.runs)), *cells])
        head = ["Method", "Seeds", *(each.title for each in measures)]
        tables.append(Table(topic, head, rows))
    return tables


def _estimate_cell(group: Group, measure: Measure) -> Cell:
    estimate = group.estimate(measure.key)
    return Cell(estimate.text(measure), estimate.mean)


def runs_table(groups: Sequence[Group]) -> list[Table]:
    """Show every run by itself, a table for each topic that has numbers."""
    runs: list[tuple[str, Summary]] = []
    for members in groups:
        runs += [(members.label, run) for run in members.runs]
    tables = []
    for topic, measures in _shown(run for _, run in runs):
        rows = [_run_row(label, run, measures) for label, run in runs]
        head = [
            "Method",
            "Seed",
            *(each.title for each in measures),
            "State",
            "Tasks",
        ]
        tables.append(Table(f"{topic}, run by run", head, rows))
    return tables


def _run_row(
    label: str, run: Summary, measures: Sequence[Measure]
) -> list[Cell | str]:
    values = run.measures()
    numbers = [
        _measure_cell(measure, values[measure.key]) for measure in measures
    ]
    tasks = f"{run.tasks}/{run.config.data.tasks}"
    return [label, str(run.config.seed), *numbers, run.status, tasks]


def _measure_cell(measure: Measure, value: float) -> Cell:
    return Cell(measure.text(value), value)


def _shown(runs: Iterable[Summary]) -> list[tuple[str, list[Measure]]]:
    """Give the measures of each topic that at least one of the runs has."""
    available = available_measures(run.measures() for run in runs)
    keys = {measure.key for measure in available}
    shown = []
    for topic, members in TOPICS.items():
        measures = [measure_named(key) for key in members if key in keys]
        if measures:
            shown.append((topic, measures))
    return shown


def troubles(run: Summary, title: str = "") -> Bullets | None:
    """List a run's failures and warnings, each kind once.

    Returns
    -------
    Bullets or None
        None where there were none.
    """
    kinds: dict[tuple[object, ...], list[Mapping[str, Any]]] = {}
    for event in run.troubles:
        # Events whose reasons differ in numbers alone are the same trouble again.
        reason = NUMBERS.sub("#", event["reason"])
        # By client too: the same fault of another client is news.
        kind = (event["event"], event.get("client"), event.get("fault"), reason)
        kinds.setdefault(kind, []).append(event)
    if not kinds:
        return None
    events = list(kinds.values())
    # A client that fails all the time would fill the page.
    items = [_trouble(each) for each in events[:MOST_TROUBLES]]
    # Events and not kinds are counted, as a reader looks for them in metrics.jsonl.
    hidden = sum(map(len, events[MOST_TROUBLES:]))
    if hidden:
        items.append(("", f"{hidden:,} more; metrics.jsonl has all"))
    return Bullets(items, title)


def _trouble(events: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Describe one kind of failure or warning: what, how often, and when."""
    oldest = events[0]
    newest = events[-1]
    parts = [oldest["fault"]] if "fault" in oldest else []
    if len(events) > 1:
        parts.append(f"{len(events):,} times")
    places = [
        f"task {event['task'] + 1}, round {event['round']}"
        for event in (oldest, newest)
        if "task" in event
    ]
    # A single place, where the oldest and the newest event have the same.
    parts += [" to ".join(dict.fromkeys(places)), newest["reason"]]
    return str(oldest["event"]), "; ".join(filter(None, parts))
