"""Measure the real time that a virtual fleet costs.

It is given as a share of a whole run in one process.

    python benchmarks/fleet_cost.py --clients 20 --fleet testbed-a
    python benchmarks/fleet_cost.py --clients 500 --fleet phone-low,phone-high,jetson-nano

prints, over repetitions, the median share in % and milliseconds a round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

from fedknow.protocols.config import read_config
from fedknow.simulations.fleet.grid import FleetGrid
from fedknow.simulations.simulate import simulate

OWN = (
    "_piece",
    "_wave",
    "reserves",
    "_due",
    "get_node_ids",
    "elapsed",
    "state",
    "fleet",
)
"""All that the fleet does, besides handing messages on."""


class Watch:
    """Adds up the time in some methods of a class.

    Methods that call each other count once.
    """

    def __init__(self, cls: type, names: tuple[str, ...]) -> None:
        self.seconds, self._depth = 0.0, 0
        for name in names:
            setattr(cls, name, self._timed(getattr(cls, name)))

    def _timed(self, method: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began, self._depth = time.perf_counter(), self._depth + 1
            try:
                return method(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - began

        return timed


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument(
        "--fleet",
        default="testbed-a",
        help="a fleet, or devices with commas between them",
    )
    parser.add_argument(
        "--learner",
        default="fedavg",
        help="the cheaper the work, the larger the share",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    args = read_options()
    devices = args.fleet.split(",")
    config = read_config(
        {
            "data": {
                "clients": args.clients,
                "tasks": 2,
                "classes_max": 2,
                "share": "overlapping",
            },
            "train": {"rounds": args.rounds},
            "learner": args.learner,
            "engine": {"backend": "inline"},
            "fleet": {
                "devices": devices if len(devices) > 1 else devices[0],
                "down": 1e6,
                "up": 5e5,
                "latency": 0.05,
                "jitter": 0.02,
                "compute_sigma": 0.2,
                "dropout": 0.01,
                "shared": True,
                "availability": "markov",
                "deadline": 600.0,
            },
        }
    )
    watch = Watch(FleetGrid, OWN)
    shares, rounds = [], []
    for _ in range(args.repeat):
        watch.seconds = 0.0
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            simulate(config, Path(folder) / "run", report=False)
            shares.append(100 * watch.seconds / (time.perf_counter() - began))
        rounds.append(1e3 * watch.seconds / (2 * args.rounds))
    print(
        f"{args.clients} clients: {statistics.median(shares):.2f} % of the run, ",
        end="",
    )
    print(
        f"{statistics.median(rounds):.2f} ms a round; model cnn, digits, {args.learner}"
    )


if __name__ == "__main__":
    main()
