"""Compare seconds a round as a Flower app with those on our own grids.

The experiment is the same; the app runs under Flower's simulation.

    python benchmarks/flower_app.py    # the whole table, a few minutes
    python benchmarks/flower_app.py --clients 4 --rounds 3 --repeats 1 --learners finetune

The same clients train on digits, and come to the same numbers; what differs is what carries the
messages. Every case runs in a process of its own, the engines in turn. The seconds are those of
the run's own ``round`` events; the first round is start-up and reported apart, medians are over
the warm rounds of all repeats.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}

ENGINES = ("flower", "ray", "inline")
RESULT = "RESULT "


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--learners", nargs="+", default=["finetune", "fedknow"])
    parser.add_argument(
        "--rounds", type=int, default=8, help="warm rounds, after the first"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        help="worker processes of Flower and of Ray",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "flower_app.json",
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the cases asked for, print a table and write the results."""
    args = read_options()
    if args.case:
        print(RESULT + json.dumps(measure(**json.loads(args.case))))
        return
    from engine_vs_flower import describe

    cases = []
    print(
        f"{'learner':10} {'clients':>7} {'engine':8} {'s/round':>9} "
        f"{'of each repeat':24} {'first':>7} {'ratio':>7}"
    )
    for learner in args.learners:
        for clients in args.clients:
            for case in compare(learner, clients, args):
                cases.append(case)
                each = " ".join(f"{value:.4f}" for value in case["medians"])
                ratio = (
                    f"{case['times_faster_than_flower']:6.1f}x"
                    if "times_faster_than_flower" in case
                    else ""
                )
                print(
                    f"{learner:10} {clients:7} {case['engine']:8} {case['median']:9.4f} {each:24} "
                    f"{case['first']:7.2f} {ratio:>7}",
                    flush=True,
                )
    description = describe(args) | {
        "command": " ".join(["python", "benchmarks/flower_app.py", *sys.argv[1:]])
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"about": description, "cases": cases}, indent=1) + "\n",
        "utf-8",
    )
    print(f"written to {args.out}")


def compare(
    learner: str, clients: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measure one case on each engine in turn; check that numbers are equal.

    They must be equal bit for bit.
    """
    runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    for _ in range(args.repeats):
        for engine in ENGINES:
            case = {
                "engine": engine,
                "learner": learner,
                "clients": clients,
                "rounds": args.rounds,
                "workers": args.workers,
            }
            runs[engine].append(once(case))
    digests = {run["digest"] for run in chain.from_iterable(runs.values())}
    if len(digests) != 1:
        raise SystemExit(
            f"{learner}, {clients} clients: the engines came to different numbers"
        )
    results = [
        summary(learner, clients, engine, runs[engine]) for engine in ENGINES
    ]
    flower = results[0]["median"]
    for result in results[1:]:
        result["times_faster_than_flower"] = flower / result["median"]
    return results


def once(case: dict[str, Any]) -> dict[str, Any]:
    """Measure one case in a process of its own."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    completed = subprocess.run(
        command, capture_output=True, text=True, timeout=1800
    )
    lines = [
        line for line in completed.stdout.splitlines() if line.startswith(RESULT)
    ]
    if not lines:
        raise SystemExit(
            f"{case} failed:\n{completed.stdout[-2000:]}\n{completed.stderr[-4000:]}"
        )
    result: dict[str, Any] = json.loads(lines[-1].removeprefix(RESULT))
    return result


def summary(
    learner: str, clients: int, engine: str, runs: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the figures of one engine's runs."""
    # The first round is start-up.
    warm = [run["seconds"][1:] for run in runs]
    return {
        "learner": learner,
        "clients": clients,
        "engine": engine,
        "median": statistics.median(chain.from_iterable(warm)),
        "medians": [statistics.median(seconds) for seconds in warm],
        "first": statistics.median(run["seconds"][0] for run in runs),
        "whole_run": statistics.median(run["whole"] for run in runs),
        "digest": runs[0]["digest"],
        "seconds": [run["seconds"] for run in runs],
    }


def measure(
    engine: str, learner: str, clients: int, rounds: int, workers: int
) -> dict[str, Any]:
    """Return seconds of each round and of the run, and a digest of accuracies."""
    warnings.filterwarnings("ignore")
    from engine_clients import scratch

    from fedknow.server.run.folder import RunFolder

    settings = {
        "data.clients": clients,
        "data.tasks": 1,
        "train.rounds": rounds + 1,
        "train.epochs": 1,
        "learner.name": learner,
        # The numbers of all engines are compared.
        "evaluation.global_model": True if engine == "flower" else "true",
    }
    with scratch() as place:
        out = Path(place) / "run"
        began = time.perf_counter()
        if engine == "flower":
            os.environ["FEDKNOW_STATE"] = str(Path(place) / "state")
            _on_flower({**settings, "out": str(out)}, clients, workers)
        else:
            from fedknow.protocols.config import read_config
            from fedknow.simulations.simulate import simulate

            changes = [f"{key}={value}" for key, value in settings.items()]
            engines = [f"engine.backend={engine}", f"engine.workers={workers}"]
            simulate(read_config({}, [*changes, *engines]), out)
        run_seconds = time.perf_counter() - began
        folder = RunFolder.open(out)
        seconds = [
            event["seconds"]
            for event in folder.events()
            if event["event"] == "round"
        ]
        arrays = folder.accuracy()
        digest = hashlib.sha256(
            b"".join(arrays[name].tobytes() for name in sorted(arrays))
        ).hexdigest()
    return {"seconds": seconds, "whole": run_seconds, "digest": digest}


def _on_flower(settings: dict[str, Any], clients: int, workers: int) -> None:
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    from fedknow.client.flower_app import app as client
    from fedknow.server.flower_app import run_on_flower

    server = ServerApp()
    server.main()(
        lambda grid, context: (
            run_on_flower(grid, settings, context.run_id) and None
        )
    )
    backend: dict[str, Any] = {
        "client_resources": {"num_cpus": (os.cpu_count() or 1) / workers},
        "init_args": {"include_dashboard": False, "log_to_driver": False},
    }
    run_simulation(server, client, clients, backend_config=backend)


if __name__ == "__main__":
    main()
