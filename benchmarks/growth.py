"""Measure how FedKNOW's runs grow.

With clients: seconds a round and memory. With tasks: seconds a task and knowledge.

    FEDKNOW_DATA=DIR python benchmarks/growth.py    # all of it, twenty-five minutes
    FEDKNOW_DATA=DIR python benchmarks/growth.py --clients 20 --series clients    # one case

Clients: whole runs of ten tasks on CIFAR-100 with the 6-layer network, on Ray, ten clients
chosen a round; the others train once when a task ends, so every client has all its knowledge. A
client has four images a task: it is the number of clients that is measured here, not their
training. Tasks: one run on Omniglot, ten characters a task, with k = 10. A round has two steps
there, so what is done once a round, choosing k signature tasks among all past ones, weighs
most. Candidates: the same run with ``learner.candidates = 10``, so that they are chosen among
20.

Memory is the sum over all processes of a run (Ray's too) of their proportional set size, in
which what processes share counts once, looked at once a second; ``peak_mb`` is the most that
was seen.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import RESULTS, give, measure, watching, write

TASKS = 10

CLIENTS = [
    "data.classes_min=2",
    "data.classes_max=2",
    "data.samples=0.004",
    "data.test_samples=0.01",
    "train.rounds=1",
    "train.epochs=1",
    "learner.finetune_epochs=0",
    "evaluation.global_model=false",
]
"""Changes to the preset ``paper-cifar100-small``: two classes and four images a client and task,
one step, and none of fine-tuning."""

LONG = [
    "data.name=omniglot",
    "data.classes_per_task=10",
    "data.clients=2",
    "data.classes_min=2",
    "data.classes_max=2",
    "data.samples=0.5",
    "data.test_samples=1.0",
    "data.share=overlapping",
    "train.rounds=1",
    "train.epochs=1",
    "train.batch_size=10",
    "learner.finetune_epochs=1",
    "learner.k=10",
    "strategy.fraction=1.0",
    "evaluation.global_model=false",
    "engine.backend=inline",
]
"""Changes to the same preset for many tasks: two clients, two characters each a task, two steps."""

CANDIDATES = ["learner.candidates=10"]
"""Changes to that."""

SERIES = ("clients", "tasks", "candidates")


def main() -> None:
    """Run the series asked for, print a table and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--series", nargs="+", choices=SERIES, default=SERIES)
    parser.add_argument("--clients", type=int, nargs="+", default=[20, 100, 500])
    parser.add_argument(
        "--tasks", type=int, default=80, help="length of the long run"
    )
    parser.add_argument(
        "--preset",
        default="paper-cifar100-small",
        help="what the runs are made from",
    )
    parser.add_argument(
        "--set", dest="changes", action="append", default=[], metavar="KEY=VALUE"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "growth.json")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        run(**json.loads(args.case))
        return
    results: dict[str, list[dict[str, Any]]] = {}
    if "clients" in args.series:
        results["clients"] = [by_clients(count, args) for count in args.clients]
    if "tasks" in args.series:
        results["tasks"] = by_tasks(args, LONG)
    if "candidates" in args.series:
        results["candidates"] = by_tasks(args, LONG + CANDIDATES)
    header = {"clients": CLIENTS, "tasks": LONG, "candidates": CANDIDATES}
    if (
        args.out.exists()
    ):  # series, and numbers of clients, that were not run now stay
        earlier = json.loads(args.out.read_text("utf-8"))["results"]
        if "clients" in results:
            earlier_rows = [
                row
                for row in earlier.get("clients", [])
                if row["clients"] not in args.clients
            ]
            results["clients"] = sorted(
                earlier_rows + results["clients"], key=lambda row: row["clients"]
            )
        results = {
            name: (earlier | results)[name]
            for name in SERIES
            if name in earlier | results
        }
    write(args.out, results, preset=args.preset, **header, changes=args.changes)


def by_clients(count: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run with so many clients; return its last task's time and its memory."""
    chosen = min(1.0, 10 / count)
    changes = [
        *CLIENTS,
        f"data.tasks={TASKS}",
        f"data.clients={count}",
        f"strategy.fraction={chosen}",
        *args.changes,
    ]
    measurement = measured(args.preset, changes)
    row = (
        {"clients": count}
        | measurement["tasks"][-1]
        | {key: measurement[key] for key in ("peak_mb", "disk_mb", "seconds")}
    )
    row["ms_a_client_and_task"] = (
        1000 * measurement["seconds"] / (count * len(measurement["tasks"]))
    )
    print(json.dumps(row), flush=True)
    return row | {"by_task": measurement["tasks"]}


def by_tasks(args: argparse.Namespace, kind: list[str]) -> list[dict[str, Any]]:
    """One long run: means over every ten of its tasks, per task."""
    measurement = measured(
        args.preset, [*kind, f"data.tasks={args.tasks}", *args.changes]
    )
    rows = []
    for start in range(0, len(measurement["tasks"]), 10):
        ten = measurement["tasks"][start : start + 10]
        row = {"tasks": f"{start + 1} to {start + len(ten)}"}
        for key in ("round_s", "end_s", "scoring_s"):
            row[key] = sum(task[key] for task in ten) / len(ten)
        row |= {"knowledge_mb_a_client": ten[-1]["knowledge_mb_a_client"]}
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def measured(preset: str, changes: list[str]) -> dict[str, Any]:
    """Run in a process of its own, and watch it from here."""
    with watching() as seen:
        measurement = measure(
            [
                sys.executable,
                __file__,
                "--case",
                json.dumps({"preset": preset, "changes": changes}),
            ]
        )
    return measurement | {"peak_mb": max(seen)}


def run(preset: str, changes: list[str]) -> None:
    """Run in the case's process, and time its parts task by task."""
    from fedknow.simulations.presets import load_preset
    from fedknow.simulations.simulate import simulate

    tasks: list[dict[str, float]] = []
    parts: dict[str, float] = {}

    def see(event: Any) -> None:
        if event.event in ("round", "evaluation"):
            parts[event.event] = event.seconds
        elif event.event == "task_end":
            tasks.append(
                {
                    "round_s": parts["round"],  # one round a task
                    "end_s": event.seconds - parts["round"] - parts["evaluation"],
                    "scoring_s": parts["evaluation"],
                    "knowledge_mb_a_client": event.knowledge_bytes / 1e6,
                }
            )
            print(tasks[-1], file=sys.stderr, flush=True)

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        simulate(
            load_preset(preset, changes),
            Path(folder) / "run",
            observers=[see],
            report=False,
        )
        disk = sum(
            path.stat().st_size
            for path in (Path(folder) / "run" / "clients").iterdir()
        )
        give(
            {
                "seconds": time.perf_counter() - began,
                "tasks": tasks,
                "disk_mb": disk / 1e6,
            }
        )


if __name__ == "__main__":
    main()
