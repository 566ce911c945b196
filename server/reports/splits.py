"""The picture of a split: samples by client, task and class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from fedknow.protocols.texts import counted
from fedknow.server.reports.blocks import Block, Cell, Figures, Table
from fedknow.server.reports.plots import (
    COLOURS,
    PlotSpec,
    Shape,
    axes_with,
    draw_plots,
)

__all__ = ["MOST_CLIENTS", "MOST_COLUMNS", "Holdings", "split_blocks"]

Array = np.ndarray[Any, np.dtype[np.float64]]

MOST_CLIENTS = 40
"""Rows of a picture; more would not be legible."""
MOST_COLUMNS = 200
"""Columns of a picture: pairs of a task and a class."""
MOST_NAMED = 30
"""Columns of which each has the number of its class below it."""
MOST_TASKS = 24
"""Tasks of which each has its number above it."""
EMPTY = (0.5, 0.5, 0.5, 0.15)
"""Colour of no samples: a grey that is seen on a bright and on a dark page."""
SPREAD = 20
"""From this ratio of the largest to the smallest number on, colours go by the logarithm."""


TASK_HEAD = (
    "Task",
    "Clients that have it",
    "Classes of a client",
    "Training samples of a client",
    "Training samples of all",
    "Test samples of a client",
)
TASK_NOTE = (
    "In the table, from the client with fewest to the client with most; tasks in each client's "
    "own order."
)


@dataclass(frozen=True)
class Holdings:
    """What a picture of a split shows.

    Attributes
    ----------
    counts : float64 [client, column]
        Training samples; NaN where a client has none.
    columns : sequence of (int, int)
        Task and class of each column, ascending. Tasks count in each client's own order.
    clients, total : int
        How many clients there are, and how many columns the clients shown have.
    """

    counts: Array
    columns: Sequence[tuple[int, int]]
    clients: int
    total: int

    @classmethod
    def from_summary(cls, partition: Mapping[str, Any]) -> Holdings:
        """Make it from what ``Partition.summary`` gave.

        Raises
        ------
        KeyError
            If it is of a version that did not count the samples of a class.
        """
        # Each client has a row, and a picture of more rows cannot be read.
        shown = partition["clients"][:MOST_CLIENTS]
        held = [dict(_counts(shares)) for shares in shown]
        pairs = sorted(set(chain.from_iterable(map(_columns, shown))))
        columns = pairs[:MOST_COLUMNS]
        # NaN and not 0: a class that a client does not have is drawn grey.
        counts = np.full((len(held), len(columns)), np.nan)
        for row, numbers in zip(counts, held, strict=True):
            row[:] = [numbers.get(column, np.nan) for column in columns]
        clients = partition.get("total", len(partition["clients"]))
        return cls(counts, columns, clients, len(pairs))

    @property
    def starts(self) -> list[tuple[int, int]]:
        """Each task and its first column, in the order of the tasks."""
        tasks = groupby(enumerate(self.columns), lambda place: place[1][0])
        return [(task, next(places)[0]) for task, places in tasks]


def split_blocks(partition: Mapping[str, Any]) -> list[Block]:
    """Show a split: a picture, and a table of its tasks.

    Parameters
    ----------
    partition : mapping
        What ``Partition.summary`` gave, as it stands in a run's ``partition.json``.

    Returns
    -------
    list of Block
        Empty where an earlier version did not count the samples of each class.
    """
    shares = chain.from_iterable(partition["clients"])
    if not all("counts" in share for share in shares):
        return []
    holdings = Holdings.from_summary(partition)
    return [
        Figures(draw_plots(SPLIT_PLOTS, holdings)),
        _summary_table(partition["tasks"])
        if "tasks" in partition
        else _task_table(partition["clients"]),
    ]


def _counts(
    shares: Iterable[Mapping[str, Any]],
) -> Iterator[tuple[tuple[int, int], int]]:
    for task, share in enumerate(shares):
        for label, count in zip(share["held"], share["counts"], strict=True):
            yield (task, label), count


def _columns(shares: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, int]]:
    for task, share in enumerate(shares):
        for label in share["classes"]:
            yield task, label


def _draw(figure: Figure, split: Holdings) -> None:
    axes = axes_with(figure, "class", "client", is_counted=False)
    axes.grid(False)
    # Without a grey in the middle, which would look like none.
    colours = matplotlib.colormaps["viridis"].with_extremes(bad=EMPTY)
    image = axes.imshow(
        split.counts,
        cmap=colours,
        norm=_scale(split.counts),
        aspect="auto",
        # Cells keep sharp edges at every size of the page.
        interpolation="none",
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(split.columns) <= MOST_NAMED:
        labels = [str(label) for _, label in split.columns]
        axes.set_xticks(range(len(labels)), labels)
    else:
        axes.set_xticks([])
        axes.set_xlabel("classes of each task, ascending")
    _mark_tasks(axes, split)
    is_log = isinstance(image.norm, LogNorm)
    bar = figure.colorbar(
        image,
        label="training samples",
        pad=0.01,
        ticks=LogLocator(subs=(1, 2, 5)) if is_log else MaxNLocator(integer=True),
        format="{x:,.0f}",
    )
    bar.minorticks_off()
    bar.outline.set_visible(False)


def _scale(counts: Array) -> Normalize:
    smallest, largest = np.nanmin(counts), np.nanmax(counts)
    # On a linear scale small shares would all look like none.
    if largest >= SPREAD * smallest:
        return LogNorm(smallest, largest)
    # From zero, so that twice as bright is about twice as many.
    return Normalize(0, largest)


def _mark_tasks(axes: Axes, split: Holdings) -> None:
    """Draw a line before each task, and write its number above it."""
    starts = split.starts
    ends = [*(start for _, start in starts[1:]), len(split.columns)]
    for _, start in starts[1:]:
        axes.axvline(start - 0.5, color=COLOURS[1], lw=1.8)
    middles = [
        (start + end - 1) / 2
        for (_, start), end in zip(starts, ends, strict=True)
    ]
    # Every second task, or third, where there is no room for all numbers.
    step = -(-len(starts) // MOST_TASKS)
    above = axes.secondary_xaxis("top")
    above.set_xticks(
        middles[::step], [str(task + 1) for task, _ in starts[::step]]
    )
    above.tick_params(length=0)
    above.set_xlabel("task")


def _shape(split: Holdings) -> Shape:
    height = 0.16 * len(split.counts) + 1.9
    return Shape(width=11, height=max(3.2, height), is_wide=True)


def _note(split: Holdings) -> str:
    """Say what is left out."""
    parts = []
    if split.clients > len(split.counts):
        parts.append(
            f"the first {len(split.counts)} of {counted(split.clients, 'client')}"
        )
    if split.total > len(split.columns):
        parts.append(
            f"the first {len(split.columns)} of {split.total} pairs of a task and a class"
        )
    return f"Shown are {' and '.join(parts)}." if parts else ""


def _task_table(clients: Sequence[Sequence[Mapping[str, Any]]]) -> Table:
    tasks = max(map(len, clients))
    rows = []
    for task in range(tasks):
        # Clients may have different numbers of tasks.
        shares = [shares[task] for shares in clients if task < len(shares)]
        sizes = [share["train"] for share in shares]
        held = [len(share["held"]) for share in shares]
        rows.append(
            [
                Cell(str(task + 1), task),
                Cell(str(len(shares)), len(shares)),
                _range(held),
                _range(sizes),
                Cell(f"{sum(sizes):,}", sum(sizes)),
                _range([share["test"] for share in shares]),
            ]
        )
    return Table("The split by task", TASK_HEAD, rows, TASK_NOTE)


def _summary_table(tasks: Sequence[Mapping[str, Any]]) -> Table:
    """Show the tasks of more clients than a partition's summary lists."""
    rows = []
    for task, summary in enumerate(tasks):
        # A stream may be longer than the tasks of any client.
        if not summary["clients"]:
            continue
        rows.append(
            [
                Cell(str(task + 1), task),
                Cell(f"{summary['clients']:,}", summary["clients"]),
                _spread(summary["held"]),
                _spread(summary["train"]),
                Cell(f"{summary['train_sum']:,}", summary["train_sum"]),
                _spread(summary["test"]),
            ]
        )
    note = f"{TASK_NOTE} In brackets the median."
    return Table("The split by task", TASK_HEAD, rows, note)


def _spread(quantiles: Sequence[float]) -> Cell:
    smallest, median, largest = (
        quantiles[0],
        quantiles[len(quantiles) // 2],
        quantiles[-1],
    )
    if smallest == largest:
        return Cell(f"{largest:,.0f}", largest)
    return Cell(f"{smallest:,.0f} to {largest:,.0f} ({median:,.0f})", largest)


def _range(numbers: Sequence[int]) -> Cell:
    smallest, largest = min(numbers), max(numbers)
    text = f"{smallest:,}"
    if largest > smallest:
        text += f" to {largest:,}"
    return Cell(text, largest)


SPLIT_PLOTS: tuple[PlotSpec[Holdings], ...] = (
    PlotSpec(
        name="split",
        title="Training samples by client, task and class",
        caption="Grey: none. Tasks stand in each client's own order.",
        draw=_draw,
        has_data=lambda split: bool(np.isfinite(split.counts).any()),
        note=_note,
        shape=_shape,
    ),
)
