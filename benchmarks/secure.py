"""Cost of privacy: seconds and bytes of a round.

    python benchmarks/secure.py
    python benchmarks/secure.py --quick

Clients in one process train one step on a few samples, so that masks and noise are most of the
work. Updates are in the clear, masked, noised by each client, or their mean is by the server.
Seconds are processor time of all clients and the server together, the median of the rounds after
the first. Bytes are what a client sends and gets in a round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from _common import RESULTS, write

from fedknow.protocols.config import read_config
from fedknow.simulations.simulate import simulate

KINDS: dict[str, dict[str, Any]] = {
    "none": {},
    "masks": {"privacy": {"secure": True}},
    "noise of clients": {"privacy": {"clip": 1.0, "noise": 20.0}},
    "noise of the server": {"strategy": {"name": "dp-gaussian", "noise": 20.0}},
}
"""Sections of the experiment, by how updates are protected."""


def main() -> None:
    """Measure each size with each protection, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS / "secure.json")
    args = parser.parse_args()
    sizes = (
        [(3, "mlp")] if args.quick else [(10, "mlp"), (30, "mlp"), (10, "cnn6")]
    )
    cases = []
    for clients, model in sizes:
        for kind in KINDS:
            cases.append(case(clients, model, kind, args.rounds))
            print(cases[-1], flush=True)
    write(args.out, {"cases": cases}, rounds=args.rounds)


def case(clients: int, model: str, kind: str, rounds: int) -> dict[str, Any]:
    """Measure the rounds of one experiment."""
    config = read_config(
        {
            "data": {
                "name": "digits",
                "tasks": 1,
                "clients": clients,
                "samples": 0.02,
            },
            "model": model,
            "train": {"rounds": rounds, "epochs": 1, "batch_size": 64},
            "learner": "fedavg",
            "evaluation": {"global_model": False},
            "engine": {"backend": "inline"},
            **KINDS[kind],
        }
    )
    moments: list[float] = []
    start: dict[str, Any] = {}
    traffic: dict[str, Any] = {}

    def watch(event: Any) -> None:
        if event.event == "start":
            start["parameters"] = event.travelling
        if event.event == "round":
            moments.append(time.process_time())
            traffic.update(event.traffic)

    with tempfile.TemporaryDirectory() as folder:
        simulate(config, Path(folder) / "run", observers=[watch], report=False)
    each = [later - earlier for earlier, later in pairwise(moments)]
    kinds = [count for kind, count in traffic.items() if kind.startswith("train")]
    share = clients * rounds
    return {
        "clients": clients,
        "parameters": start["parameters"],
        "protection": kind,
        "seconds": statistics.median(each),
        "up": sum(count["up"] for count in kinds) / share,
        "down": sum(count["down"] for count in kinds) / share,
    }


if __name__ == "__main__":
    main()
