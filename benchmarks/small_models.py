"""The small-model race: logistic regression with 1,000 clients.

10 clients a round, 100 rounds, batches of 10.

    python benchmarks/small_models.py            # three runs in one process, three on Ray
    python benchmarks/small_models.py --quick    # 50 clients, 5 rounds, one run

Each run is `fedknow simulate` in a process of its own, timed from its start to its end:
imports, data, rounds, a checkpoint after each of them, scoring all clients, report. Data are
synthetic, of MNIST's shape and size (60 training images a client). FLUTE's authors give 200 s
for this set-up, and 1,814 s for Flower 1.0 (Garcia et al., arXiv:2203.13789): on another
machine, so of orders of magnitude only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import HERE, QUIET, RESULTS, median, write

CONFIG = """
name = "small-models"
data = {name = "parts:mnist_like", tasks = 1, clients = %(clients)d, partition = "iid"}
model = "linear"
learner = "finetune"
strategy = {name = "fedavg", fraction_train = %(fraction)g}
engine = {backend = "%(backend)s"}

[train]
rounds = %(rounds)d
epochs = 1
batch_size = 10
optimizer = "sgd"
lr = 0.03
weight_decay = 0.0
"""
PHASES = ("start", "rounds", "scoring", "end")


def main() -> None:
    """Run all cases, print a table and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs="+", default=["inline", "ray"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "small_models.json")
    args = parser.parse_args()
    size = (
        {"clients": 50, "rounds": 5, "chosen": 10}
        if args.quick
        else {"clients": 1000, "rounds": 100, "chosen": 10}
    )
    runs: dict[str, list[dict[str, Any]]] = {
        backend: [] for backend in args.backends
    }
    for _ in range(1 if args.quick else args.repeats):
        for backend in args.backends:
            runs[backend].append(run(backend, **size))
    results = {}
    print(
        f"{'backend':8} {'seconds':>8} {'CPU':>6}   "
        f"{' '.join(f'{phase:>8}' for phase in PHASES)}  accuracy"
    )
    for backend, backend_runs in runs.items():
        results[backend] = {
            key: median(backend_runs, key)
            for key in ("seconds", "cpu", *PHASES, "accuracy")
        }
        results[backend] |= {
            "updates_per_second": size["rounds"]
            * size["chosen"]
            / results[backend]["seconds"]
        }
        results[backend] |= {"runs": backend_runs}
        phases = " ".join(f"{results[backend][phase]:8.2f}" for phase in PHASES)
        row = results[backend]
        print(
            f"{backend:8} {row['seconds']:8.2f} {row['cpu']:6.2f}   {phases}  {row['accuracy']:.3f}"
        )
    write(
        args.out,
        results,
        **size,
        batch=10,
        published={"FLUTE": 200, "Flower 1.0": 1814},
    )


def run(backend: str, clients: int, rounds: int, chosen: int) -> dict[str, Any]:
    """Run once; return its seconds, processor time, and the time of its parts."""
    values = {
        "clients": clients,
        "rounds": rounds,
        "fraction": chosen / clients,
        "backend": backend,
    }
    with tempfile.TemporaryDirectory() as folder:
        config, out = Path(folder) / "config.toml", Path(folder) / "run"
        config.write_text(CONFIG % values)
        began, clock, cpu = time.time(), time.perf_counter(), cpu_of_children()
        simulate(config, out)
        seconds, cpu = time.perf_counter() - clock, cpu_of_children() - cpu
        text = (out / "metrics.jsonl").read_text()
    events = [json.loads(line) for line in text.splitlines()]
    return {
        "seconds": seconds,
        "cpu": cpu,
        **phases_of(events, began, seconds),
        "accuracy": next(
            event["accuracy"] for event in events if event["event"] == "end"
        ),
    }


def simulate(config: Path, out: Path) -> None:
    """Run an experiment in a process of its own."""
    command = [sys.executable, "-m", "fedknow", "simulate", str(config)]
    subprocess.run(
        [*command, "--out", str(out)],
        check=True,
        cwd=HERE,
        env=os.environ | QUIET,
        stdout=subprocess.DEVNULL,
    )


def cpu_of_children() -> float:
    """Return the processor seconds of processes that have ended.

    Ray's processes are not children of ours: theirs are not in it.
    """
    times = os.times()
    return times.children_user + times.children_system


def phases_of(
    events: list[dict[str, Any]], began: float, seconds: float
) -> dict[str, float]:
    """Return the seconds of each phase of a run."""
    at = {event["event"]: event["time"] for event in events}
    first_round = next(event for event in events if event["event"] == "round")
    # The first round's warm-up belongs to the rounds.
    started = first_round["time"] - first_round["seconds"]
    return {
        "start": started - began,
        "rounds": at["round"] - started,
        "scoring": at["end"] - at["round"],
        "end": seconds - (at["end"] - began),
    }


if __name__ == "__main__":
    main()
