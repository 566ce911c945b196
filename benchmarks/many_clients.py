"""Measure runs of very many clients, a thousand of them a round.

    python benchmarks/many_clients.py --clients 1000 10000 100000
    python benchmarks/many_clients.py --clients 100000 --set engine.workers=2

Runs of the digits on Ray, two tasks of two rounds. A client keeps the head of its network, so each
that has trained has a state. 500 clients are scored. Memory is the sum over all processes of a
run (Ray's too) of their proportional set size, looked at once a second; ``peak_mb`` is the most
that was seen. ``cpu_s`` is the time of this process alone up to the first round: sharing the data
out, for the most part.
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

CHANGES = [
    "model=mlp",
    "learner=fedper",
    "data.tasks=2",
    "train.rounds=2",
    "train.epochs=1",
    "evaluation.clients=500",
    "evaluation.global_model=false",
]
"""Changes to the preset ``digits``."""
CHOSEN = 1000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[1000, 10_000, 100_000]
    )
    parser.add_argument(
        "--set", dest="changes", action="append", default=[], metavar="KEY=VALUE"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "many_clients.json")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        run(json.loads(args.case))
        return
    rows = [measured(count, args.changes) for count in args.clients]
    write(args.out, rows, settings=CHANGES, changes=args.changes)


def measured(count: int, changes: list[str]) -> dict[str, Any]:
    """Run in a process of its own, and watch it from here."""
    case = [
        *CHANGES,
        f"data.clients={count}",
        f"strategy.fraction={min(1.0, CHOSEN / count)}",
        *changes,
    ]
    line = [sys.executable, __file__, "--case", json.dumps(case)]
    with watching() as seen:
        row = {"clients": count} | measure(line) | {"peak_mb": max(seen)}
    print(json.dumps(row), flush=True)
    return row


def run(changes: list[str]) -> None:
    """Run in the case's process, and time its parts."""
    from fedknow.server.reports.page import write_report
    from fedknow.server.run.folder import RunFolder
    from fedknow.simulations.presets import load_preset
    from fedknow.simulations.simulate import simulate

    rounds: list[float] = []
    start: dict[str, float] = {}

    def see(event: Any) -> None:
        if event.event == "start":
            start["start_s"] = time.perf_counter() - began
            start["cpu_s"] = time.process_time()
        elif event.event == "round":
            rounds.append(event.seconds)

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "run"
        config = load_preset("digits", changes)
        simulate(config, out, observers=[see], report=False)
        seconds = time.perf_counter() - began
        states = (out / "clients").rglob("*.safetensors")
        sizes = [path.stat().st_size for path in states]
        moment = time.perf_counter()
        write_report([RunFolder.open(out)], out)
        give(
            {
                **start,
                "rounds_s": rounds,
                "seconds": seconds,
                "files": len(sizes),
                "states_mb": sum(sizes) / 1e6,
                "report_s": time.perf_counter() - moment,
            }
        )


if __name__ == "__main__":
    main()
