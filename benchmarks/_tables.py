"""The tables of the documents, each a function of a benchmark's results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from _class_incremental_table import class_incremental
from _comparison_tables import (
    COMPARISONS,
    Json,
    Row,
    cell,
    comparison,
    provenance,
    table,
    withdrawn_fedknow,
)
from _protocol_tables import PROTOCOL_TABLES


def section(head: Row, rows: Iterable[Row], origin: Mapping[str, Any]) -> str:
    """Return a table with its provenance."""
    return f"{table(head, rows)}\n\n{provenance(origin)}"


# --- the benchmarks of docs/evidence/benchmarks.md, in its order
# --------------------------------------------------------------------------------------

STEP_COLUMNS = {
    "violated": "violated",
    "active": "active",
    "pullbacks": "VJPs",
    "pushforwards": "JVPs",
    "bounded-pushforwards": "JVPs, `bounded`",
    "steps-violating": "steps that violate any",
    "steps-active": "steps with any active",
}


def fedknow_step(measured: Json) -> str:
    """Make the tables of benchmark (a), one a setting."""
    parts = [f"{name}:\n\n{_steps(case)}" for name, case in measured.items()]
    return "\n\n".join(parts)


def _steps(case: Json) -> str:
    contenders = list(case["rows"][0]["ratio"])
    # Older results lack some of the columns.
    keys = [key for key in STEP_COLUMNS if key in case["rows"][0]]
    head = ["past tasks", *contenders, *(STEP_COLUMNS[key] for key in keys)]
    rows = []
    for row in case["rows"]:
        ratios = [
            _median(row["ratio"].get(contender)) for contender in contenders
        ]
        rows.append([row["past"], *ratios, *(float(row[key]) for key in keys)])
    return section(head, rows, case)


def _median(ratio: Mapping[str, float] | None) -> float | None:
    return ratio["median"] if ratio else None


def heap(measured: Json) -> str:
    """Make the second table of benchmark (a): what is kept of freed memory."""
    head = ["model", ""]
    for work in ("training", "scoring"):
        head += [f"{work}, ms", "of the first", "pages"]
    rows = []
    for model, settings in measured["results"].items():
        for setting, row in settings.items():
            rows.append([model, setting, *_heap_cells(row)])
    return section(head, rows, measured["about"])


def _heap_cells(row: Json) -> list[float]:
    cells = []
    for work in ("fit", "score"):
        cells += [1e3 * row[work], row[f"{work}_ratio"], row[f"{work}_pages"]]
    return cells


def overhead(measured: Json) -> str:
    """Make the table of benchmark (b)."""
    columns = {
        "steps": "steps",
        "raw": "raw, s",
        "ours": "ours, s",
        "ratio": "ratio",
        "cpu_ratio": "CPU seconds",
        "start": "start, s",
        "report": "report, s",
    }
    rows = []
    for name, row in measured["results"].items():
        rows.append([name, *(row.get(key) for key in columns)])
    head = ["model, processes", *columns.values()]
    return section(head, rows, measured["about"])


def engine_vs_flower(measured: Json, workload: str = "workload") -> str:
    """Make the table of benchmark (c), whose first column is ``workload``."""
    cases = measured["cases"]
    engines = _our_engines(cases)
    figures = _figures(cases[0])
    settings = dict.fromkeys((case[workload], case["clients"]) for case in cases)
    by_engine = {
        (case[workload], case["clients"], case["engine"]): case for case in cases
    }
    rows = []
    for setting in settings:
        flower, *fedknow = [
            by_engine.get((*setting, engine), {})
            for engine in ("flower", *engines)
        ]
        row = [*setting, flower.get("median"), *map(_faster, fedknow)]
        row += [_side_by_side([flower, *fedknow], key) for key in figures]
        rows.append(row)
    head = ["clients do", "clients", "Flower, s a round"]
    head += [f"ours, {engine}" for engine in engines]
    contenders = " / ".join(("Flower", *engines))
    head += [f"{name} ({contenders})" for name in figures.values()]
    return section(head, rows, measured["about"])


def _our_engines(cases: Json) -> list[str]:
    present = {case["engine"] for case in cases}
    return [engine for engine in ("ray", "inline") if engine in present]


def _figures(case: Json) -> dict[str, str]:
    """Return names of further figures of a case, by key."""
    names = {
        "first": "first round, s",
        "whole_run": "whole run, s",
        "peak_mb": "peak MB",
    }
    if "whole_run" in case:
        # The first round of these cases is without start-up, and says little.
        del names["first"]
    return {key: name for key, name in names.items() if key in case}


def _side_by_side(cases: Sequence[Json], key: str) -> str:
    return " / ".join(cell(case.get(key)) for case in cases)


def _faster(case: Mapping[str, Any]) -> str | None:
    if not case:
        return None
    times = case.get("times_faster_than_flower")
    return cell(case["median"]) + (f" ({cell(times)}x)" if times else "")


def flower_app(measured: Json) -> str:
    """Make the table of the experiment as a Flower app."""
    return engine_vs_flower(measured, workload="learner")


def pfl_race(measured: Json) -> str:
    """Make the table of benchmark (d)."""
    columns = {
        "updates_per_second": "client updates/s",
        "ratio": "times pfl",
        "cpu_ratio": "times pfl, CPU seconds",
    }
    rows = []
    for name, case in measured["results"].items():
        for contender, row in case["contenders"].items():
            rows.append([name, contender, *(row.get(key) for key in columns)])
    head = ["model, processes", "contender", *columns.values()]
    return section(head, rows, measured["about"])


def small_models(measured: Json) -> str:
    """Make the table of benchmark (e)."""
    phases = ("start", "rounds", "scoring", "end")
    keys = ["seconds", *phases, "updates_per_second"]
    rows = []
    for backend, row in measured["results"].items():
        rows.append([backend, *(row[key] for key in keys)])
    for name, seconds in measured["about"]["published"].items():
        # The published figures are of whole runs.
        rows.append([name, float(seconds), *[None] * (len(keys) - 1)])
    head = ["", "whole run, s", *(f"{phase}, s" for phase in phases)]
    return section([*head, "client updates/s"], rows, measured["about"])


def growth(measured: Json) -> str:
    """Make the tables of benchmark (f), one a series of results."""
    results = measured["results"]
    series = results if isinstance(results, dict) else {"": results}
    parts = [
        f"{name}\n\n{_series(rows)}".strip() for name, rows in series.items()
    ]
    return "\n\n".join([*parts, provenance(measured["about"])])


def _series(rows: Sequence[Mapping[str, Any]]) -> str:
    head = [
        key
        for key, value in rows[0].items()
        if isinstance(value, int | float | str)
    ]
    cells = []
    for row in rows:
        cells.append([row.get(key) for key in head])
    return table(head, cells)


def precision(measured: Json) -> str:
    """Make the table of accuracy with bfloat16."""
    columns = {
        "accuracy": "accuracy, %",
        "forgetting": "forgetting, points",
        "seconds": "time, s",
    }
    rows = []
    for row in measured["results"]["table"]:
        figures = [_mean_and_half(row, key) for key in columns]
        rows.append([row["learner"], row["what"], *figures, row.get("speedup")])
    head = ["learner", "", *columns.values(), "fp32 / bf16 time"]
    return section(head, rows, measured["about"])


def _mean_and_half(row: Mapping[str, Any], key: str) -> str:
    mean, half = row[key]
    scale = 1 if key == "seconds" else 100
    text = f"{scale * mean:.1f}"
    return text if half is None else f"{text} ± {scale * half:.1f}"


def own_learner(measured: Json) -> str:
    """Make the table of a user's learner beside the built-in one."""
    columns = {
        "step": "ms a step",
        "loss": "`loss` / built-in",
        "gradient": "`gradient` / built-in",
        "counting": "counted / not",
    }
    head = ["model, precision", *columns.values()]
    return section(head, two_places(measured, columns), measured["about"])


def two_places(measured: Json, keys: Iterable[str]) -> list[list[str]]:
    """Make a row of each case: its name, and numbers with two decimal places."""
    rows = []
    for name, row in measured["results"].items():
        rows.append([name, *(f"{row[key]:.2f}" for key in keys)])
    return rows


def versions(measured: Json) -> str:
    """Make the table of small runs in an earlier version and in this one."""
    columns = {"before": "before, s", "now": "now, s", "ratio": "ratio"}
    rows = two_places(measured, columns)
    return section(["case", *columns.values()], rows, measured["about"])


def asynchronous(measured: Json) -> str:
    """Make the table of contenders in virtual time."""
    rows = measured["results"]["table"]
    return section(
        list(rows[0]), [list(row.values()) for row in rows], measured["about"]
    )


def attacks(measured: Json) -> str:
    """Make the table of accuracies under attack, means over the seeds."""
    rows: dict[str, list[object]] = {}
    names: dict[str, None] = {}
    for case in measured["results"]["cases"]:
        names[case["attack"]] = None
        cells = rows.setdefault(case["strategy"], [case["strategy"]])
        cells.append(f"{_mean(case['runs'], 'accuracy'):.1f}")
        if case["attack"] == "backdoor":
            names["marked"] = None
            cells.append(f"{_mean(case['runs'], 'marked'):.1f}")
    head = ["strategy", *(f"{name}, %" for name in names)]
    return section(head, rows.values(), measured["about"])


def _mean(runs: Sequence[Mapping[str, float]], key: str) -> float:
    return sum(run[key] for run in runs) / len(runs)


def secure(measured: Json) -> str:
    """Make the table of what privacy costs."""
    rows = [
        [
            case["learner"],
            case["clients"],
            f"{case['parameters']:,}",
            case["protection"],
            case["seconds"],
            case["up"] / 1e3,
            case["down"] / 1e3,
        ]
        for case in measured["results"]["cases"]
    ]
    head = [
        "learner",
        "clients",
        "parameters",
        "protection",
        "s a round",
        "kB up",
        "kB down",
    ]
    return section(head, rows, measured["about"])


def vmap_clients(measured: Json) -> str:
    """Make the table of the gain by training clients at once."""
    results = measured["results"]
    counts = list(dict.fromkeys(case["clients"] for case in results))
    gains = {(case["model"], case["clients"]): case["gain"] for case in results}
    sizes = {case["model"]: case["parameters"] for case in results}
    rows = []
    for model, size in sizes.items():
        rows.append(
            [model, f"{size:,}", *(gains.get((model, count)) for count in counts)]
        )
    return section(["model", "parameters", *counts], rows, measured["about"])


def numerics(measured: Json) -> str:
    """Make the table of milliseconds of a step by its settings."""
    results = measured["results"]
    models = list(results)
    rows = []
    for setting in results[models[0]]:
        rows.append([setting, *(results[model][setting] for model in models)])
    return section(["ms", *models], rows, measured["about"])


def grpc_round(measured: Json) -> str:
    """Make the table of rounds over gRPC."""
    head = ["", "s a round", "90 %, s", "server, peak MB"]
    rows = [
        [name, row["median_seconds"], row["p90_seconds"], row["server_peak_mb"]]
        for name, row in measured.items()
    ]
    return table(head, rows)


def grpc_vs_flower(measured: Json) -> str:
    """Make the table of rounds over gRPC, beside Flower's."""
    cases = {
        (case["parameters"], case["clients"], case["system"]): case
        for case in measured["cases"]
    }
    rows = []
    # A setting has a case for each system.
    for size, clients in dict.fromkeys(key[:2] for key in cases):
        flower = cases[size, clients, "flower"]["median"]
        rows.append(
            [
                f"{size:,}",
                clients,
                flower,
                _faster(cases[size, clients, "fedknow"]),
            ]
        )
    head = ["parameters", "clients", "Flower, s a round", "ours"]
    return section(head, rows, measured["about"])


TABLES: dict[str, Callable[[Json], str]] = {
    "fedknow_step": fedknow_step,
    "overhead": overhead,
    "engine_vs_flower": engine_vs_flower,
    "flower_app": flower_app,
    "growth": growth,
    "asynchronous": asynchronous,
    "attacks": attacks,
    "secure": secure,
    "precision": precision,
    "pfl_race": pfl_race,
    "pfl_race_cuda": pfl_race,
    "heap": heap,
    **dict.fromkeys(COMPARISONS, comparison),
    # After it: it takes the place of that one's.
    "cifar100_small": withdrawn_fedknow,
    **PROTOCOL_TABLES,
    "small_models": small_models,
    "numerics": numerics,
    "own_learner": own_learner,
    "vmap_clients": vmap_clients,
    "vmap_clients_cuda": vmap_clients,
    "grpc_round": grpc_round,
    "grpc_round_tls": grpc_round,
    "grpc_vs_flower": grpc_vs_flower,
    "versions": versions,
    "class_incremental_pretrained": class_incremental,
}
