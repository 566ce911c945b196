"""How runs and comparisons look in a notebook."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedknow.server.reports.blocks import Table
from fedknow.server.reports.groups import Group
from fedknow.server.reports.measures import available_measures
from fedknow.server.reports.render import render_cell
from fedknow.server.reports.summary import Summary

__all__ = ["comparison_html", "run_html"]

_SHOWN = 8
"""Measures of a run that are shown; the report has them all."""


def run_html(run: Summary, path: str) -> str:
    """Return a small page about one run."""
    values = run.measures()
    rows = [
        (measure.title, measure.text(values[measure.key]))
        for measure in available_measures([values])[:_SHOWN]
    ]
    title = f"{run.config.name} with {run.config.learner.name} ({run.status})"
    tables = [Table("", [], rows)]
    if run.tasks:
        tables.append(_matrix(run.personal.matrix))
    return render_cell(tables, title, path)


def comparison_html(groups: Sequence[Group]) -> str:
    """Return a table with a row for each method."""
    values: list[dict[str, float]] = []
    for group in groups:
        values += [run.measures() for run in group.runs]
    measures = available_measures(values)[:_SHOWN]
    heads = ["method", "seeds", *(measure.title for measure in measures)]
    rows: list[list[str]] = []
    for group in groups:
        means = [
            measure.text(group.estimate(measure.key).mean) for measure in measures
        ]
        rows.append([group.label, str(len(group.runs)), *means])
    return render_cell([Table("", heads, rows)])


def _matrix(matrix: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> Table:
    tasks = range(1, matrix.shape[1] + 1)
    rows: list[list[str]] = []
    for task, row in zip(tasks, matrix, strict=False):
        # A task has no accuracy before it was learned.
        cells = [
            "" if math.isnan(value) else f"{100 * value:.1f}" for value in row
        ]
        rows.append([f"task {task}", *cells])
    caption = "Accuracy (%) on each task (row) after each task (column)"
    return Table(caption, ["", *(f"after {task}" for task in tasks)], rows)
