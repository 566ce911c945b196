"""The page of an experiment: tables beside the paper's values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from fedknow.protocols.config import ExperimentConfig, differences
from fedknow.server.reports.blocks import Cell, Figures, Section, Table
from fedknow.server.reports.groups import Group
from fedknow.server.reports.measures import measure_named, size
from fedknow.server.reports.plots import draw_plots
from fedknow.server.reports.summary import Array
from fedknow.simulations.paper.effort import (
    communication_hours,
    mean,
    virtual_hours,
)
from fedknow.simulations.paper.plots import PAPER_PLOTS
from fedknow.simulations.paper.protocol import (
    Variant,
    devices_of,
    paper_table,
    share_text,
)
from fedknow.simulations.paper.published import (
    Published,
    Result,
    by_task,
    tasks_compared,
    value_after,
)

__all__ = ["preface", "published_text", "results"]

AS_MUCH = "as much training as the paper"
ACCURACY = (
    "Method",
    "After tasks",
    "Accuracy",
    "Accuracy, paper",
    "Forgotten, relative",
    "Forgotten, paper",
    "Kept about past tasks, a client",
)
HOURS = (
    "Method",
    "Communication at 1 MB/s",
    f"Communication, {AS_MUCH}",
    "Communication, paper",
    "Virtual, on the fleet",
    f"Virtual, {AS_MUCH}",
    "Virtual, paper",
)
HOURS_NOTE = (
    "Communication: training traffic of the mean client, down and then up; the paper's seems to "
    "hold the scoring of all clients in every round, which ours leaves out. Virtual: until the "
    "last task ended. As much training as the paper: what messages and waiting took, multiplied "
    "for as many rounds and tasks, and what computing took, for as many epochs too. It is too "
    "small where tasks are fewer than the paper's and a method's work grows with each. It is too "
    "large for a method that sends something once a task, such as fedweit."
)


def preface(experiment: str, chosen: Sequence[Variant]) -> Section:
    """Show how much of the paper's experiment was run, variant by variant."""
    rows: list[list[str]] = []
    for variant in chosen:
        rows += [[variant.name, *cells] for cells in _variant_rows(variant)]
    head = ["Variant", "Setting", "Here", "Paper", "Share"]
    notes = _notes(experiment, chosen[0].config)
    return Section("", [Table("What was run", head, rows, notes, prose=(1,))])


def _variant_rows(variant: Variant) -> list[list[str]]:
    """Return the cells setting, here, paper and share of each difference."""
    rows = []
    for key, number in variant.scaled.items():
        counts = [str(number.measured), str(number.published)]
        rows.append([key, *counts, share_text(number.share)])
    # The product says how much training was done; each number alone would flatter.
    rows.append(
        ["training: these four multiplied", "", "", share_text(variant.share)]
    )
    measured = devices_of(variant.config)
    published = devices_of(variant.paper)
    # measured: | A device of either counts, also where the other has none.
    for device in published | measured:
        counts = [str(measured[device]), str(published[device])]
        rows.append([f"clients on {device}", *counts, ""])
    # These have rows of their own above.
    shown = {*variant.scaled, "fleet.devices"}
    for line in differences(variant.paper, variant.config):
        cells = _changed(line)
        if cells[0] not in shown:
            rows.append(cells)
    return rows


def _changed(line: str) -> list[str]:
    """Split a line of ``differences`` into the cells of a row."""
    key, _, values = line.partition(": was ")
    published, _, measured = values.partition(", now ")
    return [key, measured, published, ""]


def _notes(experiment: str, config: ExperimentConfig) -> str:
    table = paper_table()
    spec = table["experiments"][experiment]
    data = config.data.name
    # Where the paper leaves a choice open, the page says which was made.
    notes = [
        "Values called the paper's were read off its figures, to about 0.01.",
        "Rounds are those of a task, epochs those of a round.",
        f"Clients' shares of the samples are {config.data.share}.",
        table["workloads"][data].get("differs", ""),
        spec.get("note", ""),
    ]
    # These experiments are run on other data too, for which the paper has no values.
    if experiment.startswith(("5.3", "5.5", "5.6")) and data != spec["data"]:
        notes.append(
            f"The paper's values are those on {spec['data']}, these runs are on {data}."
        )
    return " ".join(note for note in notes if note)


def results(result: Result) -> list[Section]:
    """Show a variant's numbers beside the paper's, and its plots."""
    name = result.variant.name
    sections = [
        Section(name, [_side_by_side(result)]),
        Section("Hours", [_all_hours(result)]),
        Section("", [Figures(draw_plots(PAPER_PLOTS, result, f"{name}-"))]),
    ]
    if any("task_hours" in values for values in result.published.values()):
        sections.append(Section("Hours of single tasks", [_single_tasks(result)]))
    # Only one experiment is about links.
    if rates := paper_table()["experiments"][result.experiment].get("rates"):
        heading = "Hours of communication at other rates"
        sections.append(Section(heading, [_at_rates(result, rates)]))
    return sections


def _side_by_side(result: Result) -> Table:
    variant = result.variant
    rows = [
        _method_row(method, group, result.published_for(method))
        for method, group in result.groups.items()
    ]
    for method, published in result.only_published().items():
        rows.append(_published_row(method, published))
    tasks: list[int] = []
    for published in result.published.values():
        tasks += published.get("tasks", ())
    # Some experiments of the paper have no curve over tasks.
    published_tasks = max(tasks, default=variant.paper.data.tasks)
    return Table(
        f"{variant.name}: accuracy, forgetting and memory",
        ACCURACY,
        rows,
        "After the most tasks that both have; where the paper's value is after another number of "
        f"tasks, it says so. Here there are {variant.config.data.tasks}, in the paper "
        f"{published_tasks}. Kept: knowledge, importances and stored samples, after the last "
        "task here.",
    )


def _published_row(method: str, published: Published) -> list[Cell | str]:
    """Show the paper's values of a method that is not run here."""
    tasks = published["tasks"][-1]
    accuracy = published_text(published, "accuracy", tasks)
    forgetting = published_text(published, "forgetting", tasks)
    return [method, str(tasks), "–", accuracy, "–", forgetting, "–"]


def _method_row(
    method: str, group: Group, published: Published
) -> list[Cell | str]:
    tasks = tasks_compared(published, group)
    memory = group.estimate("knowledge_bytes").mean
    return [
        method,
        str(tasks),
        _value_after(group, "average", "accuracy", tasks),
        published_text(published, "accuracy", tasks),
        _value_after(group, "relative", "forgetting_relative", tasks),
        published_text(published, "forgetting", tasks),
        Cell(size(memory), memory),
    ]


def _value_after(group: Group, pick: str, key: str, tasks: int) -> Cell:
    """Show a curve's value after so many tasks, over seeds."""
    points = group.estimates(pick)
    if not 0 < tasks <= len(points):
        return Cell("–")
    # Entry 0 is after one task.
    point = points[tasks - 1]
    return Cell(point.text(measure_named(key)), point.mean)


def published_text(published: Published, key: str, tasks: int) -> str:
    """Write the paper's value after so many tasks.

    Where it has none, its last value stands, with its number of tasks.
    """
    value, published_tasks = value_after(published, key, tasks)
    text = measure_named("accuracy").text(value)
    # The paper does not say each number after each task.
    return text if published_tasks == tasks else f"{text} after {published_tasks}"


def _all_hours(result: Result) -> Table:
    variant = result.variant
    tasks = variant.paper.data.tasks / variant.config.data.tasks
    rows: list[list[Cell | str]] = []
    for method, group in result.groups.items():
        published = result.published_for(method)
        measured = mean(virtual_hours(run).sum() for run in group.runs)
        # At as much training as the paper's, but for the number of tasks.
        scaled = mean(virtual_hours(run, variant).sum() for run in group.runs)
        numbers = (
            communication_hours(group, 1000),
            communication_hours(group, 1000, variant),
            published.get("communication_hours", math.nan),
            measured,
            tasks * scaled,
            published.get("hours", math.nan),
        )
        rows.append([method, *_numbers(numbers)])
    return Table(f"{variant.name}: hours", HOURS, rows, HOURS_NOTE)


def _single_tasks(result: Result) -> Table:
    """Show virtual hours of the single tasks for which the paper has them."""
    published = {
        method: by_task(values, "task_hours")
        for method, values in result.published.items()
    }
    published_tasks: set[int] = set()
    for hours in published.values():
        published_tasks |= hours.keys()
    tasks = sorted(published_tasks)
    rows: list[list[Cell | str]] = []
    for method, group in result.groups.items():
        measured = [virtual_hours(run, result.variant) for run in group.runs]
        means = [_mean_of_task(measured, task) for task in tasks]
        rows.append([method, *_numbers(means)])
    for method, hours in published.items():
        # Methods of the table that could run here but do not are no concern of this page.
        is_shown = method in result.groups or not method.islower()
        if hours and is_shown:
            values = [hours.get(task, math.nan) for task in tasks]
            rows.append([f"{method}, paper", *_numbers(values)])
    return Table(
        f"{result.variant.name}: hours of single tasks",
        ["Method", *(f"task {task}" for task in tasks)],
        rows,
        "Virtual hours on the fleet, at as many rounds and epochs as the paper's.",
    )


def _mean_of_task(runs: Sequence[Array], task: int) -> float:
    """Average a task's hours over seeds; NaN where a run has fewer tasks."""
    return mean(
        hours[task - 1] if task <= len(hours) else math.nan for hours in runs
    )


def _at_rates(result: Result, rates: Sequence[int]) -> Table:
    rows: list[list[Cell | str]] = []
    for method, group in result.groups.items():
        hours = (
            communication_hours(group, rate, result.variant) for rate in rates
        )
        rows.append([method, *_numbers(hours)])
        published = result.published_for(method)
        if "hours_at_rates" in published:
            rows.append(
                [f"{method}, paper", *_numbers(published["hours_at_rates"])]
            )
    return Table(
        f"{result.variant.name}: hours at other rates",
        ["Method", *(f"{rate:,} kB/s" for rate in rates)],
        rows,
        "From the bytes of the same runs, at the paper's rounds and tasks: a slower link "
        "changes no accuracy.",
    )


def _numbers(values: Iterable[float]) -> list[Cell]:
    """Write numbers with three digits."""
    return [
        # A cell keeps its full number, which sorting uses.
        Cell("–" if math.isnan(value) else f"{value:,.3g}", value)
        for value in values
    ]
