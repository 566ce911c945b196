"""Tables on a terminal: of a run, of a comparison, and of a search.

A reader finds a line by its name, so a name never wraps and is never cut. Where a terminal is
too narrow for all columns, whole columns are left out and named below the table. Where it is
too narrow for a name and two columns, each name has a line of its own, and its numbers follow.
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
from fedknow.server.reports.contrasts import contrasts, p_text, signed
from fedknow.server.reports.groups import Group, interval_note, ranked
from fedknow.server.reports.measures import (
    available_measures,
    measure_named,
    size,
)
from fedknow.server.reports.summary import Summary

if TYPE_CHECKING:
    from fedknow.server.reports.statistics import Ranks
    from fedknow.simulations.proposals import Trial
    from fedknow.simulations.search import BestSettings

__all__ = [
    "Column",
    "FittingTable",
    "comparison_table",
    "contrast_lines",
    "print_table",
    "ranks_table",
    "result_tables",
    "search_table",
    "sweep_table",
]

SHOWN_TRIALS = 20
"""Lines of a search's table; its files have all."""

MIN_COLUMNS = 2
"""With fewer columns beside the names, each name gets a line of its own."""
EXPENDABLE = (
    "relative",
    "samples",
    "global",
    "kept",
    "time",
    "traffic",
    "virtual",
)
"""Headings of a comparison's columns, in the order in which they are left out."""


@dataclass(frozen=True)
class Column:
    """Numbers below a heading, one for each line.

    All have one unit, or each has its own.
    """

    heading: str
    cells: Sequence[str]
    unit: str = ""

    @property
    def name(self) -> str:
        """The heading in one line."""
        return self.heading.replace("\n", " ")


@dataclass(frozen=True)
class FittingTable:
    """A table that leaves out columns where the terminal is too narrow.

    It names them below the table.

    Attributes
    ----------
    title : str
        Above the table.
    names : sequence of str
        The name of each line.
    columns : sequence of Column
        In the order they are shown in.
    expendable : sequence of str
        Headings of columns in the order they are left out in; after these the remaining ones
        from the right.
    notes : sequence of str
        Sentences below the table.
    """

    title: str
    names: Sequence[str]
    columns: Sequence[Column]
    expendable: Sequence[str] = ()
    notes: Sequence[str] = ()

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        """Yield the title, the table, and the notes."""
        yield Text(self.title, "bold")
        fitting = self._fitting(console, options)
        # A table of one column out of many would say less than a list of all.
        if len(fitting) >= min(MIN_COLUMNS, len(self.columns)):
            yield self._table(fitting)
            dropped = [each.name for each in self.columns if each not in fitting]
            if dropped:
                text = f"left out for lack of width: {', '.join(dropped)}"
                yield Text(text, "italic")
        else:
            yield from self._stacked()
        for note in self.notes:
            yield Text(note, "italic")

    def _fitting(self, console: Console, options: ConsoleOptions) -> list[Column]:
        """Return the columns that there is room for."""
        fitting = list(self.columns)
        # Measured without a limit: within the true width rich would squeeze the columns.
        unlimited = options.update(width=10_000)
        while fitting:
            width = console.measure(
                self._table(fitting), options=unlimited
            ).maximum
            if width <= options.max_width:
                break
            names = [each.name for each in fitting]
            expendable = [name for name in self.expendable if name in names]
            index = names.index(expendable[0]) if expendable else -1
            # One at a time, as a column may be much wider than the next.
            fitting.pop(index)
        return fitting

    def _table(self, columns: Sequence[Column]) -> Table:
        table = Table(box=SIMPLE_HEAD, padding=0)
        table.add_column("", no_wrap=True)
        # Without any unit the headings save a line.
        has_units = any(each.unit for each in columns)
        for each in columns:
            heading = (
                f"{each.heading}\n{each.unit}" if has_units else each.heading
            )
            table.add_column(Text(heading), justify="right", no_wrap=True)
        cells = [each.cells for each in columns]
        for name, *row in zip(self.names, *cells, strict=True):
            # As text, so that brackets in a name are no markup.
            table.add_row(Text(name), *map(Text, row))
        return table

    def _stacked(self) -> RenderResult:
        """Yield each name in a line of its own, and its numbers below it.

        The terminal itself breaks a line that is too long.
        """
        widest = max((len(each.name) for each in self.columns), default=0)
        for line, name in enumerate(self.names):
            # Rich would break inside the name, and a search would miss it.
            yield Text(name, no_wrap=True, overflow="ignore")
            for each in self.columns:
                number = f"{each.cells[line]} {each.unit}".rstrip()
                text = f"  {each.name:{widest}}  {number}"
                yield Text(text, no_wrap=True, overflow="ignore")


def print_table(console: Console, table: RenderableType) -> None:
    """Print a table; lines that are wider than the console are not cut."""
    # What does not fit is wrapped by the terminal, and not lost.
    console.print(table, crop=False, highlight=False)


def result_tables(run: Summary) -> list[RenderableType]:
    """Show a run in two tables: task by task, and over all tasks.

    The run may be interrupted.
    """
    return [_task_table(run), _overall_table(run)]


def _task_table(run: Summary) -> FittingTable:
    scorings = [("personal", run.personal)]
    if run.global_model:
        scorings.append(("global", run.global_model))
    columns = []
    for name, scoring in scorings:
        learned = scoring.learned[: run.tasks].tolist()
        present = scoring.current[: run.tasks].tolist()
        forgotten = [old - new for old, new in zip(learned, present, strict=True)]
        # The last task cannot be forgotten yet: nothing was learned after it.
        if forgotten:
            forgotten[-1] = math.nan
        for kind, values in (
            ("learned", learned),
            ("now", present),
            ("forgotten", forgotten),
        ):
            cells = [_percent(value) for value in values]
            columns.append(Column(f"{name}\n{kind}", cells))
    config = run.config
    method = f"{config.name}, {config.learner.name} with {config.strategy.name}"
    title = f"{method}, seed {config.seed}: accuracy on each task"
    names = [f"task {task + 1}" for task in range(run.tasks)]
    return FittingTable(title, names, columns)


def _overall_table(run: Summary) -> Table:
    title = f"After {run.tasks} of {counted(run.config.data.tasks, 'task')}"
    table = Table(
        show_header=False, title=title, title_justify="left", title_style="bold"
    )
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    values = run.measures()
    for measure in available_measures([values]):
        table.add_row(measure.title, measure.text(values[measure.key]))
    for kind, count in sorted(run.traffic.items()):
        table.add_row(f"Bytes down, {kind}", size(count["down"]))
        table.add_row(f"Bytes up, {kind}", size(count["up"]))
    return table


def comparison_table(groups: Sequence[Group]) -> FittingTable:
    """Show one line a method, the most accurate first, over its seeds."""
    # The note below names the usual number; only methods with more say theirs.
    min_seeds = min(len(group.runs) for group in groups)
    # One order for names and cells.
    order = ranked(groups)
    names = []
    runs: list[Summary] = []
    for group in order:
        name = group.label
        if len(group.runs) != min_seeds:
            name += f" ({counted(len(group.runs), 'seed')})"
        names.append(name)
        runs += group.runs
    columns = []
    for measure in available_measures(run.measures() for run in runs):
        # Long measures stand on the page alone.
        if not measure.short:
            continue
        points = [group.estimate(measure.key) for group in order]
        if measure.is_percentage:
            cells = [point.text(measure, has_unit=False) for point in points]
        else:
            # Their intervals stand on the page and in the file alone, for lack of room.
            cells = [measure.text(point.mean) for point in points]
        columns.append(
            Column(measure.short, cells, "%" if measure.is_percentage else "")
        )
    notes = [interval_note(groups)]
    return FittingTable("Comparison", names, columns, EXPENDABLE, notes)


def contrast_lines(groups: Sequence[Group]) -> FittingTable | None:
    """Show each method less the one named in front; None below three seeds."""
    reference = groups[0].label
    by_measure = contrasts(groups, reference)
    if not by_measure:
        return None
    columns = []
    for key, by_label in by_measure.items():
        each_method = list(by_label.values())
        columns.append(Column(key, [signed(each) for each in each_method]))
        columns.append(
            Column(f"p, {key}", [p_text(each.corrected) for each in each_method])
        )
    names = list(next(iter(by_measure.values())))
    note = "p of the paired t-test, corrected by Holm's method for all methods"
    return FittingTable(f"Less {reference}", names, columns, notes=[note])


def ranks_table(ranks: Ranks, measure: str) -> FittingTable:
    """Show one line a method with its mean rank, the best first."""
    cells = [f"{mean:.2f}" for mean in ranks.means]
    streams = counted(ranks.streams, "stream")
    notes = [
        f"Friedman's test: p = {ranks.p:.2g}; critical difference at 5 %: "
        f"{ranks.critical:.2f} ranks"
    ]
    title = f"Mean ranks by {measure} over {streams}"
    return FittingTable(title, ranks.names, [Column("rank", cells)], notes=notes)


def search_table(best: Mapping[str, BestSettings]) -> FittingTable:
    """Show one line a learner with its best scores, and its settings below."""
    results = list(best.values())
    columns = [
        _percent_column(
            "accuracy", "accuracy", [each.accuracy for each in results]
        ),
        _percent_column(
            "with defaults", "accuracy", [each.default for each in results]
        ),
        _percent_column(
            "forgotten", "forgetting", [each.forgetting for each in results]
        ),
        Column("runs", [str(each.runs) for each in results]),
    ]
    notes = []
    for name, each in best.items():
        settings = ", ".join(
            f"{key}={value}" for key, value in each.settings.items()
        )
        notes.append(f"{name}: {settings or 'its defaults'}")
    title = "Best settings, on held-out training samples"
    return FittingTable(title, list(best), columns, ("runs",), notes)


def sweep_table(trials: Sequence[Trial]) -> FittingTable:
    """Show one line a try, the best first; those that failed come last."""
    # Sorting keeps the order of equals, so the first tried stays first.
    ordered = sorted(
        trials, key=lambda trial: -(trial.accuracy if trial.accuracy else 0.0)
    )[:SHOWN_TRIALS]
    settings = list(ordered[0].settings) if ordered else []
    columns = [
        _percent_column(
            "accuracy", "accuracy", [_number(each.accuracy) for each in ordered]
        ),
        _percent_column(
            "forgotten",
            "forgetting",
            [_number(each.forgetting) for each in ordered],
        ),
    ]
    for key in settings:
        cells = [_short(each.settings[key]) for each in ordered]
        columns.append(Column(key, cells))
    title = f"Best of {counted(len(trials), 'try', 'tries')}, on held-out training samples"
    names = [f"trial {each.number}" for each in ordered]
    return FittingTable(title, names, columns, tuple(settings), [])


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _percent_column(heading: str, key: str, values: Sequence[float]) -> Column:
    measure = measure_named(key)
    return Column(
        heading, [measure.text(value, has_unit=False) for value in values], "%"
    )


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f} %"
