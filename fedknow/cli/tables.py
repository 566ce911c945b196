"""Tables on a terminal: of a run, of a comparison, and of a search.

A name is what a line is found by, so it never wraps and is never cut. Where a terminal is too
narrow for all columns, whole columns are left out and named below the table. Where it is too
narrow for a name and two columns, each name has a line of its own, and its numbers follow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from fedknow.protocols.texts import counted
from fedknow.server.reports.groups import Group, interval_note, ranked
from fedknow.server.reports.measures import known, measure_named, size
from fedknow.server.reports.summary import Summary

if TYPE_CHECKING:
    from fedknow.simulations.search import Found

__all__ = [
    "Column",
    "FittingTable",
    "comparison_table",
    "found_table",
    "print_table",
    "result_tables",
]

LEAST_COLUMNS = 2
"""With fewer columns beside the names, each name gets a line of its own."""
FIRST_TO_GO = ("relative", "samples", "global", "kept", "time", "traffic", "virtual")
"""Columns of a comparison by their headings, the least telling first."""


@dataclass(frozen=True)
class Column:
    """Numbers below a heading, one for each line, all in one unit or each with its own."""

    heading: str
    cells: Sequence[str]
    unit: str = ""

    @property
    def name(self) -> str:
        """The heading in one line."""
        return self.heading.replace("\n", " ")


@dataclass(frozen=True)
class FittingTable:
    """A table that leaves out columns where the terminal is too narrow, and says so.

    Attributes
    ----------
    title : str
        Above the table.
    names : sequence of str
        What each line is found by.
    columns : sequence of Column
        In the order they are shown in.
    first_to_go : sequence of str
        Headings of columns in the order they are left out in; after them the others, last first.
    notes : sequence of str
        Sentences below the table.
    """

    title: str
    names: Sequence[str]
    columns: Sequence[Column]
    first_to_go: Sequence[str] = ()
    notes: Sequence[str] = ()

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        """Yield the title, the table, and the notes."""
        yield Text(self.title, "bold")
        fitting = self._fitting(console, options)
        if len(fitting) >= min(LEAST_COLUMNS, len(self.columns)):
            yield self._table(fitting)
            left_out = [each.name for each in self.columns if each not in fitting]
            if left_out:
                yield Text(
                    f"left out for lack of width: {', '.join(left_out)}", "italic"
                )
        else:
            yield from self._stacked()
        for note in self.notes:
            yield Text(note, "italic")

    def _fitting(self, console: Console, options: ConsoleOptions) -> list[Column]:
        """Give the columns that there is room for."""
        fitting = list(self.columns)
        while fitting:
            needed = console.measure(
                self._table(fitting), options=options.update(width=10_000)
            )
            if needed.maximum <= options.max_width:
                break
            names = [each.name for each in fitting]
            expendable = [name for name in self.first_to_go if name in names]
            fitting.pop(names.index(expendable[0]) if expendable else -1)
        return fitting

    def _table(self, columns: Sequence[Column]) -> Table:
        table = Table(box=SIMPLE_HEAD, padding=0)
        table.add_column("", no_wrap=True)
        has_units = any(each.unit for each in columns)
        for each in columns:
            heading = f"{each.heading}\n{each.unit}" if has_units else each.heading
            table.add_column(Text(heading), justify="right", no_wrap=True)
        for name, *cells in zip(
            self.names, *(each.cells for each in columns), strict=True
        ):
            table.add_row(Text(name), *map(Text, cells))
        return table

    def _stacked(self) -> RenderResult:
        """Yield each name in a line of its own, which the terminal itself breaks if it must."""
        widest = max((len(each.name) for each in self.columns), default=0)
        for line, name in enumerate(self.names):
            yield Text(name, no_wrap=True, overflow="ignore")
            for each in self.columns:
                number = f"{each.cells[line]} {each.unit}".rstrip()
                text = f"  {each.name:{widest}}  {number}"
                yield Text(text, no_wrap=True, overflow="ignore")


def print_table(console: Console, table: RenderableType) -> None:
    """Print a table; what is wider than the console all the same is not cut."""
    console.print(table, crop=False, highlight=False)


def result_tables(run: Summary) -> list[RenderableType]:
    """Show a finished (or interrupted) run in two tables: task by task, and over all tasks."""
    return [_task_table(run), _overall_table(run)]


def _task_table(run: Summary) -> FittingTable:
    scorings = [("personal", run.personal)]
    if run.global_model:
        scorings.append(("global", run.global_model))
    columns = []
    for name, scoring in scorings:
        learned, now = (
            scoring.learned[: run.tasks].tolist(),
            scoring.now[: run.tasks].tolist(),
        )
        forgotten = [then - value for then, value in zip(learned, now, strict=True)]
        forgotten[-1:] = [math.nan] * len(
            forgotten[-1:]
        )  # nothing was learned after the last task
        for kind, values in (
            ("learned", learned),
            ("now", now),
            ("forgotten", forgotten),
        ):
            columns.append(
                Column(f"{name}\n{kind}", [_percent(value) for value in values])
            )
    method = (
        f"{run.config.name}, {run.config.learner.name} with {run.config.strategy.name}"
    )
    title = f"{method}, seed {run.config.seed}: accuracy on each task"
    return FittingTable(
        title, [f"task {task + 1}" for task in range(run.tasks)], columns
    )


def _overall_table(run: Summary) -> Table:
    title = f"After {run.tasks} of {counted(run.config.data.tasks, 'task')}"
    table = Table(
        show_header=False, title=title, title_justify="left", title_style="bold"
    )
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    values = run.measures()
    for measure in known([values]):
        table.add_row(measure.title, measure.text(values[measure.key]))
    for kind, count in sorted(run.traffic.items()):
        table.add_row(f"Bytes down, {kind}", size(count["down"]))
        table.add_row(f"Bytes up, {kind}", size(count["up"]))
    return table


def comparison_table(groups: Sequence[Group]) -> FittingTable:
    """Show one line a method, the most accurate first, with what there is to say over seeds."""
    fewest = min(len(group.runs) for group in groups)
    order = ranked(groups)
    names = []
    for group in order:
        seeds = (
            f" ({counted(len(group.runs), 'seed')})"
            if len(group.runs) != fewest
            else ""
        )
        names.append(f"{group.label}{seeds}")
    columns = []
    for measure in known(run.measures() for group in groups for run in group.runs):
        if not measure.short:
            continue
        points = [group.estimate(measure.key) for group in order]
        if measure.percent:
            cells = [point.text(measure, unit=False) for point in points]
        else:  # a page and a file have their intervals too
            cells = [measure.text(point.mean) for point in points]
        columns.append(Column(measure.short, cells, "%" if measure.percent else ""))
    return FittingTable(
        "Comparison", names, columns, FIRST_TO_GO, [interval_note(groups)]
    )


def found_table(found: Mapping[str, Found]) -> FittingTable:
    """Show one line a learner with what a search found, and its settings below."""
    accuracy, forgetting = measure_named("accuracy"), measure_named("forgetting")
    best = found.values()
    columns = [
        Column(
            "accuracy", [accuracy.text(each.accuracy, unit=False) for each in best], "%"
        ),
        Column(
            "with defaults",
            [accuracy.text(each.default, unit=False) for each in best],
            "%",
        ),
        Column(
            "forgotten",
            [forgetting.text(each.forgetting, unit=False) for each in best],
            "%",
        ),
        Column("runs", [str(each.runs) for each in best]),
    ]
    notes = []
    for name, each in found.items():
        settings = ", ".join(f"{key}={value}" for key, value in each.settings.items())
        notes.append(f"{name}: {settings or 'its defaults'}")
    title = "Best settings, on held-out training samples"
    return FittingTable(title, list(found), columns, ("runs",), notes)


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f} %"
