"""The tables of the protocol: methods of a stream, ranks over streams."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from _comparison_tables import Json, interval, provenance, table

from fedknow.server.reports.contrasts import p_text
from fedknow.server.reports.measures import size
from fedknow.server.reports.statistics import (
    Difference,
    Ranks,
    differences,
    rank,
)

PROTOCOL = (
    "protocol_digits",
    "protocol_speech_digits",
    "protocol_clinc150",
    "protocol_har_wharf",
    "protocol_cifar100_pretrained",
    "protocol_speech_digits_searched",
)
"""Names of the streams' tables, and of their files."""
REFERENCE = "fedknow"
SIGNS = {"accuracy": 1.0, "forgetting": -1.0}
NAMES = {
    "fedknow-sum": "`fedknow`, `integrator=sum`",
    "fedknow-off": "`fedknow`, `integrator=off`",
}
COLUMNS = [
    "method",
    "accuracy, %",
    "of the global model",
    "forgetting, points",
    "samples learned from, k",
    "kept a client",
    "operations, G",
    "peak memory, MB",
    "seconds",
    "accuracy less `fedknow`'s",
    "corrected p",
    "forgetting less `fedknow`'s",
    "corrected p",
]


def protocol(measured: Json) -> str:
    """Rank the methods of a stream, with differences from FedKNOW."""
    methods = {
        name: entry
        for name, entry in measured["methods"].items()
        if entry["runs"]
    }
    by_key = {key: _differences(methods, key) for key in SIGNS}
    rows = []
    for name in sorted(
        methods, key=lambda name: -_mean(methods[name], "accuracy")
    ):
        rows.append([_named(name), *_figures(methods[name])])
        for key in SIGNS:
            rows[-1] += _difference(by_key[key].get(name))
    seeds = len(methods[REFERENCE]["runs"])
    note = f"Seeds: {seeds}. {_failures(measured['failures'])}"
    origin = provenance(measured["about"] | {"note": note})
    return f"{table(COLUMNS, rows)}\n\n{origin}"


def _failures(failures: Mapping[str, str]) -> str:
    if not failures:
        return "No run failed."
    return f"Failed: {', '.join(failures)}."


def _named(name: str) -> str:
    return NAMES.get(name, f"`{name}`")


def _differences(methods: Json, key: str) -> dict[str, Difference]:
    values = {}
    for name, entry in methods.items():
        values[name] = {run["seed"]: run[key] for run in entry["runs"]}
    return differences(values, REFERENCE)


def _difference(difference: Difference | None) -> list[str]:
    if difference is None:
        return ["–", "–"]
    values = [100 * value for value in difference.estimate.values]
    return [interval(values, "+"), p_text(difference.corrected)]


def _mean(entry: Json, key: str) -> float:
    values = [run[key] or 0.0 for run in entry["runs"]]
    return float(sum(values) / len(values))


def _figures(entry: Json) -> list[str]:
    cells = []
    for key in ("accuracy", "accuracy_global", "forgetting"):
        values = [run[key] for run in entry["runs"]]
        is_scored = None not in values
        cells.append(interval([100 * v for v in values]) if is_scored else "–")
    cells.append(f"{_mean(entry, 'samples') / 1e3:,.0f}")
    cells.append(size(_mean(entry, "knowledge_bytes")))
    cells.append(f"{_mean(entry, 'flops') / 1e9:,.0f}")
    return cells + [
        _recorded(entry, key) for key in ("peak_memory_mb", "seconds")
    ]


def _recorded(entry: Json, key: str) -> str:
    """Give a mean, or a dash where older results lack the figure."""
    values = [run.get(key) for run in entry["runs"]]
    return "–" if None in values else f"{_mean(entry, key):,.0f}"


def chosen_settings(measured: Json) -> str:
    """List the settings that the search chose, and how many it tried."""
    rows = []
    for name, entry in measured["methods"].items():
        # Variants take the settings of another method.
        if not entry["candidates"]:
            continue
        settings = ", ".join(
            f"`{key}={value}`" for key, value in entry["settings"].items()
        )
        tried = [line["accuracy"] for line in entry["tried"]]
        best = max(tried, default=None)
        rows.append(
            [
                _named(name),
                f"{len(tried)} of {entry['candidates']}",
                "–" if best is None else f"{100 * best:.1f}",
                settings or "nothing to search",
            ]
        )
    head = ["method", "candidates scored", "held-out accuracy, %", "settings"]
    return table(head, rows)


# --- over streams


def ranks_over_streams(results: Path, key: str) -> tuple[list[str], Ranks] | None:
    """Rank the methods that all measured streams have.

    Returns
    -------
    tuple or None
        The streams and the ranks; None below two streams.
    """
    streams = {
        path.stem.removeprefix("protocol_"): _read(path)
        for path in sorted(results.glob("protocol_*.json"))
        # The same stream again, with other settings.
        if not path.stem.endswith(("_searched", "_steps"))
    }
    if len(streams) < 2:
        return None
    names = set.intersection(*(set(each["methods"]) for each in streams.values()))
    in_order = next(iter(streams.values()))["methods"]
    scores: dict[str, Sequence[float]] = {}
    for name in in_order:
        if name in names:
            scores[name] = [
                SIGNS[key] * _mean(each["methods"][name], key)
                for each in streams.values()
            ]
    return list(streams), rank(scores)


def _read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def rank_table(results: Path) -> str:
    """Show mean ranks by accuracy and by forgetting."""
    parts = []
    for key in SIGNS:
        ranked = ranks_over_streams(results, key)
        if ranked is None:
            return "Not measured yet."
        streams, ranks = ranked
        rows = [
            [_named(name), f"{mean:.2f}"]
            for name, mean in zip(ranks.names, ranks.means, strict=True)
        ]
        note = (
            f"Streams: {', '.join(streams)}. Friedman's test: p = {p_text(ranks.p)}. "
            f"Critical difference at 5 %: {ranks.critical:.2f} ranks."
        )
        parts.append(
            f"{table(['method', f'mean rank by {key}'], rows)}\n\n{note}"
        )
    return "\n\n".join(parts)


def published(measured: Json) -> str:
    """Show published figures beside ours."""
    rows = []
    for row in measured["results"]["table"]:
        spread = row["published_spread"]
        stated = f"{row['published']:g}"
        rows.append(
            [
                row["case"],
                stated if spread is None else f"{stated} ± {spread:g}",
                interval(row["accuracy"]),
                f"{row['difference']:+.1f}",
            ]
        )
    head = ["case", "published, %", "here, %", "difference, points"]
    return f"{table(head, rows)}\n\n{provenance(measured['about'])}"


def steps(measured: Json) -> str:
    """Show how often constraints are violated, and multipliers act."""
    columns = {
        "signature-tasks": "past tasks",
        "violated": "violated before the step",
        "active": "with a multiplier",
    }
    rows = []
    for row in measured["results"]["table"]:
        figures = [f"{row[key]:.2f}" for key in columns]
        share = f"{100 * row['opposed']:.0f} %"
        rows.append([row["stream"], f"`{row['method']}`", *figures, share])
    head = ["stream", "method", *columns.values(), "g_a against g_b"]
    return f"{table(head, rows)}\n\n{provenance(measured['about'])}"


def data_costs(measured: Json) -> str:
    """Show what runs of the presets of other data took, each in a process."""
    head = [
        "preset",
        "method",
        "peak memory, MB",
        "a client's training, computed, MB",
        "seconds",
        "of a processor",
    ]
    rows: list[list[str]] = []
    origins = []
    for preset, case in measured["presets"].items():
        for learner, run in case["runs"].items():
            figures = [
                f"{run['peak_memory_mb']:,.0f}",
                f"{run['client_memory_bytes'] / 1e6:,.1f}",
                f"{run['seconds']:,.0f}",
                f"{run['cpu_seconds']:,.0f}",
            ]
            rows.append([f"`{preset}`", f"`{learner}`", *figures])
        load = case["about"]["load_at_end"]
        # A run that was ended before its last method noted no load.
        noted = "not noted" if load is None else f"{load:.1f}"
        origins.append(f"{preset} {case['seed']}, {noted}")
    origin = case["about"] | {
        "load_at_end": None,
        "note": f"Seeds, loads at the end: {'; '.join(origins)}",
    }
    return f"{table(head, rows)}\n\n{provenance(origin)}"


PROTOCOL_TABLES: dict[str, Callable[[Json], str]] = {
    **dict.fromkeys(PROTOCOL, protocol),
    **{f"{name}_settings": chosen_settings for name in PROTOCOL},
    "data_costs": data_costs,
    "protocol_steps": steps,
    "published": published,
}
"""All of them but the ranks, by the name of their file."""
