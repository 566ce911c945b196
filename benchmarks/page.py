"""Put the figures of ``results/`` into the tables of ``docs/benchmarks.md`` and ``docs/results.md``.

    python benchmarks/page.py            # rewrite the tables python benchmarks/page.py --check
    # say whether they are those of the results; exit with 1 if not

A table stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``; everything else on the page is
written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedknow.server.reports.measures import estimate

HERE = Path(__file__).parent
PAGES = [HERE.parent / "docs" / name for name in ("benchmarks.md", "results.md")]
Json = Any


def main() -> int:
    """Rewrite or check the pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()
    stale = []
    for page in args.pages:
        before = page.read_text("utf-8")
        after = render(before, args.results)
        if before != after:
            stale.append(page)
        if not args.check:
            page.write_text(after, "utf-8")
    if args.check:
        print(
            "\n".join(f"{page}: run benchmarks/page.py" for page in stale)
            or "the tables are those of the results"
        )
    return int(args.check and bool(stale))


def render(page: str, results: Path) -> str:
    """The page with all of its tables made anew."""

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        path = results / (
            f"{name}.json"
            if name not in COMPARISONS
            else f"{COMPARISONS[name]}/compare.json"
        )
        text = (
            TABLES[name](json.loads(path.read_text("utf-8")))
            if path.exists()
            else "Not measured yet."
        )
        return f"<!-- {name} -->\n{text}\n<!-- /{name} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", fill, page, flags=re.DOTALL)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; a number that is given as such gets three digits."""
    lines = [
        head,
        ["---"] * len(head),
        *([_cell(value) for value in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "–" if value is None else str(value)


def taken(about: Mapping[str, Any]) -> str:
    """Where, when and how: one line below a table."""
    versions = ", ".join(
        f"{name} {version}" for name, version in about.get("versions", {}).items()
    )
    where = (
        about.get("gpu")
        or about.get("machine")
        or f"{about.get('cpu')}, {about.get('cores')} cores"
    )
    load = about.get("load_at_end")
    parts = [f"`{about['command']}`", where, versions, about.get("date", "")[:10]]
    parts += [] if load is None else [f"load at the end {load:.1f}"]
    return "; ".join(part for part in [*parts, about.get("note", "")] if part)


def fedknow_step(found: Json) -> str:
    """(a)"""
    parts = []
    for name, case in found.items():
        ways = list(case["rows"][0]["ratio"])
        keys = {
            "violated": "violated",
            "active": "active",
            "pullbacks": "VJPs",
            "pushforwards": "JVPs",
        }
        keys |= {
            "steps-violating": "steps that violate any",
            "steps-active": "steps with any active",
        }
        keys = {key: name for key, name in keys.items() if key in case["rows"][0]}
        head = ["past tasks", *ways, *keys.values()]
        rows = [
            [
                row["past"],
                *(_median(row["ratio"].get(way)) for way in ways),
                *(float(row[key]) for key in keys),
            ]
            for row in case["rows"]
        ]
        parts.append(f"{name}:\n\n{table(head, rows)}\n\n{taken(case)}")
    return "\n\n".join(parts)


def _median(ratio: Mapping[str, float] | None) -> float | None:
    return ratio["median"] if ratio else None


def overhead(found: Json) -> str:
    """(b)"""
    head = [
        "model, processes",
        "steps",
        "raw, s",
        "ours, s",
        "ratio",
        "CPU seconds",
        "start, s",
        "report, s",
    ]
    keys = ("steps", "raw", "ours", "ratio", "cpu_ratio", "start", "report")
    rows = [
        [name, *(row.get(key) for key in keys)]
        for name, row in found["results"].items()
    ]
    return f"{table(head, rows)}\n\n{taken(found['about'])}"


def engine_vs_flower(found: Json) -> str:
    """(c)"""
    cases = found["cases"]
    engines = [
        engine
        for engine in ("ray", "inline")
        if any(case["engine"] == engine for case in cases)
    ]
    names = {
        "first": "first round, s",
        "whole_run": "whole run, s",
        "peak_mb": "peak MB",
    }
    also = {key: name for key, name in names.items() if key in cases[0]}
    also.pop(
        "first" if "whole_run" in also else "", None
    )  # which is without start-up there
    by = {(case["workload"], case["clients"], case["engine"]): case for case in cases}
    rows = []
    for workload, clients in dict.fromkeys(
        (case["workload"], case["clients"]) for case in cases
    ):
        flower = by.get((workload, clients, "flower"), {}).get("median")
        ours = [by.get((workload, clients, engine)) for engine in engines]
        each = [
            by.get((workload, clients, engine), {}) for engine in ("flower", *engines)
        ]
        besides = [" / ".join(_cell(case.get(key)) for case in each) for key in also]
        rows.append(
            [workload, clients, flower, *(_faster(case) for case in ours), *besides]
        )
    head = [
        "clients do",
        "clients",
        "Flower, s a round",
        *(f"ours, {engine}" for engine in engines),
    ]
    head += [f"{what} ({' / '.join(('Flower', *engines))})" for what in also.values()]
    return f"{table(head, rows)}\n\n{taken(found['about'])}"


def _faster(case: Mapping[str, Any] | None) -> str | None:
    if case is None:
        return None
    times = case.get("times_faster_than_flower")
    return f"{_cell(case['median'])}" + (f" ({_cell(times)}x)" if times else "")


def pfl_race(found: Json) -> str:
    """(d)"""
    head = [
        "model, processes",
        "contender",
        "client updates/s",
        "times pfl",
        "times pfl, CPU seconds",
    ]
    rows = [
        [
            name,
            contender,
            row["updates_per_second"],
            row.get("ratio"),
            row.get("cpu_ratio"),
        ]
        for name, case in found["results"].items()
        for contender, row in case["contenders"].items()
    ]
    return f"{table(head, rows)}\n\n{taken(found['about'])}"


def heap(found: Json) -> str:
    """(a), what is kept of freed memory."""
    head = [
        "model",
        "",
        "training, ms",
        "of the first",
        "pages",
        "scoring, ms",
        "of the first",
        "pages",
    ]
    columns = (("", 1e3), ("_ratio", 1), ("_pages", 1))
    rows = [
        [
            model,
            way,
            *(
                row[f"{what}{of}"] * unit
                for what in ("fit", "score")
                for of, unit in columns
            ),
        ]
        for model, ways in found["results"].items()
        for way, row in ways.items()
    ]
    return f"{table(head, rows)}\n\n{taken(found['about'])}"


def small_models(found: Json) -> str:
    """(e)"""
    phases = ("start", "rounds", "scoring", "end")
    rows = [
        [
            backend,
            row["seconds"],
            *(row[phase] for phase in phases),
            row["updates_per_second"],
        ]
        for backend, row in found["results"].items()
    ]
    rows += [
        [name, float(seconds), None, None, None, None, None]
        for name, seconds in found["about"]["published"].items()
    ]
    head = [
        "",
        "whole run, s",
        *(f"{phase}, s" for phase in phases),
        "client updates/s",
    ]
    return f"{table(head, rows)}\n\n{taken(found['about'])}"


def precision(found: Json) -> str:
    """Accuracy with bfloat16."""

    def figure(row: Mapping[str, Any], name: str, scale: float) -> str:
        mean, half = row[name]
        return f"{scale * mean:.1f}" + (
            "" if half is None else f" ± {scale * half:.1f}"
        )

    head = [
        "learner",
        "",
        "accuracy, %",
        "forgetting, points",
        "time, s",
        "fp32 / bf16 time",
    ]
    figures = (("accuracy", 100), ("forgetting", 100), ("seconds", 1))
    rows = [
        [
            row["learner"],
            row["what"],
            *(figure(row, *of) for of in figures),
            row.get("speedup"),
        ]
        for row in found["results"]["table"]
    ]
    return f"{table(head, rows)}\n\n{taken(found['about'])}"


def growth(found: Json) -> str:
    """(f): each series of results as it is."""
    results = found["results"]
    parts = []
    for name, rows in results.items() if isinstance(results, dict) else [("", results)]:
        head = [
            key
            for key, value in rows[0].items()
            if isinstance(value, int | float | str)
        ]
        parts.append(
            f"{name}\n\n{table(head, [[row.get(key) for key in head] for row in rows])}".strip()
        )
    return "\n\n".join([*parts, taken(found["about"])])


def asynchronous(found: Json) -> str:
    """Contenders in virtual time."""
    rows = found["results"]["table"]
    return f"{table(list(rows[0]), [row.values() for row in rows])}\n\n{taken(found['about'])}"


def vmap_clients(found: Json) -> str:
    """Clients at once: the gain."""
    counts = list(dict.fromkeys(case["clients"] for case in found["results"]))
    gains = {
        (case["model"], case["clients"]): case["gain"] for case in found["results"]
    }
    sizes = {case["model"]: case["parameters"] for case in found["results"]}
    rows = [
        [model, f"{size:,}", *(gains.get((model, count)) for count in counts)]
        for model, size in sizes.items()
    ]
    return f"{table(['model', 'parameters', *counts], rows)}\n\n{taken(found['about'])}"


def numerics(found: Json) -> str:
    """Milliseconds of a step by its settings."""
    models = list(found["results"])
    ways = list(found["results"][models[0]])
    rows = [[way, *(found["results"][model][way] for model in models)] for way in ways]
    return f"{table(['ms', *models], rows)}\n\n{taken(found['about'])}"


def grpc_round(found: Json) -> str:
    """Rounds over gRPC."""
    head = ["", "s a round", "90 %, s", "server, peak MB"]
    rows = [
        [name, row["median_seconds"], row["p90_seconds"], row["server_peak_mb"]]
        for name, row in found.items()
    ]
    return table(head, rows)


def grpc_vs_flower(found: Json) -> str:
    """Rounds over gRPC, beside Flower's."""
    by = {
        (case["parameters"], case["clients"], case["system"]): case
        for case in found["cases"]
    }
    settings = dict.fromkeys(
        (case["parameters"], case["clients"]) for case in found["cases"]
    )
    rows = [
        [
            f"{size:,}",
            clients,
            by[size, clients, "flower"]["median"],
            _faster(by[size, clients, "fedknow"]),
        ]
        for size, clients in settings
    ]
    head = ["parameters", "clients", "Flower, s a round", "ours"]
    return f"{table(head, rows)}\n\n{taken(found['about'])}"


def comparison(found: Json) -> str:
    """Learners by accuracy; what FedKNOW has more than each, seed by seed."""
    runs = found["runs"].values()
    ours = {run["seed"]: run for run in runs if run["learner"] == "fedknow"}

    def lead(learner: str, measure: str) -> str:
        pairs = [
            (ours[run["seed"]], run)
            for run in runs
            if run["learner"] == learner and run["seed"] in ours
        ]
        return (
            "–"
            if learner == "fedknow"
            else _interval([100 * (a[measure] - b[measure]) for a, b in pairs], "+")
        )

    def cells(learner: str, group: Json) -> list[object]:
        shown = [
            ("accuracy", 100.0),
            ("accuracy_global", 100.0),
            ("forgetting", 100.0),
            ("forgetting_relative", 100.0),
        ]
        own = [
            [unit * run[name] for run in runs if run["learner"] == learner]
            for name, unit in shown
        ]
        plain = [("samples", 1e-3), ("knowledge_bytes", 1e-3), ("bytes", 1e-6)]
        return [
            f"`{learner}`",
            *map(_interval, own),
            *(f"{unit * (group[name]['mean'] or 0.0):,.0f}" for name, unit in plain),
            lead(learner, "accuracy"),
            lead(learner, "forgetting"),
        ]

    ranked = sorted(
        found["learners"].items(), key=lambda item: -item[1]["accuracy"]["mean"]
    )
    head = [
        "learner",
        "accuracy, %",
        "purely global model",
        "forgetting, points",
        "relative, %",
        "samples learned from, k",
    ]
    head += [
        "kept a client, kB",
        "training traffic, MB",
        "FedKNOW's accuracy less its",
        "FedKNOW's forgetting less its",
    ]
    return table(
        head,
        [
            cells(group.get("learner", name.partition("@")[0]), group)
            for name, group in ranked
        ],
    )


def _interval(values: Sequence[float], sign: str = "") -> str:
    """Write mean and Student's 95 % interval; of fewer than three seeds, each seed's value."""
    found = estimate(values)
    if not found.count:
        return "–"
    if not found.has_interval:
        return ", ".join(f"{value:{sign}.1f}" for value in found.values)
    return f"{found.mean:{sign}.1f} ± {found.half:.1f}"


COMPARISONS = {"digits_all": "digits-all", "cifar100_small": "paper-cifar100-small-all"}
"""Folders of comparisons, by the names of their tables."""

TABLES: dict[str, Callable[[Json], str]] = {
    "fedknow_step": fedknow_step,
    "overhead": overhead,
    "engine_vs_flower": engine_vs_flower,
    "flower_app": lambda found: engine_vs_flower(
        {
            **found,
            "cases": [{**case, "workload": case["learner"]} for case in found["cases"]],
        }
    ),
    "growth": growth,
    "asynchronous": asynchronous,
    "precision": precision,
    "pfl_race": pfl_race,
    "pfl_race_cuda": pfl_race,
    "heap": heap,
    **dict.fromkeys(COMPARISONS, comparison),
    "small_models": small_models,
    "numerics": numerics,
    "vmap_clients": vmap_clients,
    "vmap_clients_cuda": vmap_clients,
    "grpc_round": grpc_round,
    "grpc_round_tls": grpc_round,
    "grpc_vs_flower": grpc_vs_flower,
}

if __name__ == "__main__":
    sys.exit(main())
