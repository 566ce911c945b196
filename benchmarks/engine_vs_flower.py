"""Compare seconds a round of our grids with Flower's own simulation.

The client code and the strategy are the same.

    python benchmarks/engine_vs_flower.py    # the whole table, about an hour
    python benchmarks/engine_vs_flower.py --clients 10 --rounds 3 --repeats 1 --workloads echo:62000

Every case runs in a process of its own, the engines in turn, so that what else the machine does
meets them alike. Flower's own ``FedAvg.start`` drives all of them; a round ends when it calls
``evaluate_fn``. The first round is start-up (processes, imports, data) and is reported apart;
the rest is warm. Medians over the warm rounds of all repeats, with the medians of the single
repeats beside them; how many times faster is the median over the repeats. With 1,000 clients
there are three warm rounds. Cases that are in the file of results already and are not run again
stay.

Memory is looked at in a run of its own, as looking takes time: the sum over all processes of
their proportional set size, in which what they share counts once; the most that was seen.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _common import watching

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy as np

    Drive = Callable[[Any], None]

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
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument(
        "--workloads",
        nargs="+",
        default=["echo:62000", "echo:1000000", "finetune", "fedknow"],
        help="echo:PARAMETERS, or the name of a learner, which then trains on digits",
    )
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=list(ENGINES)
    )
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
        default=Path(__file__).parent / "results" / "engine_vs_flower.json",
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the cases asked for, print a table and write the results."""
    args = read_options()
    if args.case:
        print(RESULT + json.dumps(measure(**json.loads(args.case))))
        return
    cases = []
    head = (
        f"{'workload':14} {'clients':>7} {'engine':8} {'s/round':>9} "
        f"{'of each repeat':24} {'first':>7} {'ratio':>7}"
    )
    print(f"{head} {'MB':>6}")
    for workload in args.workloads:
        for clients in args.clients:
            results = compare(workload, clients, args)
            cases += results
            print_cases(results)
    merge(args, cases)
    print(f"written to {args.out}")


def print_cases(cases: list[dict[str, Any]]) -> None:
    """Print a row of the table for each engine."""
    for case in cases:
        each = " ".join(f"{value:.4f}" for value in case["medians"])
        ratio = ""
        if "times_faster_than_flower" in case:
            ratio = f"{case['times_faster_than_flower']:6.1f}x"
        print(
            f"{case['workload']:14} {case['clients']:7} {case['engine']:8} "
            f"{case['median']:9.4f} {each:24} "
            f"{case['first']:7.2f} {ratio:>7} {case['peak_mb']:6.0f}",
            flush=True,
        )


def merge(args: argparse.Namespace, cases: list[dict[str, Any]]) -> None:
    """Write the results; those of other cases that are there already stay."""
    text, commands = describe(args), []
    if args.out.exists():
        older = json.loads(args.out.read_text("utf-8"))
        completed = {
            (case["workload"], case["clients"], case["engine"]) for case in cases
        }
        earlier_cases = [
            case
            for case in older["cases"]
            if (case["workload"], case["clients"], case["engine"])
            not in completed
        ]
        commands = [older["about"]["command"]] if earlier_cases else []
        cases = earlier_cases + cases
    text["command"] = "`. Then `".join([*commands, text["command"]])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"about": text, "cases": cases}, indent=1) + "\n", "utf-8"
    )


def compare(
    workload: str, clients: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measure one case on each engine in turn; check that results are equal."""
    runs: dict[str, list[dict[str, Any]]] = {
        engine: [] for engine in args.engines
    }
    case = {
        "workload": workload,
        "clients": clients,
        "rounds": min(args.rounds, max(3, 1000 // clients)),
        "workers": args.workers,
    }
    for _ in range(args.repeats):
        for engine in args.engines:
            runs[engine].append(once(case | {"engine": engine}))
    peaks = peaks_of_memory(args.engines, case)
    check_agreement(f"{workload}, {clients} clients", runs)
    results = []
    for engine, engine_runs in runs.items():
        result: dict[str, Any] = {
            "workload": workload,
            "clients": clients,
            "engine": engine,
            **medians_of(engine_runs),
            "peak_mb": peaks[engine],
            "check": engine_runs[0]["check"],
            "runs": [
                {"first": run["first"], "warm": run["warm"]}
                for run in engine_runs
            ],
        }
        results.append(result)
    compare_with_flower(results)
    return results


def peaks_of_memory(engines: list[str], case: dict[str, Any]) -> dict[str, float]:
    """Return the most memory of each engine, in a run that is not timed."""
    peaks = {}
    for engine in engines:
        with watching(0.2) as seen:
            once(case | {"engine": engine, "rounds": 1})
        peaks[engine] = max(seen)
    return peaks


def check_agreement(case: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Stop unless all engines came to the same weights."""
    checks = [run["check"] for run in chain.from_iterable(runs.values())]
    if max(checks) - min(checks) > 1e-3 * max(map(abs, checks)):
        raise SystemExit(f"{case}: the engines do not agree: {checks}")


def medians_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of an engine's rounds."""
    warm = list(chain.from_iterable(run["warm"] for run in runs))
    return {
        "median": statistics.median(warm),
        "medians": [statistics.median(run["warm"]) for run in runs],
        "first": statistics.median(run["first"] for run in runs),
    }


def compare_with_flower(results: list[dict[str, Any]]) -> None:
    """Enter how many times faster than Flower each of our engines is."""
    medians = {result["engine"]: result["medians"] for result in results}
    if "flower" not in medians:
        return
    for result in results:
        if result["engine"] == "flower":
            continue
        repeats = zip(medians["flower"], result["medians"], strict=True)
        result["times_faster_than_flower"] = statistics.median(
            flower_seconds / our_seconds
            for flower_seconds, our_seconds in repeats
        )


def once(case: dict[str, Any]) -> dict[str, Any]:
    """One case in a process of its own."""
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


def measure(
    engine: str, workload: str, clients: int, rounds: int, workers: int
) -> dict[str, Any]:
    """Return seconds of the first and each later round, and the arrays' norm."""
    started = time.perf_counter()
    warnings.filterwarnings("ignore")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    import engine_clients as code
    from flwr.app import ArrayRecord, ConfigRecord
    from flwr.serverapp.strategy import FedAvg

    from fedknow.protocols.flower import to_arrays, to_record

    kind, _, parameters = workload.partition(":")
    arrays = code.first_arrays(kind, clients, int(parameters or 0))
    times: list[float] = []
    final_arrays: list[ArrayRecord] = []

    def round_done(server_round: int, record: ArrayRecord) -> None:
        times.append(time.perf_counter())
        final_arrays[:] = [record]

    def drive(grid: Any) -> None:
        # Flower sets its logger up anew when its simulation begins.
        logging.getLogger("flwr").setLevel(logging.ERROR)
        every_client: dict[str, Any] = {
            "min_train_nodes": clients,
            "min_available_nodes": clients,
        }
        FedAvg(fraction_evaluate=0.0, **every_client).start(
            grid,
            to_record(arrays),
            num_rounds=rounds + 1,
            train_config=ConfigRecord({"task": 0, "round": 1}),
            evaluate_fn=round_done,
        )

    with code.scratch() as folder:
        if engine == "flower":
            drive_flower(drive, kind, clients, workers, folder)
        else:
            drive_ours(drive, engine, kind, clients, workers, folder)
    calls = rounds + 2
    if len(times) != calls:
        raise SystemExit(f"{len(times)} calls of evaluate_fn instead of {calls}")
    warm = [end - start for start, end in pairwise(times[1:])]
    return {
        "first": times[1] - started,
        "warm": warm,
        "check": norm(to_arrays(final_arrays[0]).values()),
    }


def drive_flower(
    drive: Drive, kind: str, clients: int, workers: int, folder: Path
) -> None:
    """Drive the rounds in Flower's simulation."""
    import engine_clients as code
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    server = ServerApp()
    server.main()(lambda grid, context: drive(grid))
    backend: dict[str, Any] = {
        "client_resources": {"num_cpus": (os.cpu_count() or 1) / workers},
        "init_args": {"include_dashboard": False, "log_to_driver": False},
    }
    run_simulation(
        server,
        code.flower_app(kind, clients, folder),
        clients,
        backend_config=backend,
    )


def drive_ours(
    drive: Drive,
    engine: str,
    kind: str,
    clients: int,
    workers: int,
    folder: Path,
) -> None:
    """Drive the rounds on a grid of ours."""
    import engine_clients as code

    from fedknow.client.host import Host
    from fedknow.client.state import StateStore
    from fedknow.server.grids.strategy_grid import StrategyGrid

    is_echo = kind == "echo"
    config = code.digits(clients, "finetune" if is_echo else kind)
    stream = code.Nothing(clients) if is_echo else code.make_benchmark(config)
    node = code.Echo if is_echo else None
    if engine == "ray":
        from fedknow.simulations.engine.ray_grid import RayGrid

        with RayGrid(config, stream, folder, workers, node) as grid:
            drive(StrategyGrid(grid))
        return
    from fedknow.server.grids.inline import InlineGrid

    memory = config.engine.memory_mb * 2**20
    store = StateStore(folder, memory, durable=False)
    host = Host(config, stream, store, node(config, stream) if node else None)
    drive(StrategyGrid(InlineGrid(clients, host)))


def norm(arrays: Iterable[np.ndarray]) -> float:
    """Return the L2 norm of all weights together."""
    import numpy as np

    squares = (float((array.astype(float) ** 2).sum()) for array in arrays)
    return float(np.sqrt(sum(squares)))


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Where and how the figures were taken."""
    import psutil

    model = [
        line
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    packages = ("fedknow", "flwr", "ray", "torch", "numpy")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(
            ["python", "benchmarks/engine_vs_flower.py", *sys.argv[1:]]
        ),
        "rounds": args.rounds,
        "repeats": args.repeats,
        "workers": args.workers,
        "cpu": model[0].partition(":")[2].strip()
        if model
        else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "load_at_end": os.getloadavg()[0],
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: version(name) for name in packages},
    }


if __name__ == "__main__":
    main()
