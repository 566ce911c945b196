"""Differences between methods, seed by seed, as a table and as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fedknow.server.reports.blocks import Cell, Table
from fedknow.server.reports.groups import Group
from fedknow.server.reports.measures import (
    SEEDS_FOR_INTERVAL,
    Measure,
    Scale,
)
from fedknow.server.reports.statistics import Difference, differences

__all__ = [
    "CONTRASTED",
    "POINTS",
    "contrast_numbers",
    "contrast_table",
    "contrasts",
    "p_text",
    "signed",
]

POINTS = Measure(
    "difference",
    "Difference",
    (Scale(0.01, "points"),),
    lowest=-1,
    highest=1,
)
"""A difference of two fractions."""
CONTRASTED = {"accuracy": "Accuracy", "forgetting": "Forgetting"}
"""Measures whose differences are shown."""


def contrasts(
    groups: Sequence[Group], reference: str
) -> dict[str, dict[str, Difference]]:
    """Subtract one method's measures from those of every other one.

    Parameters
    ----------
    groups : sequence of Group
        The methods.
    reference : str
        The label of the one that is subtracted.

    Returns
    -------
    dict of str to dict of str to Difference
        By measure and label, in the order of the groups. Empty where no method shares three
        seeds with the reference, as fewer say nothing about chance.
    """
    results = {}
    for key in CONTRASTED:
        values = {group.label: _by_seed(group, key) for group in groups}
        by_label = differences(values, reference)
        counts = [each.estimate.count for each in by_label.values()]
        # With fewer seeds an interval is too wide to say anything.
        if max(counts, default=0) >= SEEDS_FOR_INTERVAL:
            results[key] = by_label
    return results


def _by_seed(group: Group, key: str) -> dict[int, float]:
    return {run.config.seed: run.measures()[key] for run in group.runs}


def contrast_table(groups: Sequence[Group], reference: str) -> Table | None:
    """Show differences from one method, with their p-values.

    Returns
    -------
    Table or None
        None where there are too few seeds.
    """
    by_measure = contrasts(groups, reference)
    if not by_measure:
        return None
    head = ["Method", "Seeds"]
    for key in by_measure:
        head += [f"{CONTRASTED[key]} less", f"{CONTRASTED[key]}, corrected p"]
    rows: list[list[Cell | str]] = []
    for label in next(iter(by_measure.values())):
        by_key = [each[label] for each in by_measure.values()]
        row: list[Cell | str] = [label, str(by_key[0].estimate.count)]
        for difference in by_key:
            row += _cells(difference)
        rows.append(row)
    count = len(rows)
    introduction = (
        f"Each method less {reference}, seed by seed: mean and 95 % interval (Student's t). "
        "The p-values are of the paired t-test, two-sided, corrected by Holm's method for "
        f"the number of comparisons, {count}."
    )
    return Table(f"Differences from {reference}", head, rows, introduction)


def _cells(difference: Difference) -> list[Cell]:
    """Write a difference with its interval, and its corrected p-value."""
    point = difference.estimate
    return [
        Cell(signed(difference), point.mean),
        Cell(p_text(difference.corrected), difference.corrected),
    ]


def signed(difference: Difference) -> str:
    """Write a difference with its sign, in points."""
    point = difference.estimate
    text = point.text(POINTS)
    # A difference has a sign even where it is above zero.
    return f"+{text}" if point.mean > 0 and not text.startswith("0.0 ") else text


def p_text(p: float) -> str:
    """Write a p-value with two digits that say something."""
    if math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def contrast_numbers(groups: Sequence[Group], reference: str) -> dict[str, Any]:
    """Give the differences as JSON has them."""
    numbers: dict[str, Any] = {}
    for key, by_label in contrasts(groups, reference).items():
        numbers[key] = {
            label: _numbers(difference) for label, difference in by_label.items()
        }
    return numbers


def _numbers(difference: Difference) -> dict[str, Any]:
    point = difference.estimate
    return {
        "mean": _finite(point.mean),
        "half_interval_95": _finite(point.half),
        "p": _finite(difference.p),
        "p_holm": _finite(difference.corrected),
        "seeds": point.count,
    }


def _finite(value: float) -> float | None:
    # JSON has no NaN.
    return value if math.isfinite(value) else None
