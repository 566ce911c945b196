"""The table of class-incremental comparisons."""

from __future__ import annotations

from collections.abc import Sequence

from _comparison_tables import Json, Row, interval, provenance, table

from fedknow.server.reports.measures import size

COLUMNS = [
    "method",
    "final accuracy, %",
    "average accuracy, %",
    "forgetting, points",
    "traffic of training",
    "kept a client",
    "operations, G",
    "seconds",
]


def class_incremental(measured: Json) -> str:
    """Rank methods by final accuracy, one table for each split."""
    alphas = sorted({row["alpha"] for row in measured["rows"]}, reverse=True)
    parts = [_of_split(measured["rows"], alpha) for alpha in alphas]
    failures = measured["failures"]
    note = f"Failed: {', '.join(failures)}." if failures else "No run failed."
    return "\n\n".join([*parts, provenance(measured["about"] | {"note": note})])


def _of_split(rows: Sequence[Json], alpha: float) -> str:
    by_method: dict[str, list[Json]] = {}
    for row in rows:
        if row["alpha"] == alpha:
            by_method.setdefault(row["method"], []).append(row)
    best_first = sorted(by_method, key=lambda name: -_mean(by_method[name]))
    body = [_row(name, by_method[name]) for name in best_first]
    return f"Dirichlet {alpha:g}:\n\n{table(COLUMNS, body)}"


def _row(name: str, runs: Sequence[Json]) -> Row:
    cells = [f"`{name}`"]
    for key in ("final", "average", "forgetting"):
        cells.append(interval([100 * run[key] for run in runs]))
    cells += [size(_mean(runs, key)) for key in ("bytes", "knowledge_bytes")]
    cells.append(f"{_mean(runs, 'flops') / 1e9:,.0f}")
    cells.append(f"{_mean(runs, 'seconds'):,.0f}")
    return cells


def _mean(runs: Sequence[Json], key: str = "final") -> float:
    # A method that sends nothing beside the model has no such number.
    return sum(run[key] or 0.0 for run in runs) / len(runs)
