"""The tables that compare learners, and their cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedknow.server.reports.measures import estimate

Json = Any
Row = Sequence[object]


def table(head: Row, rows: Iterable[Row]) -> str:
    """Return a table in Markdown; a float gets three digits."""
    lines = [_line(head), _line(["---"] * len(head))]
    lines += [_line(row) for row in rows]
    return "\n".join(lines)


def _line(row: Row) -> str:
    return f"| {' | '.join(map(cell, row))} |"


def cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "–" if value is None else str(value)


def provenance(origin: Mapping[str, Any]) -> str:
    """Return where, when and how in one line, to stand below a table."""
    versions = origin.get("versions", {}).items()
    place = (
        origin.get("gpu")
        or origin.get("machine")
        or f"{origin.get('cpu')}, {origin.get('cores')} cores"
    )
    installed = ", ".join(f"{name} {version}" for name, version in versions)
    date = origin.get("date", "")[:10]
    parts = [
        f"`{origin['command']}`",
        f"Machine: {place}",
        f"Versions: {installed}" if installed else "",
        f"Date: {date}" if date else "",
    ]
    if origin.get("load_at_end") is not None:
        parts.append(f"Load at the end: {origin['load_at_end']:.1f}")
    note = origin.get("note", "")
    parts.append(note[:1].upper() + note[1:])
    return ". ".join(filter(None, parts))


SCORES = {
    "accuracy": "accuracy, %",
    "accuracy_global": "purely global model",
    "forgetting": "forgetting, points",
    "forgetting_relative": "relative, %",
}


TOTALS = {
    "samples": ("samples learned from, k", 1e-3),
    "knowledge_bytes": ("kept a client, kB", 1e-3),
    "bytes": ("training traffic, MB", 1e-6),
}


COMPARISONS = {
    "digits_all": "digits-all",
    "cifar100_small": "paper-cifar100-small-all",
}
"""Folders of comparisons, by the names of their tables."""


def withdrawn_fedknow(measured: Json) -> str:
    """Rank learners without FedKNOW's selected figures."""
    lines = comparison(measured).splitlines()
    columns = len(SCORES) + len(TOTALS) + 1
    # Its lead over each learner is the last columns.
    cut = [line.split(" | ")[:columns] for line in lines]
    return "\n".join(
        f"{' | '.join(cells)} |" for cells in cut if cells[0] != "| `fedknow`"
    )


def comparison(measured: Json) -> str:
    """Rank learners by accuracy, with FedKNOW's lead over each seed by seed."""
    runs_by_learner: dict[str, list[Json]] = {}
    for run in measured["runs"].values():
        runs_by_learner.setdefault(run["learner"], []).append(run)
    fedknow = {run["seed"]: run for run in runs_by_learner.get("fedknow", [])}
    groups = measured["learners"].items()
    rows = []
    for name, group in sorted(
        groups, key=lambda item: -item[1]["accuracy"]["mean"]
    ):
        learner = group.get("learner", name.partition("@")[0])
        runs = runs_by_learner.get(learner, [])
        row = [f"`{learner}`"]
        for key in SCORES:
            row.append(interval([100.0 * run[key] for run in runs]))
        row += [_total(group, key) for key in TOTALS]
        row += [_lead(fedknow, runs, key) for key in ("accuracy", "forgetting")]
        rows.append(row)
    head = ["learner", *SCORES.values(), *(title for title, _ in TOTALS.values())]
    head += ["FedKNOW's accuracy less its", "FedKNOW's forgetting less its"]
    return table(head, rows)


def _total(group: Json, key: str) -> str:
    _, unit = TOTALS[key]
    return f"{unit * (group[key]['mean'] or 0.0):,.0f}"


def _lead(fedknow: Mapping[int, Json], runs: Sequence[Json], key: str) -> str:
    if any(run["learner"] == "fedknow" for run in runs):
        return "–"
    pairs = [
        (fedknow[run["seed"]], run) for run in runs if run["seed"] in fedknow
    ]
    return interval([100 * (best[key] - run[key]) for best, run in pairs], "+")


def interval(values: Sequence[float], sign: str = "") -> str:
    """Write mean and 95 % interval; for fewer than three seeds, each value."""
    summary = estimate(values)
    if not summary.count:
        return "–"
    if not summary.has_interval:
        return ", ".join(f"{value:{sign}.1f}" for value in summary.values)
    return f"{summary.mean:{sign}.1f} ± {summary.half:.1f}"
